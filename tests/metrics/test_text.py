"""Answer normalisation and soft scores, by hand-worked cases."""

import pytest

from beit3.metrics.text import APOSTROPHES, normalize_answer, soft_scores

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
    # A mark inside a word becomes a space, unless the text has the same mark beside a space anywhere.
    "black/white": "black white",
    "black / white": "black white",
    "t-shirt": "t shirt",
    "t-shirt - red": "tshirt red",
    "what?": "what",
    "red, white": "red white",
    "red,white": "red white",
    # A comma between digits removes every mark instead of spacing it.
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
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize("text", CASES)
def test_normalising_twice_changes_nothing(text):
    if text != "somebody'd":
        assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_apostrophes():
    assert all(wrong != right for wrong, right in APOSTROPHES.items())
    assert all(
        wrong.replace("'", "") == right.replace("'", "") for wrong, right in APOSTROPHES.items()
    )
    assert len(APOSTROPHES) == 114


def test_soft_scores():
    answers = ["net"] * 5 + ["netting"] * 2 + ["Net", "mesh", "mesh", "mesh"]
    assert soft_scores(answers) == {"net": 1.0, "netting": 0.6, "Net": 0.3, "mesh": 0.9}
    assert soft_scores(["four"] * 4) == {"four": 1.0}
    assert soft_scores([]) == {}
