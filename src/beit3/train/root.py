"""The embedded default: the world, written once to the cache in public formats, then prepared like any raw data."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from beit3.data.loader import Source
from beit3.data.records import locate
from beit3.task import Task, load
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.fill import task_name
from beit3.world.export import write_world

VERSION = 2
"""Of the cached worlds; a change of their pictures or language gets the next number."""

WORLDS = {
    "default": {"num_train": 6000, "num_val": 500, "num_test": 500, "num_questions": 9000},
    "small": {"num_train": 600, "num_val": 120, "num_test": 60, "num_questions": 1500},
}
"""Scenes of each kind: the demo's world, and one for a quick look."""

VOCABULARY = 400
"""Pieces of the worlds' text tokenizer: enough for each of their words to be one."""

RAW = {"vqkd": "images", "images": "images", "texts": "texts", "pairs": "pairs", "captioning": "pairs", "retrieval": "pairs"}
"""Folder of the raw world for a task or source; the others are called like their task."""


def cache() -> Path:
    """`$BEIT3_CACHE`, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit3"
    return Path(os.environ.get("BEIT3_CACHE") or default)


def embedded_root(task: type[Task], world: str = "default", *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Records of an embedded world for this task, with a text tokenizer; made on first use."""
    raw = cache() / f"world-{VERSION}-{world}"
    root = raw.with_name(raw.name + "-records")
    if not raw.exists():
        write_world(raw, **WORLDS[world], progress=progress)
    for kind in [task, *map(load, task.borrowed.values())]:
        if not (root / task_name(kind)).exists():
            prepare_world(raw, root, kind)
    if not (root / "text.model").exists():
        train_text_tokenizer(raw, root)
    return root


def prepare_world(raw: Path, root: Path, task: type[Task]) -> None:
    """Run the task's own `prepare` on the raw world, aside, and move the result in place when it is whole."""
    name = task_name(task)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        for source in (each for each in task.sources if each not in task.borrowed):
            options = {"pack": 0} if source == "texts" else {}  # its texts are single sentences
            task.prepare(raw / RAW.get(source, RAW.get(name, name)), Path(scratch), source, **options)
        shutil.move(str(Path(scratch) / name), root / name)


def train_text_tokenizer(raw: Path, root: Path) -> None:
    """SentencePiece on the world's texts, captions, questions and statements."""
    texts: list[str] = []
    for name, sources in (("pretrain", ("texts", "pairs")), ("vqa", ("main",)), ("nlvr2", ("main",))):
        if not (root / name).exists():
            prepare_world(raw, root, load(name))
        paths = [locate(root, name, source, "train") for source in sources]
        texts += [record["text"] for path in paths for record in Source(path, root)]
    TextTokenizer.train(texts, vocab_size=VOCABULARY, model_type="bpe").save(root / "text.model")
