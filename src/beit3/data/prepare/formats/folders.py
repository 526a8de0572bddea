"""Folders of images and of texts -> records {id, image}, whose splits `files.split` gives, and
pairs of {id, text}."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import wrap

from beit3.data.prepare.formats.corpora import Corpus, Fault
from beit3.data.prepare.formats.files import Pair, Record, folder, walk

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Characters of a text record: about 512 tokens, the longest text of pretraining.
LONGEST_TEXT = 2000


def image_folder(raw: str | Path) -> Iterator[Record]:
    """Every image below `raw`, in sorted order: {id: its path below `raw`, image}."""
    raw = folder(raw)
    for path in walk(raw):
        if path.suffix.lower() in IMAGES:
            yield {"id": path.relative_to(raw).as_posix(), "image": str(path)}


def text_files(raw: str | Path, *, field: str = "text") -> Iterator[Pair]:
    """The paragraphs (between blank lines, cut where long) of the corpora below `raw`: {id:
    "file:number", text}.

    A document that cannot be read is {id, fault}.
    """
    corpus = Corpus.open(raw, field)
    for span in corpus.spans:
        number = 0
        for document in corpus.documents(span):
            if isinstance(document, Fault):
                yield span.split, {"id": document.place, "fault": document.why}
                continue
            for text in paragraphs(document):
                number += 1
                split, id = corpus.named(span, number)
                yield split, {"id": id, "text": text}


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs as single lines of single-spaced words; long ones are cut at the last line end
    within LONGEST_TEXT.

    Some books of the Gutenberg selections have no blank line at all: each would be one record of a
    million characters.
    """
    words: list[str] = []
    size = 0
    for line in _short_lines(lines):
        if words and (not line.strip() or size + len(line) > LONGEST_TEXT):
            yield " ".join(words)
            words, size = [], 0
        words += line.split()
        size += len(line)
    if words:
        yield " ".join(words)


def holds_images(raw: Path) -> bool:
    """Whether there is an image below `raw`."""
    return any(path.suffix.lower() in IMAGES for path in walk(raw))


def holds_texts(raw: Path) -> bool:
    """Whether there is a plain text file below `raw`."""
    return any(path.suffix.lower() == ".txt" for path in walk(raw))


def _short_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines, those beyond LONGEST_TEXT cut at spaces: some corpora are one line."""
    for line in lines:
        if len(line) <= LONGEST_TEXT:
            yield line
        else:
            yield from wrap(line, LONGEST_TEXT, break_long_words=False, break_on_hyphens=False) or [
                ""
            ]
