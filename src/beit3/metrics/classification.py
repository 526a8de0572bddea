"""Scores of answers and classes. Across the border: predicted and true answers in lists, or scores [N, C] float."""

from collections.abc import Mapping, Sequence

import numpy as np


def vqa_accuracy(predictions: Sequence[str], scores: Sequence[Mapping[str, float]]) -> float:
    """Mean soft score of the predicted answers, 0 to 1; `scores[i]` maps question i's answers to theirs."""
    assert len(predictions) == len(scores) > 0, (len(predictions), len(scores))
    return sum(accepted.get(answer, 0.0) for answer, accepted in zip(predictions, scores, strict=True)) / len(scores)


def top_k(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of the rows of `scores` [N, C] whose label [N] is among the k best; an equal score counts against it."""
    assert len(scores) == len(labels) > 0, (len(scores), len(labels))
    own = scores[np.arange(len(labels)), labels][:, None]
    better = (scores >= own).sum(axis=1) - 1
    return float((better < k).mean())
