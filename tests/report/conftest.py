"""Run directories as `beit3 train` leaves them, with tiny untrained networks: what a report is made of."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.data.records import write_records
from beit3.data.transforms import Preprocessing
from beit3.model.config import TINY
from beit3.recipe import DataConfig, Recipe
from beit3.task import Task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.weights import store
from beit3.weights.fill import task_name

MODEL = replace(TINY, dim=32, depth=2, num_heads=2, ffn_dim=32, image_size=16, patch_size=4, vocab_size=64)
CAPTION = "a red cube & <b>one</b> blue ball"


def images_of(html: str) -> list[np.ndarray]:
    """The pixels of every `<img>` of a fragment."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def write_run(path: Path, task: Task, data: DataConfig, *, init: str = "") -> Path:
    """A run of ten logged steps and two evaluations."""
    store.save(task, path / "best")
    recipe = Recipe(task=task.config, data=data).to_dict()
    (path / "recipe.json").write_text(json.dumps({"task": task_name(type(task)), "init": init, "recipe": recipe}))
    lines = [{"step": n, "loss": 9 / n, "loss/text": 9 / n, "text/accuracy": n / 10} for n in range(1, 11)]
    lines += [{"step": step, f"val/{task.headline}": 0.1 * step} for step in (5, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"step": 10, "text_accuracy": 0.5, task.headline: 1.0, "pairs/text_loss": 2.0}
    (path / "scores.json").write_text(json.dumps(scores))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([CAPTION, "what is the ball ? it is red"], vocab_size=60)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Records of all three tasks over eight random pictures."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    images = [f"{index}.png" for index in range(8)]
    for name in images:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name)
    pictures = [{"id": name, "image": name} for name in images]
    pairs = [record | {"text": CAPTION} for record in pictures]
    questions = [record | {"text": "what is <i>", "answers": {"red & blue": 1.0}} for record in pictures]
    for split in ("train", "val"):
        write_records(root / "vqkd" / "main" / f"{split}.jsonl", pictures)
        write_records(root / "pretrain" / "images" / f"{split}.jsonl", pictures)
        write_records(root / "pretrain" / "pairs" / f"{split}.jsonl", pairs)
        write_records(root / "vqa" / "main" / f"{split}.jsonl", questions)
    return root


@pytest.fixture(scope="session")
def vqkd(tmp_path_factory, root) -> Path:
    sizes = VisualTokenizerConfig(16, 4, 32, 1, 2, 32, 1, 8, 12, 45)
    task = VQKD(VQKDConfig(model=sizes, image=Preprocessing(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))  # type: ignore[arg-type]
    task.init_weights(0)
    return write_run(tmp_path_factory.mktemp("runs") / "vqkd", task, DataConfig(root=str(root), batch={"main": 4}))


@pytest.fixture(scope="session")
def pretrain(tmp_path_factory, root, vqkd, tokenizer) -> Path:
    config = PretrainConfig(
        model=MODEL, image=Preprocessing(16), visual_tokenizer=str(vqkd / "best"), num_codes=12, token_size=16,
        min_mask_block=2, text_length=24,
    )  # fmt: skip
    task = Pretrain(config, tokenizer=tokenizer)
    task.init_weights(0)
    data = DataConfig(root=str(root), batch={"images": 4, "pairs": 4})
    return write_run(tmp_path_factory.mktemp("runs") / "pretrain", task, data)


def write_vqa(path: Path, root: Path, tokenizer: TextTokenizer, seed: int) -> Path:
    model, answers = replace(MODEL, final_norm=False), ("red & blue", "no")
    config = VQAConfig(model=model, image=Preprocessing(16), text_length=16, num_answers=2, answers=answers)
    task = VQA(config, tokenizer=tokenizer)
    task.init_weights(seed)
    return write_run(path, task, DataConfig(root=str(root), batch={"main": 4}), init="there/last" if seed else "")


@pytest.fixture(scope="session")
def vqa(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    """Two runs of one name in two folders."""
    folders = [tmp_path_factory.mktemp(name, numbered=False) for name in ("pretrained", "scratch")]
    first, second = (write_vqa(folder / "vqa", root, tokenizer, seed) for seed, folder in enumerate(folders))
    return first, second
