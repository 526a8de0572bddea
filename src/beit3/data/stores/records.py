"""Records in a .jsonl file: one JSON object per line, read in any order.

Paths inside a record are relative to the root of the records (".." is allowed), so the image file
is `Path(root) / record["image"]`. An image may also be a member of a tar file, written as
"photos/00000.tar@1536+20480" (start and size in bytes). `beit3.data.stores.split_files` says which
file holds the records of which task, source and split.
"""

import json
import mmap
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit3.files import atomic_write

IMAGE_FIELDS = ("image", "image2")
"""Fields of a record that name an image."""

FILE_FIELDS = (*IMAGE_FIELDS, "label_map")
"""Fields of a record that name a file. A label map is a file of numbers, not an image."""


class Records:
    """The records of one .jsonl file, by index. Blank lines are skipped.

    The file is scanned for line offsets on first use. Instances may be sent to loader workers and
    read from several processes and threads. Raises ValueError when the file is absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no records at {self.path}: write them with `beit3 prepare`")
        self._offsets: np.ndarray | None = None
        self._mmap: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._find_lines())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record; raises ValueError naming file and line if it is not a JSON object."""
        offsets, index = self._find_lines(), operator.index(index)
        count = len(offsets)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count} in {self.path}")
        start, end = offsets[index].tolist()
        try:
            record = json.loads(self._map_file()[start:end])
        except RecursionError:
            raise self._make_error(start, "it is nested too deeply") from None
        except ValueError as error:
            raise self._make_error(start, str(error)) from None
        if not isinstance(record, dict):
            raise self._make_error(start, f"it holds a {type(record).__name__}")
        return record

    def describe(self, index: int) -> str:
        """Returns the file and line of a record, for messages."""
        return self._describe_line(int(self._find_lines()[index, 0]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mmap": None}

    def leave_out(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Leaves out the records that `keep` is false for, and returns their number.

        Every record is read once.
        """
        is_kept = np.array([keep(record) for record in self], dtype=bool)
        self._offsets = self._find_lines()[is_kept]
        return int((~is_kept).sum())

    def _find_lines(self) -> np.ndarray:
        """Start and end of each line that is not blank: int64 [records, 2]."""
        if self._offsets is None:
            offsets: list[tuple[int, int]] = []
            start = 0
            with self.path.open("rb") as lines:
                for line in lines:
                    end = start + len(line)
                    if not line.isspace():
                        offsets.append((start, end))
                    start = end
            self._offsets = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return self._offsets

    def _map_file(self) -> mmap.mmap:
        if self._mmap is None:
            with self.path.open("rb") as file:
                self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mmap

    def _make_error(self, start: int, reason: str) -> ValueError:
        return ValueError(
            f"{self._describe_line(start)} is not a JSON object ({reason}): mend the line, or run "
            "`beit3 prepare` again"
        )

    def _describe_line(self, start: int) -> str:
        line = self._map_file()[:start].count(b"\n") + 1
        return f"{self.path} line {line}"


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes one record per line, atomically, and returns their number."""
    count = 0
    with atomic_write(Path(path)) as file:
        for record in records:
            try:
                line = json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # a file name that is no UTF-8 keeps its bytes as escapes
                line = json.dumps(record).encode()
            file.write(line + b"\n")
            count += 1
    return count
