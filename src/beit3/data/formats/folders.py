"""Folders of images and of text files -> records {id, image} and {id, text}; their splits are given by `files.split`."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

from beit3.data.formats.files import Record, folder, lines, walk

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Characters of a text record: about 512 tokens, the longest text of pretraining.
LONGEST_TEXT = 2000


def image_folder(raw: str | Path) -> Iterator[Record]:
    """Every image below `raw`, in sorted order: {id: its path below `raw`, image}."""
    raw = folder(raw)
    for path in walk(raw):
        if path.suffix.lower() in IMAGES:
            yield {"id": path.relative_to(raw).as_posix(), "image": str(path)}


def text_files(raw: str | Path) -> Iterator[Record]:
    """The paragraphs (between blank lines, cut where long) of the .txt files below `raw`: {id: "file:number", text}."""
    raw = folder(raw)
    for path in walk(raw):
        if path.suffix.lower() != ".txt":
            continue
        for number, text in enumerate(paragraphs(path), 1):
            yield {"id": f"{path.relative_to(raw).as_posix()}:{number}", "text": text}


def paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs as single lines of single-spaced words; long ones are cut at the last line end within LONGEST_TEXT.

    Some books of the Gutenberg selections have no blank line at all: each would be one record of a million characters.
    """
    words: list[str] = []
    size = 0
    for line in _short_lines(path):
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
    """Whether there is a text file below `raw`."""
    return any(path.suffix.lower() == ".txt" for path in walk(raw))


def _short_lines(path: Path) -> Iterator[str]:
    """Lines, those beyond LONGEST_TEXT cut at spaces: some corpora are one line."""
    for line in lines(path):
        if len(line) <= LONGEST_TEXT:
            yield line
        else:
            yield from wrap(line, LONGEST_TEXT, break_long_words=False, break_on_hyphens=False) or [""]
