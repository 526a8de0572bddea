"""Text files -> records of full length: the words of a document in their order, as many as fit.

A record never mixes two documents (files), and a document never loses or repeats a word. Lengths are tokens of the text
tokenizer that the records are written for, begin and end marks included.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.formats.files import folder, lines, walk

MARKS = 2
"""Tokens around every text: its begin and its end."""

FULL = 0.9
"""A record ends with a sentence that ends beyond this share of its room, else between any two words.

Ending with whole sentences alone left 5 to 13 % of 512 tokens empty in novels and verse, 20 % of 64.
"""
LONGEST_PIECE = 16
"""Characters of a piece by SentencePiece's default; a longer part of a word is not sought, so that a book without spaces takes no hours."""

SENTENCE_END, CLOSING = (".", "!", "?", "…"), "\"'”’»)]"


class Word(NamedTuple):
    text: str
    size: int
    """Pieces of the word alone; the whole room for a part whose word goes on in the next record."""
    starts: bool
    """Whether a sentence or paragraph starts here."""


def packed_files(raw: str | Path, pieces: Callable[[str], list[int]], length: int) -> Iterator[dict[str, Any]]:
    """The .txt files below `raw` as records {id: "file:number", text} of at most `length` tokens.

    `pieces`: a text's ids without marks. ValueError for a length that holds no text, and for files that are not UTF-8.
    """
    if length <= MARKS:
        raise ValueError(f"pack {length} leaves no room between begin and end mark: use 512, or 0 for one record a paragraph")
    raw = folder(raw)
    for path in walk(raw):
        if path.suffix.lower() == ".txt":
            for number, text in enumerate(pack(lines(path), pieces, length - MARKS), 1):
                yield {"id": f"{path.relative_to(raw).as_posix()}:{number}", "text": text}


def pack(lines: Iterable[str], pieces: Callable[[str], list[int]], room: int) -> Iterator[str]:
    """The words of `lines` in order, joined by spaces into texts of at most `room` pieces."""
    waiting: list[Word] = []
    size = 0
    for word in words(lines, pieces, room):
        waiting.append(word)
        size += word.size
        while size > room:
            yield _take(waiting, _cut(waiting, room), pieces, room)
            size = sum(each.size for each in waiting)
    while waiting:
        yield _take(waiting, len(waiting), pieces, room)


def words(lines: Iterable[str], pieces: Callable[[str], list[int]], room: int) -> Iterator[Word]:
    """The words of `lines` that have pieces, those beyond `room` of them (a coded file, a URL) in parts.

    ValueError for a character that alone does not fit.
    """
    count = lru_cache(maxsize=1 << 14)(lambda text: len(pieces(text)))  # words recur: half the time
    starts = True
    for line in lines:
        found = line.split()
        starts = starts or not found
        for text in found:
            for part, size in _parts(text, count, room):
                yield Word(part, size, starts)
                starts = False
            starts = starts or text.rstrip(CLOSING).endswith(SENTENCE_END)


def _parts(word: str, count: Callable[[str], int], room: int) -> Iterator[tuple[str, int]]:
    """A word and its pieces' number, cut by characters where it must be.

    Each part is the longest that fits, and all but the last count as a full record, so that no space comes into the word.
    """
    longest = room * LONGEST_PIECE
    while len(word) > longest or (size := count(word)) > room:
        length = bisect_right(range(1, min(len(word), longest) + 1), room, key=lambda end: count(word[:end]))
        if not length:
            raise ValueError(f"pack {room + MARKS} is too short for {word[0]!r}, which has {count(word[0])} tokens: use 512")
        yield word[:length], room
        word = word[length:]
    if size:
        yield word, size


def _cut(waiting: list[Word], room: int) -> int:
    """How many of the words that wait, the last of which does not fit, make the next record."""
    size = sum(word.size for word in waiting[:-1])
    for count in range(len(waiting) - 1, 0, -1):
        if size < FULL * room:
            break
        if waiting[count].starts:
            return count
        size -= waiting[count - 1].size
    return len(waiting) - 1


def _take(waiting: list[Word], count: int, pieces: Callable[[str], list[int]], room: int) -> str:
    """The first `count` words leave `waiting` as one text; fewer where together they have more pieces than one by one."""
    while len(pieces(text := " ".join(word.text for word in waiting[:count]))) > room:
        count -= 1
    del waiting[:count]
    return text
