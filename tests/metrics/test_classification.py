"""Accuracies by hand-worked cases; the official VQA score against a leave-one-out reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.metrics.classification import (
    compute_accuracy,
    compute_consistency,
    compute_top_k_accuracy,
    compute_vqa_accuracy,
    score_vqa_answer,
)
from beit3.metrics.text import normalize_answer
from tests.reference import metrics_classification as reference


def test_vqa_accuracy_is_the_mean_soft_score():
    scores = [{"net": 1.0, "mesh": 0.3}, {"2": 0.6}, {}, {"no": 0.9}]
    answers = ["mesh", "3", "yes", "no"]
    assert compute_vqa_accuracy(answers, scores) == pytest.approx((0.3 + 0 + 0 + 0.9) / 4)
    assert compute_vqa_accuracy(["net"], scores[:1]) == 1.0
    for answers, truth in (([], []), (["net"], scores)):
        with pytest.raises(AssertionError):
            compute_vqa_accuracy(answers, truth)


@pytest.mark.parametrize(
    "answer, annotators, score",
    [
        ("net", ["net"] * 10, 1.0),
        ("net", ["mesh"] * 10, 0.0),
        # Three annotators match: leaving one of them out leaves two, any of the other seven three.
        ("net", ["net"] * 3 + ["mesh"] * 7, (3 * 2 / 3 + 7) / 10),
        ("net", ["net"] * 4 + ["mesh"] * 6, 1.0),
        ("net", ["net"] + ["mesh"] * 9, 9 * (1 / 3) / 10),
        # Both sides are normalized where the annotators differ ...
        ("The Net.", ["net", "a net", "Net", "nets", *["mesh"] * 6], (3 * 2 / 3 + 7) / 10),
        ("2", ["two"] * 9 + ["three"], 1.0),
        # ... and not where they agree.
        ("2", ["two"] * 10, 0.0),
        ("two", ["two"] * 10, 1.0),
        ("Two", ["two"] * 10, 0.0),
        # Spaces and line ends around an answer never count.
        (" two\n", ["two", "two\t", *["two"] * 8], 1.0),
        ("yes", ["yes"], 0.0),
    ],
)
def test_vqa_answers_are_scored_officially(answer, annotators, score):
    assert score_vqa_answer(answer, annotators) == pytest.approx(score, abs=1e-12)


answers = st.sampled_from(["two", "2", "Two", "the 2", "2.", "don't", "dont", "(a)", "", "é"])


@given(answers, st.lists(answers, min_size=1, max_size=10))
def test_official_vqa_score_equals_leaving_one_annotator_out(answer, annotators):
    expected = reference.score_vqa_answer(answer, annotators, normalize_answer)
    assert score_vqa_answer(answer, annotators) == pytest.approx(expected, abs=1e-12)


def test_official_vqa_score_needs_annotators():
    with pytest.raises(ValueError, match="no annotators' answers"):
        score_vqa_answer("net", [])


def test_top_k_accuracy_counts_the_first_candidates():
    candidates = [[3, 1, 2], [1, 2, 3], [2, 1, 3], [5]]
    labels = [3, 3, 1, 1]
    scores = [compute_top_k_accuracy(candidates, labels, k) for k in (1, 2, 3, 9)]
    assert scores == [0.25, 0.5, 0.75, 0.75]
    assert compute_top_k_accuracy([["cat", "dog"]], ["dog"], 2) == 1.0
    for arguments in ((candidates, labels, 0), (candidates, labels[:2], 1), ([], [], 1)):
        with pytest.raises(AssertionError):
            compute_top_k_accuracy(*arguments)


def test_consistency_needs_all_records_of_a_group():
    correct = [True, True, True, False, True, False]
    groups = ["a", "a", "b", "b", "c", "d"]
    assert compute_accuracy(correct) == pytest.approx(4 / 6)
    assert compute_consistency(correct, groups) == 0.5
    # One wrong record fails its group, wherever it is in the list.
    assert compute_consistency([False, True, True], ["a", "b", "a"]) == 0.5
    for arguments in (([], []), ([True], [])):
        with pytest.raises(AssertionError):
            compute_consistency(*arguments)
