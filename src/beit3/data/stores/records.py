"""Records: one JSON object per line of `root/<task>/<source>/<split>.jsonl`, read at random; and the images they name.

Image paths inside a record are relative to `root` (".." allowed), so `Path(root) / record["image"]` is the file; an image
may also be a range of bytes of a tar, "photos/00000.tar@1536+20480" (start and size). A source may be several sets in
folders below its own. In place of a folder of ours, a root may hold upstream's index files as they are
(`beit3.data.stores.upstream`). Shapes: dict; image uint8 [3, H, W] RGB.
"""

import json
import mmap
import operator
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from beit3.files import atomic_write

IMAGES = ("image", "image2")
"""Fields of a record that name an image."""
FILES = (*IMAGES, "label_map")
"""These, and what else names a file: a label map holds numbers, no picture."""

STORES = (".jsonl", ".shards", ".tokens")
"""Endings of a split's records: one JSON object a line, an index of tars (`beit3.data.stores.shards`), or of ids (`beit3.data.stores.tokens`)."""


# Upstream's index files of a task, and what they call our splits where it differs: the first that is there counts.
INDEX_FILES = {
    "vqa": ("vqa.{}.jsonl",),
    "nlvr2": ("nlvr2.{}.index.jsonl",),
    "retrieval": ("coco_retrieval.{}.jsonl", "flickr30k.{}.jsonl"),
    "captioning": ("coco_captioning.{}.jsonl", "nocaps.{}.jsonl"),
    "imagenet": ("imagenet.{}.index.jsonl",),
}
INDEX_SPLITS = {
    ("vqa", "val"): ("rest_val", "val"),
    ("nlvr2", "val"): ("dev",),
    ("nlvr2", "test"): ("test-P",),
}


class Records:
    """The records of one jsonl file, by index. Line offsets are found on first use; blank lines are no records.

    Safe to send to loader workers and to read from several processes and threads. ValueError when the file is absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no records at {self.path}: write them with `beit3 prepare`")
        self._offsets: np.ndarray | None = None
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._index()) // 2

    def __getitem__(self, index: int) -> dict:
        """Record `index`; ValueError naming file and line when that line is not a JSON object."""
        offsets, index = self._index(), operator.index(index)
        length = len(offsets) // 2
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length} in {self.path}")
        start, end = offsets[2 * (index % length)], offsets[2 * (index % length) + 1]
        try:
            record = json.loads(self._bytes()[start:end])
        except ValueError as error:
            raise self._malformed(start, str(error)) from None
        if not isinstance(record, dict):
            raise self._malformed(start, f"holds a {type(record).__name__}")
        return record

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def _index(self) -> np.ndarray:
        """Start and end of each line that is not blank: [2 x records] int64."""
        if self._offsets is None:
            found: list[int] = []
            at = 0
            with self.path.open("rb") as lines:
                for line in lines:
                    if not line.isspace():
                        found += (at, at + len(line))
                    at += len(line)
            self._offsets = np.array(found, dtype=np.int64)
        return self._offsets

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _malformed(self, start: int, reason: str) -> ValueError:
        line = self._bytes()[:start].count(b"\n") + 1
        return ValueError(
            f"{self.path} line {line} is not a JSON object ({reason}): run `beit3 prepare` again"
        )


def write_records(path: str | Path, records: Iterable[dict]) -> int:
    """Write `records` to `path`, one per line, and return their number; a reader never sees half a file."""
    count = 0
    with atomic_write(Path(path)) as file:
        for record in records:
            file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
            count += 1
    return count


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`; a reader never sees half a file."""
    with atomic_write(Path(path)) as file:
        file.write(text.encode())


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split in `folder`, split.jsonl or split.shards; without one, those of the sets in the folders below it.

    ValueError where both are there: it would not be clear which is meant.
    """
    own = [path for path in (folder / f"{split}{ending}" for ending in STORES) if path.is_file()]
    below = sorted(path for ending in STORES for path in folder.glob(f"[!.]*/{split}{ending}"))
    for one, other in pairwise(own or below):
        if own or one.parent == other.parent:
            raise ValueError(f"{one} and {other} are both {split}: keep the one that is meant")
    if own and below:
        raise ValueError(
            f"{own[0]} and {below[0]} are both {split}: move the first into a folder of its own beside the other's"
        )
    return own or below


def locate(root: str | Path, task: str, source: str, split: str) -> Path:
    """What `Source` opens for one split: root/task/source/split.jsonl or .shards, or .../split where it is several sets.

    Without such a folder, upstream's index file in the root. ValueError with the remedy when there is none, or when two
    files serve the split.
    """
    path = Path(root) / task / source / f"{split}.jsonl"
    files = split_files(path.parent, split)
    if files:
        return files[0] if files[0].parent == path.parent else path.with_suffix("")
    if source == "main" and not path.parent.is_dir():
        for name in INDEX_SPLITS.get((task, split), (split,)):
            found = [
                file
                for file in (
                    Path(root) / pattern.format(name) for pattern in INDEX_FILES.get(task, ())
                )
                if file.is_file()
            ]
            if len(found) > 1:
                raise ValueError(
                    f"{' and '.join(map(str, found))} are both {task} {split}: keep the one that is meant in this root"
                )
            if found:
                return found[0]
    remedy = f"beit3 prepare {task} --raw DIR --root {root}" + (
        f" --source {source}" if source != "main" else ""
    )
    raise ValueError(f"no {task}/{source}/{split}.jsonl under {root}: write it with `{remedy}`")
