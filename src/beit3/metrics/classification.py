"""Accuracies of answers and classes, each a fraction from 0 to 1 over all records."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from beit3.metrics.text import normalize_answer

T = TypeVar("T")


def compute_accuracy(correct: Sequence[bool]) -> float:
    """Returns the fraction of records that are predicted correctly."""
    assert len(correct) > 0
    return sum(map(bool, correct)) / len(correct)


def compute_top_k_accuracy(candidates: Sequence[Sequence[T]], labels: Sequence[T], k: int) -> float:
    """Returns the fraction of records whose label is among their first `k` candidates.

    `candidates` holds the predicted classes of each record, best first.
    """
    assert k > 0 and len(candidates) == len(labels) > 0, (k, len(candidates), len(labels))
    return compute_accuracy(
        [label in ranked[:k] for ranked, label in zip(candidates, labels, strict=True)]
    )


def compute_consistency(correct: Sequence[bool], groups: Sequence[str]) -> float:
    """Returns the fraction of groups whose records are all predicted correctly.

    `groups` names the group of each record; NLVR2 groups the image pairs of one sentence.
    """
    assert len(correct) == len(groups) > 0, (len(correct), len(groups))
    group_correct = dict.fromkeys(groups, True)
    for is_correct, group in zip(correct, groups, strict=True):
        group_correct[group] &= bool(is_correct)
    return compute_accuracy(list(group_correct.values()))


def compute_vqa_accuracy(answers: Sequence[str], scores: Sequence[Mapping[str, float]]) -> float:
    """Returns the mean soft score of the predicted answers.

    `scores[i]` maps the accepted answers of question i to their scores.
    """
    assert len(answers) == len(scores) > 0, (len(answers), len(scores))
    total = sum(accepted.get(answer, 0.0) for answer, accepted in zip(answers, scores, strict=True))
    return total / len(scores)


def score_vqa_answer(answer: str, annotators: Sequence[str]) -> float:
    """Scores one answer by the official VQA evaluation (GT-Vision-Lab/VQA), from 0 to 1.

    The score is min(1, matching answers / 3) among all annotators but one, averaged over the
    annotator that is left out. Answers are normalized only where the annotators differ: if all
    said "two", then "2" scores 0, and so does "Two".

    Args:
        answer: The predicted answer.
        annotators: The answer of each annotator, usually ten.

    Raises:
        ValueError: If there are no annotators.
    """
    if not annotators:
        raise ValueError(
            "a question has no annotators' answers: the official score needs the answers of all "
            "ten annotators, which the raw annotation file holds"
        )
    answer, *human_answers = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *annotators)
    )
    if len(set(human_answers)) > 1:
        answer, *human_answers = map(normalize_answer, (answer, *human_answers))
    num_matching = human_answers.count(answer)
    num_different = len(human_answers) - num_matching
    # An annotator with the same answer, when left out, leaves one match fewer.
    score_without_match = min(1.0, (num_matching - 1) / 3)
    score_without_other = min(1.0, num_matching / 3)
    total = num_matching * score_without_match + num_different * score_without_other
    return total / len(human_answers)
