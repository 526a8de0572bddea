"""The embedded default: the world, written once to the cache in public formats, then prepared like any raw data."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from beit3.data.loader import Source
from beit3.data.records import locate
from beit3.task import Task
from beit3.tokenizer.text import TextTokenizer

WORLD = "world-1"
"""Name of the cached world; a change of its pictures or language gets a new number."""

VOCABULARY = 400
"""Pieces of the embedded world's text tokenizer: all its words are whole pieces."""

RAW = {"images": "images", "texts": "texts", "pairs": "pairs", "main": "{task}"}
"""Folder of the raw world that serves a source."""


def cache() -> Path:
    """`$BEIT3_CACHE`, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit3"
    return Path(os.environ.get("BEIT3_CACHE") or default)


def embedded_root(task_class: type[Task], progress: Callable[[int, int], None] | None = None) -> Path:
    """Records of the world for this task, made on first use."""
    from beit3.world.export import write_world

    raw, root = cache() / WORLD, cache() / f"{WORLD}-records"
    if not raw.exists():
        write_world(raw, progress=progress)
    name = task_class.__module__.rpartition(".")[2]
    if not (root / name).exists():
        prepare_world(raw, root, name, task_class)
    if not (root / "text.model").exists():
        train_text_tokenizer(raw, root)
    return root


def prepare_world(raw: Path, root: Path, name: str, task_class: type[Task]) -> None:
    """Run the task's own `prepare` on the raw world, aside, and move the result in place when it is whole."""
    root.mkdir(parents=True, exist_ok=True)
    folders = {"vqkd": "images"}
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        for source in task_class.sources:
            folder = folders.get(name) or RAW[source].format(task=name)
            task_class.prepare(raw / folder, Path(scratch), source)
        shutil.move(str(Path(scratch) / name), root / name)


def train_text_tokenizer(raw: Path, root: Path) -> None:
    """SentencePiece on the world's texts and captions."""
    from beit3.task import load

    pretrain = load("pretrain")
    if not (root / "pretrain").exists():
        prepare_world(raw, root, "pretrain", pretrain)
    paths = [locate(str(root), "pretrain", source, "train") for source in ("texts", "pairs")]
    texts = (record["text"] for path in paths for record in Source(path, root))
    TextTokenizer.train(texts, vocab_size=VOCABULARY).save(root / "text.model")
