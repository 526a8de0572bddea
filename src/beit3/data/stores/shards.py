"""Shards: records that stay in their tar files, read in any order through one index per split.

An index, `root/<task>/<source>/<split>.shards`, starts with a line of JSON that names the tars and
counts their records. One row of fixed size per record follows: its key, start and size of its
image, and start and size of its caption. Rows are memory-mapped; 100 million take about 4 GB.
`beit3.data.stores.shard_writer` writes the index. A record is {"id": "shard/key", "image":
"tar@start+size", "text"} with paths relative to the root.
"""

import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from beit3.data.prepare.formats.tars import decode_caption
from beit3.files import format_tar_member, read_tar_member

FORMAT = "beit3 shards 1"

MAX_HEADER_BYTES = 1 << 28
"""Longest first line that is read: enough for the names of a million tars."""


MAX_KEY_BYTES = 1 << 16
"""Longest key of a record; those that `prepare` writes have at most 109 bytes."""


class Shards:
    """The records of an index, by index.

    Instances may be sent to loader workers and read from several processes and threads. Raises
    ValueError when the index is truncated, and on reading when a tar is missing or has changed
    since it was prepared.

    Args:
        path: The index file.
        root: Directory that the paths of tars are relative to.
    """

    def __init__(self, path: str | Path, root: str | Path) -> None:
        self.path, self.root = Path(path), Path(root)
        header, self._rows_start = read_header(self.path)
        check_header(header, self.path)
        self.tars: list[dict[str, Any]] = header["tars"]
        self.run_lengths = np.array([tar["records"] for tar in self.tars], dtype=np.int64)
        """Number of records in each tar: neighbors in a tar are read at about the same time."""
        self._row_dtype = make_row_dtype(header["width"], captions=header["captions"])
        self._ends = np.cumsum(self.run_lengths)
        num_rows = (self.path.stat().st_size - self._rows_start) / self._row_dtype.itemsize
        if num_rows != len(self):
            raise ValueError(
                f"{path} has {num_rows:g} of {len(self)} rows: run `beit3 prepare` again"
            )
        self._rows: np.ndarray | None = None
        self._checked_tars: set[int] = set()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record. Its caption is read from the tar, its image is not."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        tar_index = int(np.searchsorted(self._ends, index, side="right"))
        tar = self.tars[tar_index]
        tar_path = self._check_tar(tar_index)
        row = self._map_rows()[index]
        if not self._fits(row, tar["bytes"]):
            raise ValueError(f"{self.path} is damaged in row {index}: run `beit3 prepare` again")
        record = {
            "id": f"{tar['name']}/{row['key'].decode()}",
            "image": format_tar_member(tar["path"], int(row["image"]), int(row["image_size"])),
        }
        if "text" in (self._row_dtype.names or ()):
            record["text"] = self._read_caption(tar_path, row, record["id"])
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def _fits(self, row: np.void, tar_bytes: int) -> bool:
        """Returns whether a row has a plain key, and spans of bytes that lie in the tar."""
        spans = [("image", "image_size")]
        if "text" in (self._row_dtype.names or ()):
            spans.append(("text", "text_size"))
        return row["key"].isascii() and all(
            int(row[start]) >= 0 <= int(row[size]) <= tar_bytes - int(row[start])
            for start, size in spans
        )

    def _map_rows(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.memmap(
                self.path,
                dtype=self._row_dtype,
                mode="r",
                offset=self._rows_start,
                shape=(len(self),),
            )
        return self._rows

    def _read_caption(self, tar: Path, row: np.void, record_id: str) -> str:
        try:
            content = read_tar_member(tar, int(row["text"]), int(row["text_size"]))
            return decode_caption(content, bool(row["in_json"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the caption of {record_id} in {tar}: {error}") from None

    def _check_tar(self, tar_index: int) -> Path:
        """Returns the path of a tar, whose size is compared once: offsets fit one file alone."""
        tar = self.tars[tar_index]
        path = self.root / tar["path"]
        if tar_index in self._checked_tars:
            return path
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise ValueError(
                f"cannot read {path}: {error.strerror}; it is named by {self.path}"
            ) from None
        if size != tar["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes, not the {tar['bytes']} of {self.path}: "
                "run `beit3 prepare` again"
            )
        self._checked_tars.add(tar_index)
        return path


def check_header(header: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless the header of an index is of this version and complete."""
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no index of shards of this version ({FORMAT}): run `beit3 prepare` again"
        )
    width, tars = header.get("width"), header.get("tars")
    if not (
        is_count(width)
        and width <= MAX_KEY_BYTES
        and isinstance(header.get("captions"), bool)
        and isinstance(tars, list)
        and all(map(describes_tar, tars))
    ):
        raise ValueError(f"{path} is damaged in its first line: run `beit3 prepare` again")


def describes_tar(entry: Any) -> bool:
    """Returns whether an entry of the header tells name, path, size and records of a tar."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("name", "path"))
        and not set("\0\n\r") & set(entry["path"])
        and all(is_count(entry.get(name)) for name in ("bytes", "records"))
    )


def is_count(value: Any) -> TypeGuard[int]:
    """Returns whether a value is a whole number that numpy can hold, not below 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def make_row_dtype(width: int, *, captions: bool, held_out: bool = False) -> np.dtype:
    """Returns the type of a row.

    Args:
        width: Bytes of the longest key.
        captions: Whether a row has start and size of a caption.
        held_out: Whether a row says that its key is held out, as in files of one tar.
    """
    fields: list[tuple[str, str]] = [("key", f"S{width}"), ("image", "<i8"), ("image_size", "<i4")]
    if captions:
        fields += [("text", "<i8"), ("text_size", "<i4"), ("in_json", "?")]
    if held_out:
        fields.append(("held_out", "?"))
    return np.dtype(fields)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the JSON of a file's first line and the offset of the rows behind it.

    Raises ValueError when the line is not a JSON object.
    """
    with path.open("rb") as file:
        line = file.readline(MAX_HEADER_BYTES)
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} does not begin with a line of JSON: run `beit3 prepare` again")
    return header, len(line)
