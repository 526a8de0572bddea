"""Weights, images and runs for the tests of `beit3 embed`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.store import save_weights

MODEL = replace(TINY, dim=32, depth=1, ffn_dim=32, image_size=16, vocab_size=64, text_positions=66)


def write_weights(
    path: Path, *, seed: int = 0, image_size: int = 16, matching: bool = False
) -> Path:
    """Writes weights of retrieval with one layer."""
    tokenizer = TextTokenizer.train(["how many red cubes are left of the blue ball"], vocab_size=60)
    config = RetrievalConfig(
        model=replace(MODEL, image_size=image_size),
        image=Preprocessing(image_size),
        text_length=12,
        matching=matching,
    )
    task = Retrieval(config, tokenizer=tokenizer)
    task.init_weights(seed)
    save_weights(task, path)
    return path


def write_images(folder: Path, count: int, *, first: int = 0) -> Path:
    """Writes PNG files of random pixels, of sizes that differ, into two folders."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (8 + number % 5, 10 + number % 7, 3), dtype=np.uint8)
        path = folder / f"{number % 2}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def read_files(folder: Path) -> Mapping[str, bytes]:
    """Returns path -> content of all files in a folder of vectors, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "write.lock"
    }


def make_command(weights: Path, inputs: Path, out: Path, *options: object) -> list[str]:
    """Returns the words of the command line after `python -m`."""
    words = ["beit3", "embed", weights, inputs, "--out", out, "--precision", "float32", *options]
    return [str(word) for word in words]
