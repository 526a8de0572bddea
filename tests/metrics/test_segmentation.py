"""mIoU and accuracies against a hand-worked case, sets of pixels and torchmetrics; refusals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.metrics.segmentation import (
    compute_class_accuracies,
    compute_class_ious,
    compute_confusion,
    summarize_confusion,
)

TRUTH = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 255]])
PREDICTED = np.array([[0, 1, 1], [0, 1, 1], [2, 0, 2]])


def test_scores_of_a_small_map_equal_those_by_hand():
    """Class 0 has 2 of 3 pixels right, class 1 has 3 of 3, class 2 has 1 of 2.

    Classes 0 and 1 have a false pixel too. Class 2 on an ignored pixel does not count.
    """
    matrix = compute_confusion(PREDICTED, TRUTH, num_classes=4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    ious, accuracies = compute_class_ious(matrix), compute_class_accuracies(matrix)
    assert ious[:3].tolist() == pytest.approx([2 / 4, 3 / 4, 1 / 2])
    assert accuracies[:3].tolist() == pytest.approx([2 / 3, 1, 1 / 2])
    assert math.isnan(ious[3]) and math.isnan(accuracies[3])
    assert summarize_confusion(matrix) == pytest.approx(
        {"miou": (2 / 4 + 3 / 4 + 1 / 2) / 3, "aacc": 6 / 8, "macc": (2 / 3 + 1 + 1 / 2) / 3}
    )


def test_a_class_that_is_only_predicted_counts_for_miou_alone():
    matrix = compute_confusion(np.array([[0, 3]]), np.array([[0, 0]]), num_classes=4)
    expected = {"miou": (1 / 2 + 0) / 2, "aacc": 1 / 2, "macc": 1 / 2}
    assert summarize_confusion(matrix) == pytest.approx(expected)


def test_pixels_are_summed_over_images():
    """9 right pixels in a large image and 1 wrong in a small one: 9 / 10, where a mean is 1 / 2."""
    large = compute_confusion(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), num_classes=2)
    small = compute_confusion(np.ones((1, 1), np.uint8), np.zeros((1, 1), np.uint8), num_classes=2)
    assert compute_class_ious(large + small)[0] == pytest.approx(9 / 10)


def summarize_by_sets(pairs, num_classes, ignore):
    """Scores from sets of (image, row, column), one class at a time."""
    true = {label: set() for label in range(num_classes)}
    predicted = {label: set() for label in range(num_classes)}
    for number, (prediction, label_map) in enumerate(pairs):
        for pixel, label in np.ndenumerate(label_map):
            if label != ignore:
                true[int(label)].add((number, pixel))
                predicted[int(prediction[pixel])].add((number, pixel))
    correct = {label: len(true[label] & predicted[label]) for label in true}
    unions = {label: len(true[label] | predicted[label]) for label in true}
    ious = [correct[label] / unions[label] for label in true if unions[label]]
    accuracies = [correct[label] / len(true[label]) for label in true if true[label]]
    return {
        "miou": sum(ious) / len(ious),
        "aacc": sum(correct.values()) / sum(map(len, true.values())),
        "macc": sum(accuracies) / len(accuracies),
    }


def make_pairs(seed, *, num_classes, ignore, num_images=3, absent=()):
    """(prediction, label map) of random sizes: most predictions right, some pixels ignored."""
    rng = np.random.default_rng(seed)
    classes = [label for label in range(num_classes) if label not in absent]
    pairs = []
    for _ in range(num_images):
        size = tuple(rng.integers(1, 9, 2))
        truth, noise = (rng.choice(classes, size) for _ in range(2))
        predicted = np.where(rng.random(size) < 0.6, truth, noise)
        truth[rng.random(size) < 0.2] = ignore
        pairs.append((predicted.astype(np.uint8), truth.astype(np.uint8)))
    return pairs


def sum_confusion(pairs, num_classes, ignore):
    return sum(
        compute_confusion(predicted, truth, num_classes=num_classes, ignore=ignore)
        for predicted, truth in pairs
    )


@given(st.integers(0, 10_000), st.sampled_from([(2, 255), (5, 5), (20, 255), (200, 255)]))
def test_scores_equal_those_of_sets(seed, classes_and_ignore):
    num_classes, ignore = classes_and_ignore
    pairs = make_pairs(seed, num_classes=num_classes, ignore=ignore)
    if any((truth != ignore).any() for _, truth in pairs):
        expected = summarize_by_sets(pairs, num_classes, ignore)
        scores = summarize_confusion(sum_confusion(pairs, num_classes, ignore))
        assert scores == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_classes, absent", [(4, ()), (150, (7, 149))])
def test_miou_equals_torchmetrics(num_classes, absent):
    classification = pytest.importorskip("torchmetrics.classification")
    import torch

    metric = classification.MulticlassJaccardIndex(num_classes, ignore_index=255)
    pairs = make_pairs(1, num_classes=num_classes, ignore=255, num_images=200, absent=absent)
    for pair in pairs:
        metric.update(*(torch.from_numpy(labels.astype(np.int64)) for labels in pair))
    matrix = sum_confusion(pairs, num_classes, 255)
    assert matrix.tolist() == metric.confmat.tolist()
    # torchmetrics divides in float32.
    miou = summarize_confusion(matrix)["miou"]
    assert miou == pytest.approx(float(metric.compute()), abs=1e-7)
    assert sorted(np.flatnonzero(np.isnan(compute_class_ious(matrix)))) == sorted(absent)


def test_many_classes_do_not_overflow():
    """150 x 149 does not fit into uint8, and neither do 300 labels."""
    truth = np.array([[149, 299]], dtype=np.uint16)
    matrix = compute_confusion(truth, truth, num_classes=300)
    assert matrix[[149, 299], [149, 299]].tolist() == [1, 1]


@pytest.mark.parametrize(
    "predicted, truth, words",
    [
        (PREDICTED[:2], TRUTH, ("street", "2 x 3", "3 x 3")),
        (PREDICTED[None], TRUTH, ("street", "1 x 3 x 3")),
        (PREDICTED, np.where(TRUTH == 2, 3, TRUTH), ("label map of street", "3")),
        (np.where(PREDICTED == 2, 255, PREDICTED), TRUTH, ("prediction of street", "255")),
        (np.where(PREDICTED == 2, -1, PREDICTED), TRUTH, ("prediction of street", "-1")),
    ],
)
def test_invalid_predictions_are_refused_with_the_image_name(predicted, truth, words):
    with pytest.raises(ValueError) as error:
        compute_confusion(predicted, truth, num_classes=3, name="street")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_ignored_pixels_alone_have_no_scores():
    matrix = compute_confusion(PREDICTED, np.full_like(TRUTH, 255), num_classes=3)
    with pytest.raises(ValueError, match="all are ignored"):
        summarize_confusion(matrix)
    with pytest.raises(AssertionError):
        compute_confusion(PREDICTED.astype(float), TRUTH, num_classes=3)
