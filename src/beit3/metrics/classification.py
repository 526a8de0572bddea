"""Scores of answers. Across the border: predicted answers, and the accepted ones with their scores."""

from collections.abc import Mapping, Sequence


def vqa_accuracy(predictions: Sequence[str], scores: Sequence[Mapping[str, float]]) -> float:
    """Mean soft score of the predicted answers, 0 to 1; `scores[i]` maps question i's answers to theirs."""
    assert len(predictions) == len(scores) > 0, (len(predictions), len(scores))
    return sum(accepted.get(answer, 0.0) for answer, accepted in zip(predictions, scores, strict=True)) / len(scores)
