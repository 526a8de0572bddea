"""Normalization of VQA answers and soft scores, by hand-worked cases."""

import pytest

from beit3.metrics.text import APOSTROPHES, compute_soft_scores, normalize_answer

CASES = {
    "Yes": "yes",
    "yes.": "yes",
    "The Two  dogs.": "2 dogs",
    "a an the": "",
    "": "",
    "none": "0",
    "ten": "10",
    "eleven": "eleven",
    " on\tthe\nleft ": "on left",
    # Punctuation inside a word becomes a space, unless the same character is beside a space
    # anywhere in the text.
    "black/white": "black white",
    "black / white": "black white",
    "t-shirt": "t shirt",
    "t-shirt - red": "tshirt red",
    "what?": "what",
    "red, white": "red white",
    "red,white": "red white",
    # A comma between digits removes all punctuation instead of turning it into spaces.
    "1,000": "1000",
    "1,000/2": "10002",
    "3.5": "3.5",
    "p.m.": "pm",
    "5.": "5",
    "$5.00": "$5.00",
    "12:30": "12:30",
    "it's": "it's",
    "dont": "don't",
    "Dont know": "don't know",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "ow's'at": "'ow's'at",
    "yalld've": "yalld've",
    "y'alld've": "y'all'd've",
    "somebody'd": "somebodyd",
    "hell": "hell",
    "shed": "shed",
    "wed": "wed",
    "its": "its",
    "im": "im",
}


@pytest.mark.parametrize("text, expected", CASES.items())
def test_answers_are_normalized(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize("text", CASES)
def test_normalizing_twice_changes_nothing(text):
    if text != "somebody'd":
        assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_misspelled_contractions_differ_in_apostrophes_alone():
    for misspelled, word in APOSTROPHES.items():
        assert misspelled != word
        assert misspelled.replace("'", "") == word.replace("'", "")
    assert len(APOSTROPHES) == 114


def test_soft_scores_count_raw_answers():
    answers = ["net"] * 5 + ["netting"] * 2 + ["Net", "mesh", "mesh", "mesh"]
    assert compute_soft_scores(answers) == {"net": 1.0, "netting": 0.6, "Net": 0.3, "mesh": 0.9}
    assert compute_soft_scores(["four"] * 4) == {"four": 1.0}
    assert compute_soft_scores([]) == {}
