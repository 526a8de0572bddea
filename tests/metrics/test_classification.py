"""VQA accuracy and top-k, by hand-worked cases."""

import numpy as np
import pytest

from beit3.metrics.classification import top_k, vqa_accuracy


def test_vqa_accuracy():
    scores = [{"net": 1.0, "mesh": 0.3}, {"2": 0.6}, {}, {"no": 0.9}]
    assert vqa_accuracy(["mesh", "3", "yes", "no"], scores) == pytest.approx((0.3 + 0 + 0 + 0.9) / 4)
    assert vqa_accuracy(["net"], scores[:1]) == 1.0
    for predictions, truths in (([], []), (["net"], scores)):
        with pytest.raises(AssertionError):
            vqa_accuracy(predictions, truths)


def test_top_k():
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
    labels = np.array([1, 1, 0, 0])
    # The last row ties with another class: second place.
    assert top_k(scores, labels) == 0.25
    assert top_k(scores, labels, 2) == 0.75
    assert top_k(scores, labels, 3) == 1.0
    assert top_k(np.zeros((8, 10)), np.zeros(8, dtype=int), 5) == 0.0
