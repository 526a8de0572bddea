"""Records in a .jsonl file: one JSON object per line, read in any order.

Paths inside a record are relative to the root of the records (".." is allowed), so the image file
is `Path(root) / record["image"]`. An image may also be a member of a tar file, written as
"photos/00000.tar@1536+20480" (start and size in bytes). `beit3.data.stores.split_files` says which
file holds the records of which task, source and split.
"""

import json
import mmap
import operator
from array import array
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
        self._lines: np.ndarray | None = None
        self._mmap: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._find_lines())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record; raises ValueError naming file and line if it is not a JSON object."""
        lines, index = self._find_lines(), operator.index(index)
        count = len(lines)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count} in {self.path}")
        start, end, number = lines[index].tolist()
        try:
            record = json.loads(self._map_file()[start:end])
        except RecursionError:
            raise self._make_error(number, "it is nested too deeply") from None
        except ValueError as error:
            raise self._make_error(number, str(error)) from None
        if not isinstance(record, dict):
            raise self._make_error(number, f"it holds a {type(record).__name__}")
        return record

    def describe(self, index: int) -> str:
        """Returns the file and line of a record, for messages."""
        return self._describe_line(int(self._find_lines()[index, 2]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mmap": None}

    def find_left_out(self, keep: Callable[[dict[str, Any]], bool]) -> np.ndarray:
        """Returns whether `keep` is false for each record, bool [records]; reads each once."""
        return np.array([not keep(record) for record in self], dtype=bool)

    def leave_out(self, is_left_out: np.ndarray) -> None:
        """Leaves out the records that the mask, bool [records], is true for."""
        self._lines = self._find_lines()[~is_left_out]

    def _find_lines(self) -> np.ndarray:
        """Start, end and number of each line that is not blank: int64 [records, 3]."""
        if self._lines is None:
            lines = array("q")
            start = 0
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    end = start + len(line)
                    if not line.isspace():
                        lines.extend((start, end, number))
                    start = end
            self._lines = np.array(lines, dtype=np.int64).reshape(-1, 3)
        return self._lines

    def _map_file(self) -> mmap.mmap:
        if self._mmap is None:
            with self.path.open("rb") as file:
                self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mmap

    def _make_error(self, number: int, reason: str) -> ValueError:
        return ValueError(
            f"{self._describe_line(number)} is not a JSON object ({reason}): mend the line, or run "
            "`beit3 prepare` again"
        )

    def _describe_line(self, number: int) -> str:
        return f"{self.path} line {number}"


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
