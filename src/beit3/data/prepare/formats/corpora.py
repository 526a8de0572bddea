"""Text corpora of any size: .txt files, JSON lines and Parquet.

A document is a .txt file, a line or a row. Large files are cut into spans, which several
processes read at once: JSON lines by ranges of bytes, Parquet by row groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from beit3.data.prepare.formats.documents import (
    Document,
    Fault,
    Span,
    find_row_groups,
    read_json_documents,
    read_parquet_documents,
    read_text_document,
)
from beit3.data.prepare.formats.files import find_folder, name_kind, walk_files
from beit3.data.prepare.formats.split_names import (
    HELD_OUT_RATE,
    choose_split,
    find_folder_splits,
    infer_split,
)

LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_LINE_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl.zst")
CORPUS_SUFFIXES = (".txt", ".parquet", *LINE_SUFFIXES, *COMPRESSED_LINE_SUFFIXES)

PART_BYTES = 1 << 27
"""Bytes of a span: 10 seconds of work."""
HELD_OUT_BYTES = 1 << 26
"""Without a val split, HELD_OUT_RATE of the records become one, but of large corpora about these
bytes: more would not score better."""


@dataclass(frozen=True)
class Corpus:
    """The corpora below a folder, as spans, and how records get their splits."""

    raw: Path
    field: str
    """Field or column that holds the text."""
    spans: tuple[Span, ...]
    """In the order of their names and offsets."""
    has_val: bool
    held_out: float
    """Fraction of the training records that become val where there is no val split."""

    @classmethod
    def open(cls, raw: str | Path, field: str = "text") -> "Corpus":
        """Lists the corpora below `raw`.

        Raises ValueError when there is no such folder, or when a file needs a package that is not
        installed.
        """
        raw = find_folder(raw)
        spans = tuple(_find_spans(raw))
        num_bytes = sum(span.size for span in spans)
        held_out = min(HELD_OUT_RATE, HELD_OUT_BYTES / max(1, num_bytes))
        return cls(raw, field, spans, any(span.split == "val" for span in spans), held_out)

    def read_documents(self, span: Span) -> Iterator[Document]:
        """Yields the documents that begin in `span`.

        Those of JSON lines and Parquet are the text in the corpus' field. A file that is cut or
        damaged gives one fault, after the documents before the damage.
        """
        path = self.raw / span.file
        if not path.is_file():
            yield Fault(span.name, "it is a pipe or a device, not a file")
            return
        suffix = _find_suffix(path)
        if suffix == ".txt":
            yield from read_text_document(path, span)
        elif suffix == ".parquet":
            yield from read_parquet_documents(path, span, self.field)
        else:
            yield from read_json_documents(path, span, self.field)

    def name_record(self, span: Span, number: int) -> tuple[str, str]:
        """Returns (split, id) of the record of this number in `span`."""
        record_id = f"{span.name}:{number}"
        split = choose_split(span.split, record_id, has_val=self.has_val, held_out=self.held_out)
        return split, record_id


def list_left_out(raw: str | Path) -> Iterator[tuple[str, str]]:
    """Yields (path relative to `raw`, kind) for the files below `raw` that are no corpora."""
    raw = find_folder(raw)
    for path in walk_files(raw):
        if not _find_suffix(path):
            yield path.relative_to(raw).as_posix(), name_kind(path)


def _find_suffix(path: Path) -> str:
    """Returns the longest of `CORPUS_SUFFIXES` with which a file's name ends, or ""."""
    name = path.name.lower()
    suffixes = (suffix for suffix in CORPUS_SUFFIXES if name.endswith(suffix))
    return max(suffixes, key=len, default="")


def _find_spans(raw: Path) -> Iterator[Span]:
    """Yields the spans of all corpora below `raw`.

    Splits are those of the folders right below `raw`. Files of many documents may also be named
    after theirs.
    """
    folder_splits = find_folder_splits(raw)
    for path in walk_files(raw):
        suffix = _find_suffix(path)
        if not suffix:
            continue
        file, size = path.relative_to(raw).as_posix(), path.stat().st_size
        split = folder_splits.get(file.partition("/")[0], "")
        if not split and suffix != ".txt":
            split = infer_split(path, raw)
        parts = [*pairwise(_find_cuts(path, suffix, size))] or [(0, 0)]
        for start, stop in parts:
            yield Span(file, start, stop, size // len(parts), split or "train")


def _find_cuts(path: Path, suffix: str, size: int) -> list[int]:
    """Returns where a file is cut: bytes of JSON lines, row groups of Parquet, else [0]."""
    if not path.is_file():
        return [0]
    if suffix == ".parquet":
        return find_row_groups(path, PART_BYTES)
    if suffix in LINE_SUFFIXES:
        return [*range(0, size, PART_BYTES), size]
    return [0]
