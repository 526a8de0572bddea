"""Where records are: a given folder, whose public files or tables are prepared on first use, or the embedded world.

The world is written once to the cache in public formats, then prepared like any raw data.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from beit3.data.loader import Source
from beit3.data.stores.records import locate, split_files
from beit3.files import cache_directory
from beit3.task import Task, load_task, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.world.export import write_world

VERSION = 3
"""Of the cached worlds; a change of what they hold gets the next number."""

WORLDS = {
    "default": {"num_train": 6000, "num_val": 500, "num_test": 500, "num_questions": 9000},
    "small": {"num_train": 600, "num_val": 120, "num_test": 60, "num_questions": 1500},
}
"""Scenes of each kind: the demo's world, and one for a quick look."""

VOCABULARY = 400
"""Pieces of the worlds' text tokenizer: enough for each of their words to be one."""

RAW = {
    "vqkd": "images",
    "images": "images",
    "texts": "texts",
    "pairs": "pairs",
    "captioning": "pairs",
    "retrieval": "pairs",
}
"""Folder of the raw world for a task or source; the others are called like their task."""


def records_root(
    task: type[Task],
    root: str,
    sources: Iterable[str],
    split: str = "train",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder that holds a split of the records of `sources`: `root`, or the embedded world's where it is empty.

    A folder of public files, or of a table of one's own, gets its records beside them on first use, so that own data needs
    one command. ValueError where there are neither records nor files that the task reads.
    """
    if not root:
        return embedded_root(task, progress=progress)
    place, own = Path(root), [source for source in task.sources if source not in task.records_from]
    if len(own) > 1 or own[0] not in sources or (place / task_name(task) / own[0]).exists():
        return place
    try:
        locate(place, task_name(task), own[0], split)
    except ValueError as missing:
        try:
            report = task.prepare(place, place, own[0])
        except ValueError as unreadable:
            raise ValueError(f"{missing}; nor can {place} be read as it is: {unreadable}") from None
        print(f"prepared {place}: {report['records']}", file=sys.stderr)
    return place


def split_sources(task: type[Task], root: str, split: str) -> dict[str, Source]:
    """The sources of a task that have this split, under `root` or in the embedded world."""
    place = records_root(task, root, task.sources, split)
    names = {source: task.records_from.get(source, task_name(task)) for source in task.sources}
    there = {
        source: name for source, name in names.items() if split_files(place / name / source, split)
    }
    own = {
        source: name for source, name in there.items() if source not in task.records_from
    }  # they win over another task's
    chosen = own or there or {task.sources[0]: names[task.sources[0]]}
    return {
        source: Source(locate(place, name, source, split), place) for source, name in chosen.items()
    }


def embedded_root(
    task: type[Task], world: str = "default", *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Records of an embedded world for this task, with a text tokenizer; made on first use, by one process at a time."""
    raw = cache_directory() / f"world-{VERSION}-{world}"
    root = raw.with_name(raw.name + "-records")
    raw.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.with_name(raw.name + ".lock")):
        if not raw.exists():
            write_world(raw, **WORLDS[world], progress=progress)
        for kind in [task, *map(load_task, task.records_from.values())]:
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
        for source in (each for each in task.sources if each not in task.records_from):
            options = {"pack": 0} if source == "texts" else {}  # its texts are single sentences
            task.prepare(
                raw / RAW.get(source, RAW.get(name, name)), Path(scratch), source, **options
            )
        shutil.move(str(Path(scratch) / name), root / name)


def train_text_tokenizer(raw: Path, root: Path) -> None:
    """SentencePiece on the world's texts, captions, questions and statements."""
    texts: list[str] = []
    for name, sources in (
        ("pretrain", ("texts", "pairs")),
        ("vqa", ("main",)),
        ("nlvr2", ("main",)),
    ):
        if not (root / name).exists():
            prepare_world(raw, root, load_task(name))
        paths = [locate(root, name, source, "train") for source in sources]
        texts += [record["text"] for path in paths for record in Source(path, root)]
    TextTokenizer.train(texts, vocab_size=VOCABULARY, model_type="bpe").save(root / "text.model")
