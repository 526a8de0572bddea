"""VQA accuracy, by hand-worked cases."""

import pytest

from beit3.metrics.classification import vqa_accuracy


def test_vqa_accuracy():
    scores = [{"net": 1.0, "mesh": 0.3}, {"2": 0.6}, {}, {"no": 0.9}]
    assert vqa_accuracy(["mesh", "3", "yes", "no"], scores) == pytest.approx((0.3 + 0 + 0 + 0.9) / 4)
    assert vqa_accuracy(["net"], scores[:1]) == 1.0
    for predictions, truths in (([], []), (["net"], scores)):
        with pytest.raises(AssertionError):
            vqa_accuracy(predictions, truths)
