"""Documents -> records of full length: the pieces of a document's words in their order, as many as fit.

A record never mixes two documents, and a document never loses or repeats a piece. Shapes: a text file, or a
string opened as one -> the ids of each record as bytes of unsigned integers, begin and end marks not among them.
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TextIO

MARKS = 2
"""Tokens around every text: its begin and its end."""

FULL = 0.9
"""A record ends with a sentence that ends beyond this share of its room, else between any two words.

Ending with whole sentences alone left 5 to 13 % of 512 tokens empty in novels and verse, 20 % of 64.
"""
SENTENCE_END, CLOSING = (".", "!", "?", "…"), "\"'”’»)]"
BLANK_LINE = re.compile(r"\n\s*\n")

BLOCK = 1 << 20
"""Characters of a document that are read at once; in memory are those and one record."""
LONGEST_WORD = 1 << 13
"""Characters that are tokenized at once; of a longer word (a coded file, a book without spaces) each so many are a word."""

KEPT_LETTERS, KEPT_WORDS = 32, 1 << 18
"""Words whose ids are remembered: at most so long and so many, which is about 50 MB.

Words recur: of 1.5 million in 9 MB of books 65,000 are different.
"""


class Packer:
    """Cuts documents into records of at most `length` tokens, marks included. ValueError for a length without room for text.

    pieces: a word's ids without marks. typecode: "H" for ids below 65536, "I" for larger ones, as in `array`.
    """

    def __init__(
        self, pieces: Callable[[str], list[int]], length: int, *, typecode: str = "H"
    ) -> None:
        if length <= MARKS:
            raise ValueError(
                f"pack {length} leaves no room between begin and end mark: use 512, or 0 for one record a paragraph"
            )
        self.ids_of = _WordIds(pieces, typecode)
        self.room = (length - MARKS) * array(typecode).itemsize  # in bytes, as all sizes here

    def records(self, document: TextIO) -> Iterator[bytes]:
        """The ids of each record of `document`; none where nothing in it is visible."""
        waiting = _Words([], [], set())
        for block in blocks(document):
            self._add(waiting, block)
            done = 0
            for end in self._ends(waiting):
                yield b"".join(waiting.ids[done:end])
                done = end
            waiting = waiting.behind(done)
        if rest := b"".join(waiting.ids):
            yield rest

    def _add(self, waiting: "_Words", block: str) -> None:
        """The words of `block` join those that wait, those beyond `room` in parts, which are words without letters but for the last."""
        first, *others = BLANK_LINE.split(block)
        words, paragraphs = first.split(), set()
        for paragraph in others:
            paragraphs.add(len(words))
            words += paragraph.split()
        ids = [*map(self.ids_of.__getitem__, words)]
        if max(map(len, ids), default=0) <= self.room:
            waiting.paragraphs |= {len(waiting.texts) + place for place in paragraphs}
            waiting.texts += words
            waiting.ids += ids
            return
        for place, (word, found) in enumerate(zip(words, ids, strict=True)):
            parts = [found[at : at + self.room] for at in range(0, len(found), self.room)]
            waiting.paragraphs |= {len(waiting.texts)} if place in paragraphs else set()
            waiting.texts += ["" for _ in parts[1:]] + [word for _ in parts[:1]]
            waiting.ids += parts

    def _ends(self, waiting: "_Words") -> Iterator[int]:
        """How many words end each record that cannot grow: up to a sentence's end beyond FULL, else all that fit."""
        sizes = [*accumulate(map(len, waiting.ids))]
        first = before = 0
        while sizes and sizes[-1] - before > self.room:
            fit = bisect_right(sizes, before + self.room, lo=first)
            least = bisect_left(sizes, before + FULL * self.room, lo=first, hi=fit)
            first = next((end for end in range(fit, least, -1) if waiting.starts(end)), fit)
            before = sizes[first - 1]
            yield first


class _Words:
    """Words that wait for their record: letters, ids, and where a paragraph begins."""

    def __init__(self, texts: list[str], ids: list[bytes], paragraphs: set[int]) -> None:
        self.texts, self.ids, self.paragraphs = texts, ids, paragraphs

    def starts(self, place: int) -> bool:
        """Whether a sentence or paragraph starts with the word at `place`, which is not the first."""
        return place in self.paragraphs or self.texts[place - 1].rstrip(CLOSING).endswith(
            SENTENCE_END
        )

    def behind(self, done: int) -> "_Words":
        """Without the first `done` words."""
        return _Words(
            self.texts[done:],
            self.ids[done:],
            {place - done for place in self.paragraphs if place > done},
        )


class _WordIds(dict[str, bytes]):
    """Word -> its ids as bytes, asked for once while it is remembered."""

    def __init__(self, pieces: Callable[[str], list[int]], typecode: str) -> None:
        super().__init__()
        self.pieces, self.typecode = pieces, typecode

    def __missing__(self, word: str) -> bytes:
        parts = (word[at : at + LONGEST_WORD] for at in range(0, len(word), LONGEST_WORD))
        ids = array(self.typecode, [id for part in parts for id in self.pieces(part)]).tobytes()
        if len(word) <= KEPT_LETTERS:
            if len(self) == KEPT_WORDS:
                self.clear()
            self[word] = ids
        return ids


def blocks(document: TextIO) -> Iterator[str]:
    """The text in blocks of about BLOCK characters, cut between words, or within one that is longer; blank lines are in front."""
    waiting = ""
    while text := document.read(BLOCK):
        waiting += text
        if len(text) < BLOCK:
            break
        parts = waiting.rsplit(maxsplit=1)
        whole = (
            waiting[-1].isspace() or len(waiting.strip()) >= BLOCK
        )  # counts where there is one word, or none
        head = parts[0] if len(parts) == 2 else waiting.rstrip() if whole else ""
        yield head
        words = waiting[len(head) :].lstrip()
        waiting = "\n" * min(2, waiting.count("\n", len(head), len(waiting) - len(words))) + words
    yield waiting
