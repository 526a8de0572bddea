"""Packing keeps the tokens of a document in order, in records that are full but never too long."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3.data.text import packing
from beit3.data.text.packing import (
    CLOSING_MARKS,
    MAX_WORD_LENGTH,
    MIN_FILL,
    NUM_SPECIAL_TOKENS,
    SENTENCE_END,
    Packer,
    read_blocks,
)
from beit3.tokenizer.text import TextTokenizer

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "text_corpus"
DOCUMENTS = sorted((Path(__file__).resolve().parents[3] / "docs").glob("*.md"))
BOOKS = (
    "blake-poems.txt",
    "burgess-busterbrown.txt",
    "milton-paradise.txt",
    "shakespeare-hamlet.txt",
)
KINDS = ("unigram", "bpe")

# Letters that normalization widens, joins or removes, ends of sentences, words of any length.
LONG = st.builds(str.__mul__, st.sampled_from("ab語x-"), st.integers(1, 60))
WORD = LONG | st.text('abé.!?"”語´\u0301\u200b\u00adﷺ①', min_size=1, max_size=8)
LINES = st.lists(
    st.lists(WORD, max_size=8).map("  ".join).map(lambda line: line + "\n"), max_size=8
).map("".join)


def encode_letters(text: str) -> list[int]:
    """Returns one token per letter, so that tokens can be counted by hand."""
    return [ord(letter) for letter in text]


def pack(
    text: str, encode: Callable[[str], list[int]], max_tokens: int, typecode: str = "H"
) -> list[list[int]]:
    """Returns the ids of each record."""
    records = Packer(encode, max_tokens + NUM_SPECIAL_TOKENS, typecode=typecode).pack(
        io.StringIO(text, newline=None)
    )
    return [
        np.frombuffer(ids, {"H": np.uint16, "I": np.uint32}[typecode]).tolist() for ids in records
    ]


def pack_letters(text: str, max_tokens: int) -> list[str]:
    """Returns the letters of each record."""
    return ["".join(map(chr, ids)) for ids in pack(text, encode_letters, max_tokens)]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> TextTokenizer:
    """Returns a tokenizer trained on the documents of this project, which are always available."""
    texts = [line for path in DOCUMENTS for line in path.read_text().splitlines()]
    return TextTokenizer.train(texts, vocab_size=800, model_type=request.param)


@pytest.fixture(scope="module", params=KINDS)
def book_tokenizer(request) -> TextTokenizer:
    """Returns a tokenizer trained on verse, prose and a play."""
    if not DATA.exists():
        pytest.skip(f"real sample not available: {DATA}")
    texts = [
        line
        for name in BOOKS
        for line in (DATA / "gutenberg" / name).read_text().splitlines()[:1500]
    ]
    return TextTokenizer.train(texts, vocab_size=3000, model_type=request.param)


# Real texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [16, 64, 512])
def test_real_books_lose_nothing_and_fill_their_records(book_tokenizer, limit):
    inner = []
    for name in BOOKS:
        text = (DATA / "gutenberg" / name).read_text()
        records = pack(text, book_tokenizer.encode_pieces, limit - NUM_SPECIAL_TOKENS)
        words = " ".join(text.split())
        assert [id for ids in records for id in ids] == [
            id for line in text.splitlines() for id in book_tokenizer.encode_pieces(line)
        ]
        assert " ".join(
            book_tokenizer.decode(ids) for ids in records
        ) == words or book_tokenizer.unk in {id for ids in records for id in ids}
        sizes = [len(ids) + NUM_SPECIAL_TOKENS for ids in records]
        assert max(sizes) <= limit
        inner += sizes[:-1]
    assert sum(inner) / len(inner) >= 0.95 * limit
    assert min(inner) >= 0.9 * (limit - 2) - 10, (
        "at most the tokens of a word that does not fit stay empty"
    )


def test_records_end_with_sentences_where_they_can(book_tokenizer):
    """In prose of short sentences, most records end with one."""
    records = pack(
        (DATA / "gutenberg" / "burgess-busterbrown.txt").read_text(),
        book_tokenizer.encode_pieces,
        510,
    )
    assert sum(
        bool(re.search(r"[.!?][\"')\]]*$", book_tokenizer.decode(ids))) for ids in records
    ) >= 0.75 * len(records)


# Any text -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=LINES, max_tokens=st.integers(1, 200))
def test_tokens_of_any_text_keep_their_order(tokenizer, text, max_tokens):
    """The tokens equal those of its words and of its lines."""
    records = pack(text, tokenizer.encode_pieces, max_tokens)
    assert all(0 < len(ids) <= max_tokens for ids in records)
    assert [id for ids in records for id in ids] == [
        id for word in text.split() for id in tokenizer.encode_pieces(word)
    ]
    assert [id for ids in records for id in ids] == [
        id for line in text.splitlines() for id in tokenizer.encode_pieces(line)
    ]


def pack_slowly(text: str, max_tokens: int) -> list[str]:
    """Packs by the rule as it is written, trying every number of words that could follow."""
    words, starts, new = [], [], True
    for line in text.split("\n"):
        new = new or not line.strip()
        for word in line.split():
            while len(word) > max_tokens:  # fills records of its own
                words, starts, new, word = (
                    [*words, word[:max_tokens]],
                    [*starts, new],
                    False,
                    word[max_tokens:],
                )
            words.append(word)
            starts.append(new)
            new = word.rstrip(CLOSING_MARKS)[-1:] in SENTENCE_END
    texts = []
    while words:
        fitting = [n for n in range(1, len(words) + 1) if sum(map(len, words[:n])) <= max_tokens]
        count = fitting[-1]
        if count < len(words):
            count = max(
                (
                    n
                    for n in fitting
                    if starts[n] and sum(map(len, words[:n])) >= MIN_FILL * max_tokens
                ),
                default=count,
            )
        texts.append("".join(words[:count]))
        words, starts = words[count:], starts[count:]
    return texts


LETTERS = st.lists(
    st.lists(st.text("a.)", min_size=1, max_size=5) | st.just("a" * 40), max_size=6).map(" ".join),
    max_size=10,
)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS.map("\n".join), max_tokens=st.integers(5, 30))
def test_packing_equals_a_slow_second_implementation(text, max_tokens):
    assert pack_letters(text, max_tokens) == pack_slowly(text, max_tokens)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("aaa.  \n", max_size=60), max_tokens=st.integers(3, 12), block=st.integers(1, 20)
)
def test_the_length_of_blocks_changes_no_record(text, max_tokens, block):
    """Only words longer than a block would be cut at its end; these are removed."""
    text = re.sub(rf"\S{{{block},}}", "b", text)
    with patch.object(packing, "BLOCK_LENGTH", block):
        assert " ".join(read_blocks(io.StringIO(text))).split() == text.split()
        assert pack_letters(text, max_tokens) == pack_slowly(text, max_tokens)


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (["aaa bbb ccc ddd eee"], ["aaabbbccc", "dddeee"]),
        (["aaa bbb cc. ddd eee"], ["aaabbbcc.", "dddeee"]),
        (["aaa bbb cccc. dd eee"], ["aaabbb", "cccc.ddeee"]),
        (
            ["aaaa bbbb. c ddd"],
            ["aaaabbbb.", "cddd"],
        ),  # nine of ten tokens: the sentence ends the record
        (["aaaa bbb. cc ddd"], ["aaaabbb.cc", "ddd"]),  # eight: it does not
        (
            ["aaaa bbb.\u201d c ddd"],
            ["aaaabbb.\u201d", "cddd"],
        ),  # also after a closing quote
        (
            ["aaaa bbbbb", "", "c ddd"],
            ["aaaabbbbb", "cddd"],
        ),  # so does a paragraph without a period
        (["aaaa bbbbb\r", " \t\r", "c ddd"], ["aaaabbbbb", "cddd"]),
        (["aaaa bbbbb", "c ddd"], ["aaaabbbbbc", "ddd"]),  # but not a line
        (["aaaa bbbb. c"], ["aaaabbbb.c"]),  # a text that fits is not cut
        (["aa bbbbbbbbbbbbbbb cc"], ["aa", "bbbbbbbbbb", "bbbbbcc"]),
        (["", "  \t ", "\n"], []),
        ([], []),
    ],
)
def test_records_of_ten_letters_worked_by_hand(lines, texts):
    assert pack_letters("\n".join(lines), 10) == texts


# Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "a" * 50_000,
        "語" * 50_000,
        "https://example.org/" + "x7" * 24_990,
        "ab" * 10_000 + "ﷺ" * 1000,
    ],
)
@pytest.mark.parametrize("max_tokens", [18, 510])
def test_a_huge_word_is_cut_between_its_tokens(tokenizer, word, max_tokens):
    parts = [word[at : at + MAX_WORD_LENGTH] for at in range(0, len(word), MAX_WORD_LENGTH)]
    records = pack(f"one {word} two", tokenizer.encode_pieces, max_tokens)
    expected = [id for part in ("one", *parts, "two") for id in tokenizer.encode_pieces(part)]
    assert [id for ids in records for id in ids] == expected
    assert all(len(ids) == max_tokens for ids in records[1:-2]), "its records are full"


def test_a_text_without_a_space_is_read_in_blocks():
    with patch.object(packing, "BLOCK_LENGTH", 8):
        assert [*read_blocks(io.StringIO("x" * 20))] == ["x" * 8, "x" * 8, "x" * 4]
        spaces = [*read_blocks(io.StringIO(" " * 30 + "\n" * 30 + "x"))]
        assert spaces[-1].endswith("\n\nx") and max(map(len, spaces)) < 16, (
            "whitespace does not accumulate"
        )


def test_few_and_short_words_are_cached():
    encoded = []

    def encode(word: str) -> list[int]:
        encoded.append(word)
        return [len(word)]

    with (
        patch.object(packing, "MAX_CACHED_WORDS", 2),
        patch.object(packing, "MAX_CACHED_LETTERS", 3),
    ):
        assert pack("a b a b longer longer a c a c", encode, 100) == [
            [1, 1, 1, 1, 6, 6, 1, 1, 1, 1]
        ]
    assert encoded == ["a", "b", "longer", "longer", "c", "a"]


def test_ids_beyond_16_bits_need_another_typecode():
    assert pack("a b c", lambda word: [70_000 + ord(word)], 2, "I") == [[70_097, 70_098], [70_099]]
    with pytest.raises(OverflowError):
        pack("a", lambda word: [70_000], 2)


@pytest.mark.parametrize("length", [-1, 1, 2])
def test_lengths_without_room_are_refused(length):
    with pytest.raises(ValueError, match=f"pack {length} leaves no room .* use 512"):
        Packer(encode_letters, length)
