"""Reads the documents of one corpus file: plain text, JSON lines or Parquet, also compressed.

A document is a text file open for reading, or a `Fault` that says why it cannot be read. Nothing is
held in memory beyond one line, cell or batch of rows.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow
from pyarrow.parquet import ParquetFile

MAX_DOCUMENT_BYTES = 1 << 26
"""Bytes of a line or cell, which is read at once: no book is so long."""
SKIP_BYTES = 1 << 20
"""Bytes that are read at a time where the content is skipped."""
BATCH_ROWS = 256
"""Rows of a Parquet file that are in memory at once."""


class Span(NamedTuple):
    """A part of a file: bytes or row groups from `start` to `stop`; stop 0 is the file's end."""

    file: str
    """Path relative to the raw folder."""
    start: int
    stop: int
    size: int
    """Bytes on disk."""
    split: str

    @property
    def name(self) -> str:
        """How ids of records begin: "c4.jsonl", or "c4.jsonl@134217728" for a later part."""
        name = self.file.encode(errors="backslashreplace").decode()
        return f"{name}@{self.start}" if self.start else name


class Fault(NamedTuple):
    """A document that cannot be read."""

    location: str
    """"c4.jsonl line 7"."""
    reason: str


Document = TextIO | Fault


def read_text_document(path: Path, span: Span) -> Iterator[Document]:
    """Yields a text file as one document.

    The file is read twice, so that one that is not UTF-8 is skipped as a whole.
    """
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(SKIP_BYTES):
                pass
    except UnicodeDecodeError as error:
        yield Fault(span.name, f"{_describe_decode_error(error)}: convert it to UTF-8")
        return
    with path.open(encoding="utf-8-sig") as file:
        yield file


# JSON lines ---------------------------------------------------------------------------------------


def read_json_documents(path: Path, span: Span, field: str) -> Iterator[Document]:
    """Yields the `field` of each JSON line that begins in `span`, of a plain or compressed file."""
    with _open_binary(path) as file:
        yield from _read_json_lines(file, span, field)


def _read_json_lines(file: BinaryIO, span: Span, field: str) -> Iterator[Document]:
    """Yields the documents of an open file. A line belongs to the span in which it begins."""
    offset, number = span.start, 0
    if offset:
        file.seek(offset - 1)
        offset += _skip_line(file, span.stop - offset + 1) - 1
    try:
        while not span.stop or offset < span.stop:
            line, number = file.readline(MAX_DOCUMENT_BYTES + 1), number + 1
            if not line:
                return
            position = f"byte {offset}" if span.start else f"line {number}"
            location = f"{span.file} {position}"
            offset += len(line)
            if len(line) > MAX_DOCUMENT_BYTES:
                if not line.endswith(b"\n"):
                    offset += _skip_line(file)
                yield Fault(location, f"it is longer than {MAX_DOCUMENT_BYTES} bytes: cut it")
            elif line.strip():
                yield _open_document(location, partial(_decode_json, line), field)
    except (EOFError, OSError, zlib.error) as error:
        yield Fault(
            span.name,
            f"it cannot be read beyond line {number - 1} ({error}): get the file again",
        )


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    """Opens a plain, gzip or Zstandard file for reading its content."""
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.open(path) as file:
            yield file  # type: ignore[misc]
    elif name.endswith(".zst"):
        stream = pyarrow.input_stream(str(path), compression="zstd")
        with io.BufferedReader(stream) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


def _skip_line(file: BinaryIO, limit: int = 0) -> int:
    """Skips to the end of the line, or somewhat past `limit` bytes. Returns how many were read."""
    num_read = 0
    while chunk := file.readline(SKIP_BYTES):
        num_read += len(chunk)
        if chunk.endswith(b"\n") or 0 < limit < num_read:
            break
    return num_read


def _decode_json(line: bytes) -> Any:
    """Returns the JSON value of a line in UTF-8, with or without a byte order mark."""
    return json.loads(line.decode("utf-8-sig"))


# Parquet ------------------------------------------------------------------------------------------


def read_parquet_documents(path: Path, span: Span, field: str) -> Iterator[Document]:
    """Yields the column `field` of the row groups in `span`, a document per row."""
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                yield Fault(
                    span.name,
                    f"it has no column {field!r} (--field), but {', '.join(columns)[:80]}",
                )
                return
            row_groups = range(span.start, span.stop)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=row_groups, columns=[field]):
                for cell in batch.column(0):
                    number += 1
                    location = f"{span.name} row {number}"
                    yield _open_document(location, partial(_read_cell, cell, field), field)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        yield Fault(
            span.name, f"it cannot be read beyond row {number} ({reason}): get the file again"
        )


def find_row_groups(path: Path, part_bytes: int) -> list[int]:
    """Returns the numbers of row groups between which a Parquet file is cut into parts.

    Each part but the last has at least `part_bytes`. For a file that cannot be read the result is
    [0]; `read_parquet_documents` then says why.
    """
    try:
        metadata = ParquetFile(path).metadata
    except (OSError, ValueError):
        return [0]
    cuts, size = [0], 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group == metadata.num_row_groups - 1:
            cuts.append(group + 1)
            size = 0
    return cuts


def _read_cell(cell: Any, field: str) -> dict[str, Any]:
    """Returns a cell of a Parquet column as a record."""
    return {field: cell.as_py()}


# Any record ---------------------------------------------------------------------------------------


def _open_document(location: str, read: Callable[[], Any], field: str) -> Document:
    """Returns the `field` of the record that `read` returns, or a fault."""
    try:
        record = read()
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            content = f"a {type(record).__name__}"
            if isinstance(record, dict):
                content = ", ".join(map(str, list(record)[:8]))
            return Fault(location, f"it has no text {field!r} (--field), but {content[:80]}")
        if len(text.encode()) > MAX_DOCUMENT_BYTES:
            return Fault(location, f"it is longer than {MAX_DOCUMENT_BYTES} bytes: cut it")
    except UnicodeEncodeError as error:
        return Fault(location, f"it holds {error.object[error.start]!r}, which is no character")
    except UnicodeDecodeError as error:
        return Fault(location, _describe_decode_error(error))
    except (ValueError, RecursionError) as error:
        return Fault(location, f"it is not JSON ({error})")
    return io.StringIO(text, newline=None)


def _describe_decode_error(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with bytes that are not UTF-8."""
    return f"it is not UTF-8 ({error.reason} 0x{error.object[error.start]:02x})"
