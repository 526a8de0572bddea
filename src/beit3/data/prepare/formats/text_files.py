"""Paragraphs of text corpora: .txt, JSON lines and Parquet files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import wrap

from beit3.data.prepare.formats.corpora import Corpus, list_left_out
from beit3.data.prepare.formats.documents import Fault
from beit3.data.prepare.formats.files import walk_files
from beit3.data.prepare.formats.split_names import SplitRecord

MAX_TEXT_CHARS = 2000
"""Characters of a text record: about 512 tokens, the longest text of pretraining."""


def read_text_files(raw: str | Path, *, field: str = "text") -> Iterator[SplitRecord]:
    """Yields (split, {id: "file:number", text}) for the paragraphs of the corpora below `raw`.

    Paragraphs lie between blank lines; long ones are cut. A document that cannot be read is
    {id, fault}, other files are {id, left_out: suffix}. `field` is the field of JSON lines or the
    column of Parquet files that holds the text.
    """
    corpus = Corpus.open(raw, field)
    for file, kind in list_left_out(raw):
        yield "train", {"id": file, "left_out": kind}
    for span in corpus.spans:
        number = 0
        for document in corpus.read_documents(span):
            if isinstance(document, Fault):
                yield span.split, {"id": document.location, "fault": document.reason}
                continue
            for text in split_paragraphs(document):
                number += 1
                split, record_id = corpus.name_record(span, number)
                yield split, {"id": record_id, "text": text}


def split_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yields paragraphs as single lines with single spaces between words.

    A paragraph of more than `MAX_TEXT_CHARS` is cut at the last line end within them: some books of
    the Gutenberg selections have no blank line at all, and each would be one record of a million
    characters.
    """
    words: list[str] = []
    size = 0
    for line in _wrap_long_lines(lines):
        if words and (not line.strip() or size + len(line) > MAX_TEXT_CHARS):
            yield " ".join(words)
            words, size = [], 0
        words += line.split()
        size += len(line)
    if words:
        yield " ".join(words)


def holds_texts(raw: Path) -> bool:
    """Returns whether there is a plain text file below `raw`."""
    return any(path.suffix.lower() == ".txt" for path in walk_files(raw))


def _wrap_long_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yields the lines, the long ones cut at spaces: some corpora are a single line."""
    for line in lines:
        if len(line) <= MAX_TEXT_CHARS:
            yield line
            continue
        pieces = wrap(line, MAX_TEXT_CHARS, break_long_words=False, break_on_hyphens=False)
        yield from pieces or [""]  # a blank line stays one
