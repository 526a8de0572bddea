"""Text corpora: .txt files (a document each), JSON lines and Parquet (a document a line or row), of
any size.

Large files are read in parts, by several processes at once: JSON lines by ranges of bytes, Parquet
by row groups. Across
the border: a document as a text file open for reading, or what is wrong with it; the split of each
record made of it.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from beit3.data.prepare.formats.files import (
    HELD_OUT,
    folder,
    folder_splits,
    named_split,
    or_held_out,
    walk,
)

LINES, PACKED_LINES = (".jsonl", ".ndjson"), (".jsonl.gz", ".json.gz", ".jsonl.zst")
ENDINGS = (".txt", ".parquet", *LINES, *PACKED_LINES)

PART = 1 << 27
"""Bytes that are read as one part: 10 seconds of work."""
LONGEST = 1 << 26
"""Bytes of a line or cell, which is read as a whole: no book is so long."""
HELD_OUT_BYTES = 1 << 26
"""Without a val split HELD_OUT of the records become one, but of large corpora about these bytes:
more would not score better."""
SKIP = 1 << 20
"""Bytes of a line beyond it that are passed at once."""
ROWS = 256
"""Rows of a Parquet file that are in memory at once."""


class Span(NamedTuple):
    """A part of a file: bytes or row groups from `start` to `stop`; stop 0 = the whole file."""

    file: str
    """Below the raw folder."""
    start: int
    stop: int
    size: int
    """Bytes on disk."""
    split: str

    @property
    def name(self) -> str:
        """What ids of records begin with: "c4.jsonl", and "c4.jsonl@134217728" for a later part."""
        return self.file.encode(errors="backslashreplace").decode() + (
            f"@{self.start}" if self.start else ""
        )


class Fault(NamedTuple):
    """A document that cannot be read: "c4.jsonl line 7", and why."""

    place: str
    why: str


Document = TextIO | Fault


@dataclass(frozen=True)
class Corpus:
    """All corpora below a folder, or some spans of them, and what says to which split a record
    belongs."""

    raw: Path
    field: str
    """Field or column that holds the text."""
    spans: tuple[Span, ...]
    """In the order of their names and places."""
    has_val: bool
    held_out: float

    @classmethod
    def open(cls, raw: str | Path, field: str = "text") -> "Corpus":
        """ValueError where there is no such folder, or one of the files needs a package that is
        absent."""
        raw = folder(raw)
        spans = tuple(_spans(raw))
        share = min(HELD_OUT, HELD_OUT_BYTES / max(1, sum(span.size for span in spans)))
        return cls(raw, field, spans, any(span.split == "val" for span in spans), share)

    def documents(self, span: Span) -> Iterator[Document]:
        """The documents that begin in `span`; those of JSON lines and Parquet are their `field`.

        A file that ends too early or is damaged is one fault, where that is noticed; what came
        before it counts.
        """
        path, kind = self.raw / span.file, _kind(self.raw / span.file)
        if kind == ".txt":
            yield from _text(path, span)
        elif kind == ".parquet":
            yield from _parquet(path, span, self.field)
        else:
            with _opened(path) as file:
                yield from _json_lines(file, span, self.field)

    def named(self, span: Span, number: int) -> tuple[str, str]:
        """(split, id) of the record of this number in `span`."""
        id = f"{span.name}:{number}"
        return or_held_out(span.split, id, has_val=self.has_val, held_out=self.held_out), id


def _kind(path: Path) -> str:
    """The longest of ENDINGS that the file has, or ''."""
    return max(
        (ending for ending in ENDINGS if path.name.lower().endswith(ending)), key=len, default=""
    )


def _spans(raw: Path) -> Iterator[Span]:
    """Splits are those of the folders right below `raw`; files of many documents may also be named
    after theirs."""
    folders = folder_splits(raw)
    for path in walk(raw):
        kind = _kind(path)
        if kind:
            file, size = path.relative_to(raw).as_posix(), path.stat().st_size
            split = (
                folders.get(file.partition("/")[0])
                or (named_split(path, raw) if kind != ".txt" else "")
                or "train"
            )
            cuts = (
                _row_groups(path)
                if kind == ".parquet"
                else [*range(0, size, PART), size]
                if kind in LINES
                else [0]
            )
            parts = [*pairwise(cuts)] or [(0, 0)]
            for start, stop in parts:
                yield Span(file, start, stop, size // len(parts), split)


def _text(path: Path, span: Span) -> Iterator[Document]:
    """A file is read twice, so that one that is no text is passed over as a whole."""
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(SKIP):
                pass
    except UnicodeDecodeError as error:
        yield Fault(
            span.name,
            f"it is not UTF-8 ({error.reason} 0x{error.object[error.start]:02x}): convert it to "
            "UTF-8",
        )
        return
    with path.open(encoding="utf-8-sig") as file:
        yield file


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as file:
            yield file  # type: ignore[misc]
    elif path.name.lower().endswith(".zst"):
        with io.BufferedReader(arrow(path).input_stream(str(path), compression="zstd")) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


def _json_lines(file: BinaryIO, span: Span, field: str) -> Iterator[Document]:
    """A line belongs to the span in which it begins."""
    at, number = span.start, 0
    if at:
        file.seek(at - 1)
        at += _skip(file, span.stop - at + 1) - 1
    try:
        while not span.stop or at < span.stop:
            line, number = file.readline(LONGEST + 1), number + 1
            if not line:
                return
            place = f"{span.file} byte {at}" if span.start else f"{span.file} line {number}"
            at += len(line)
            if len(line) > LONGEST:
                at += 0 if line.endswith(b"\n") else _skip(file)
                yield Fault(place, f"it is longer than {LONGEST} bytes: cut it")
            elif line.strip():
                yield _document(place, partial(_decode_json, line), field)
    except (EOFError, OSError, zlib.error) as error:
        yield Fault(
            span.name, f"it cannot be read behind line {number - 1} ({error}): get the file again"
        )


def _skip(file: BinaryIO, limit: int = 0) -> int:
    """Bytes up to the end of the line, or somewhat more than `limit`."""
    passed = 0
    while line := file.readline(SKIP):
        passed += len(line)
        if line.endswith(b"\n") or 0 < limit < passed:
            break
    return passed


def _decode_json(line: bytes) -> Any:
    """Returns the JSON value of a line in UTF-8, with or without a byte order mark."""
    return json.loads(line.decode("utf-8-sig"))


def _read_cell(cell: Any, field: str) -> dict[str, Any]:
    """Returns a cell of a Parquet column as a record."""
    return {field: cell.as_py()}


def _document(place: str, read: Callable[[], Any], field: str) -> Document:
    """The `field` of what `read` gives; a fault where it cannot be read, is too long or no text."""
    try:
        record = read()
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = (
                ", ".join(map(str, list(record)[:8]))
                if isinstance(record, dict)
                else f"a {type(record).__name__}"
            )
            return Fault(place, f"it has no text {field!r} (--field), but {found[:80]}")
        if len(text.encode()) > LONGEST:
            return Fault(place, f"it is longer than {LONGEST} bytes: cut it")
    except UnicodeEncodeError as error:
        return Fault(place, f"it holds {error.object[error.start]!r}, which is no character")
    except UnicodeDecodeError as error:
        return Fault(place, f"it is not UTF-8 ({error.reason} 0x{error.object[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return Fault(place, f"it is not JSON ({error})")
    return io.StringIO(text, newline=None)


def arrow(path: Path) -> Any:
    """The package that reads Parquet and Zstandard; ValueError with the remedy where it is
    absent."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path} needs a package that is not there: pip install 'beit3[parquet]'"
        ) from None
    return pyarrow


def _row_groups(path: Path) -> list[int]:
    """Numbers of row groups between which a file is cut; for a file that cannot be read [0],
    `documents` says why."""
    try:
        about = arrow(path).parquet.ParquetFile(path).metadata
    except OSError:
        return [0]
    except ValueError as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        return [0]
    cuts, size = [0], 0
    for group in range(about.num_row_groups):
        size += about.row_group(group).total_byte_size
        if size >= PART or group == about.num_row_groups - 1:
            cuts, size = [*cuts, group + 1], 0
    return cuts


def _parquet(path: Path, span: Span, field: str) -> Iterator[Document]:
    number = 0
    try:
        with arrow(path).parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                yield Fault(
                    span.name,
                    f"it has no column {field!r} (--field), but "
                    f"{', '.join(file.schema_arrow.names)[:80]}",
                )
                return
            for batch in file.iter_batches(
                ROWS, row_groups=range(span.start, span.stop), columns=[field]
            ):
                for cell in batch.column(0):
                    number += 1
                    yield _document(
                        f"{span.name} row {number}", partial(_read_cell, cell, field), field
                    )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        yield Fault(
            span.name, f"it cannot be read behind row {number} ({reason}): get the file again"
        )
