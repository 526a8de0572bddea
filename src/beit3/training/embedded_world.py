"""Records of the embedded world, for tasks that are given no data.

The world is written to the cache once, in the public data sets' own formats, and then prepared like
any raw data.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.files import cache_directory
from beit3.task import Task, load_task, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.world.export import write_world

VERSION = 4
"""Version of the cached worlds; a change of their content gets the next number."""

WORLDS = {
    "default": {"num_train": 16_000, "num_val": 1000, "num_test": 500, "num_questions": 9000},
    "small": {"num_train": 600, "num_val": 120, "num_test": 60, "num_questions": 1500},
}
"""Scenes of each kind: the demo's world, and one for a quick look."""

VOCABULARY_SIZE = 400
"""Pieces of the worlds' text tokenizer: enough for each of their words to be one."""

RAW_DIRECTORIES = {
    "vqkd": "images",
    "images": "images",
    "texts": "texts",
    "pairs": "pairs",
    "captioning": "pairs",
    "retrieval": "pairs",
}
"""Task or source -> its directory in the raw world; the others are named like their task."""


def prepare_embedded_world(
    task: type[Task], world: str = "default", *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Returns the records of an embedded world for `task`, with a text tokenizer beside them.

    They are made on first use, by one process at a time.
    """
    raw = cache_directory() / f"world-{VERSION}-{world}"
    root = raw.with_name(raw.name + "-records")
    raw.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.with_name(raw.name + ".lock")):
        if not raw.exists():
            write_world(raw, **WORLDS[world], progress=progress)
        for task_class in [task, *map(load_task, task.records_from.values())]:
            if not (root / task_name(task_class)).exists():
                prepare_world_records(raw, root, task_class)
        if not (root / "text.model").exists():
            train_text_tokenizer(raw, root)
    return root


def prepare_world_records(raw: Path, root: Path, task: type[Task]) -> None:
    """Runs the task's own `prepare` on the raw world and moves the finished records into `root`."""
    name = task_name(task)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        for source in task.sources:
            if source in task.records_from:
                continue
            options = {"pack": 0} if source == "texts" else {}  # its texts are single sentences
            source_directory = raw / RAW_DIRECTORIES.get(source, RAW_DIRECTORIES.get(name, name))
            task.prepare(source_directory, Path(scratch), source, **options)
        shutil.move(str(Path(scratch) / name), root / name)


def train_text_tokenizer(raw: Path, root: Path) -> None:
    """Trains SentencePiece on the world's texts, captions, questions and statements."""
    texts: list[str] = []
    for name, sources in (
        ("pretrain", ("texts", "pairs")),
        ("vqa", ("main",)),
        ("nlvr2", ("main",)),
    ):
        if not (root / name).exists():
            prepare_world_records(raw, root, load_task(name))
        for source in sources:
            dataset = RecordDataset(locate_split(root, name, source, "train"), root)
            texts += [record["text"] for record in dataset]
    tokenizer = TextTokenizer.train(texts, vocab_size=VOCABULARY_SIZE, model_type="bpe")
    tokenizer.save(root / "text.model")
