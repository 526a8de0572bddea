"""Scores of answers and classes. Shapes: what was predicted and what is true, one entry per record -> 0 to 1."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from beit3.metrics.text import normalize_answer

T = TypeVar("T")


def accuracy(correct: Sequence[bool]) -> float:
    """Share of the records that are right, 0 to 1."""
    assert len(correct) > 0
    return sum(map(bool, correct)) / len(correct)


def top_k_accuracy(ranked: Sequence[Sequence[T]], truth: Sequence[T], k: int) -> float:
    """Share of the records whose true class is among the first `k` of its candidates, best first; 0 to 1."""
    assert k > 0 and len(ranked) == len(truth) > 0, (k, len(ranked), len(truth))
    return accuracy(
        [label in candidates[:k] for candidates, label in zip(ranked, truth, strict=True)]
    )


def consistency(correct: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of the groups all of whose records are right, 0 to 1; NLVR2 groups the image pairs of one sentence."""
    assert len(correct) == len(groups) > 0, (len(correct), len(groups))
    whole = dict.fromkeys(groups, True)
    for right, group in zip(correct, groups, strict=True):
        whole[group] &= bool(right)
    return accuracy(list(whole.values()))


def vqa_accuracy(predictions: Sequence[str], scores: Sequence[Mapping[str, float]]) -> float:
    """Mean soft score of the predicted answers, 0 to 1; `scores[i]` maps question i's answers to theirs."""
    assert len(predictions) == len(scores) > 0, (len(predictions), len(scores))
    return sum(
        accepted.get(answer, 0.0) for answer, accepted in zip(predictions, scores, strict=True)
    ) / len(scores)


def vqa_official(answer: str, annotators: Sequence[str]) -> float:
    """One question's score by the official evaluation (GT-Vision-Lab/VQA), 0 to 1, from what each annotator answered.

    Against every annotator in turn, the others count: min(1, how many of them gave `answer` / 3); the mean of these.
    Both sides are normalised, but only where the annotators differ: if all said "two", "2" scores 0, as does "Two".
    ValueError without annotators.
    """
    if not annotators:
        raise ValueError(
            "a question has no annotators' answers: the official score needs those of all ten, as in the raw annotations"
        )
    answer, *given = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *annotators)
    )
    if len(set(given)) > 1:
        answer, *given = map(normalize_answer, (answer, *given))
    agree = given.count(answer)
    # Those who agree leave one fewer among the others.
    return (agree * min(1.0, (agree - 1) / 3) + (len(given) - agree) * min(1.0, agree / 3)) / len(
        given
    )
