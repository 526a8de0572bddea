"""Answers and classes, by hand-worked cases; the official VQA score against leaving annotators out one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.metrics.classification import (
    accuracy,
    consistency,
    top_k_accuracy,
    vqa_accuracy,
    vqa_official,
)
from beit3.metrics.text import normalize_answer
from tests.reference import metrics_classification as slow


def test_vqa_accuracy():
    scores = [{"net": 1.0, "mesh": 0.3}, {"2": 0.6}, {}, {"no": 0.9}]
    assert vqa_accuracy(["mesh", "3", "yes", "no"], scores) == pytest.approx(
        (0.3 + 0 + 0 + 0.9) / 4
    )
    assert vqa_accuracy(["net"], scores[:1]) == 1.0
    for predictions, truths in (([], []), (["net"], scores)):
        with pytest.raises(AssertionError):
            vqa_accuracy(predictions, truths)


@pytest.mark.parametrize(
    "answer, annotators, score",
    [
        ("net", ["net"] * 10, 1.0),
        ("net", ["mesh"] * 10, 0.0),
        # Three who agree: to each of them two others do, to the other seven three.
        ("net", ["net"] * 3 + ["mesh"] * 7, (3 * 2 / 3 + 7) / 10),
        ("net", ["net"] * 4 + ["mesh"] * 6, 1.0),
        ("net", ["net"] + ["mesh"] * 9, 9 * (1 / 3) / 10),
        # Normalised where they differ, on both sides ...
        ("The Net.", ["net", "a net", "Net", "nets", *["mesh"] * 6], (3 * 2 / 3 + 7) / 10),
        ("2", ["two"] * 9 + ["three"], 1.0),
        # ... and not where they agree.
        ("2", ["two"] * 10, 0.0),
        ("two", ["two"] * 10, 1.0),
        ("Two", ["two"] * 10, 0.0),
        # Spaces and line ends about an answer never count.
        (" two\n", ["two", "two\t", *["two"] * 8], 1.0),
        ("yes", ["yes"], 0.0),
    ],
)
def test_vqa_official(answer, annotators, score):
    assert vqa_official(answer, annotators) == pytest.approx(score, abs=1e-12)


words = st.sampled_from(["two", "2", "Two", "the 2", "2.", "don't", "dont", "(a)", "", "é"])


@given(words, st.lists(words, min_size=1, max_size=10))
def test_vqa_official_equals_leaving_one_out(answer, annotators):
    assert vqa_official(answer, annotators) == pytest.approx(
        slow.vqa_official(answer, annotators, normalize_answer), abs=1e-12
    )


def test_vqa_official_needs_annotators():
    with pytest.raises(ValueError, match="no annotators' answers"):
        vqa_official("net", [])


def test_top_k_accuracy():
    ranked = [[3, 1, 2], [1, 2, 3], [2, 1, 3], [5]]
    truth = [3, 3, 1, 1]
    assert [top_k_accuracy(ranked, truth, k) for k in (1, 2, 3, 9)] == [0.25, 0.5, 0.75, 0.75]
    assert top_k_accuracy([["cat", "dog"]], ["dog"], 2) == 1.0
    for arguments in ((ranked, truth, 0), (ranked, truth[:2], 1), ([], [], 1)):
        with pytest.raises(AssertionError):
            top_k_accuracy(*arguments)


def test_accuracy_and_consistency():
    correct = [True, True, True, False, True, False]
    groups = ["a", "a", "b", "b", "c", "d"]
    assert accuracy(correct) == pytest.approx(4 / 6)
    assert consistency(correct, groups) == 0.5
    # One wrong record spoils its group wherever it stands.
    assert consistency([False, True, True], ["a", "b", "a"]) == 0.5
    for arguments in (([], []), ([True], [])):
        with pytest.raises(AssertionError):
            consistency(*arguments)
