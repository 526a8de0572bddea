"""mIoU and accuracies: a hand case, sets of pixels, torchmetrics' own, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.metrics.segmentation import class_accuracies, class_ious, confusion, figures

TRUTH = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 255]])
PREDICTED = np.array([[0, 1, 1], [0, 1, 1], [2, 0, 2]])


def test_three_by_three_by_hand():
    """Class 0: 2 right of 3, 1 more claimed. Class 1: 3 of 3, 1 more claimed. Class 2: 1 of 2; its claim on an ignored pixel is free."""
    matrix = confusion(PREDICTED, TRUTH, num_classes=4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert class_ious(matrix)[:3].tolist() == pytest.approx([2 / 4, 3 / 4, 1 / 2])
    assert class_accuracies(matrix)[:3].tolist() == pytest.approx([2 / 3, 1, 1 / 2])
    assert math.isnan(class_ious(matrix)[3]) and math.isnan(class_accuracies(matrix)[3])
    assert figures(matrix) == pytest.approx(
        {"miou": (2 / 4 + 3 / 4 + 1 / 2) / 3, "aacc": 6 / 8, "macc": (2 / 3 + 1 + 1 / 2) / 3}
    )


def test_a_class_that_is_only_predicted_counts_for_miou_alone():
    matrix = confusion(np.array([[0, 3]]), np.array([[0, 0]]), num_classes=4)
    assert figures(matrix) == pytest.approx({"miou": (1 / 2 + 0) / 2, "aacc": 1 / 2, "macc": 1 / 2})


def test_images_are_added_up_and_never_averaged():
    """9 pixels of one class right in a large image, 1 wrong in a small one: 9 / 10, where the mean of images is 1 / 2."""
    large = confusion(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), num_classes=2)
    small = confusion(np.ones((1, 1), np.uint8), np.zeros((1, 1), np.uint8), num_classes=2)
    assert class_ious(large + small)[0] == pytest.approx(9 / 10)


def by_sets(pairs, num_classes, ignore):
    """The figures from sets of (image, row, column), one class after another."""
    true = {label: set() for label in range(num_classes)}
    claimed = {label: set() for label in range(num_classes)}
    for number, (predicted, truth) in enumerate(pairs):
        for place, label in np.ndenumerate(truth):
            if label != ignore:
                true[int(label)].add((number, place))
                claimed[int(predicted[place])].add((number, place))
    ious = [
        len(true[c] & claimed[c]) / len(true[c] | claimed[c]) for c in true if true[c] | claimed[c]
    ]
    accuracies = [len(true[c] & claimed[c]) / len(true[c]) for c in true if true[c]]
    right, pixels = sum(len(true[c] & claimed[c]) for c in true), sum(map(len, true.values()))
    return {
        "miou": sum(ious) / len(ious),
        "aacc": right / pixels,
        "macc": sum(accuracies) / len(accuracies),
    }


def drawn(seed, *, num_classes, ignore, images=3, missing=()):
    """Pairs of label maps of any size, some pixels ignored, predictions mostly right."""
    rng = np.random.default_rng(seed)
    classes = [label for label in range(num_classes) if label not in missing]
    pairs = []
    for _ in range(images):
        size = tuple(rng.integers(1, 9, 2))
        truth, other = (rng.choice(classes, size) for _ in range(2))
        predicted = np.where(rng.random(size) < 0.6, truth, other)
        truth[rng.random(size) < 0.2] = ignore
        pairs.append((predicted.astype(np.uint8), truth.astype(np.uint8)))
    return pairs


def added(pairs, num_classes, ignore):
    return sum(
        confusion(predicted, truth, num_classes=num_classes, ignore=ignore)
        for predicted, truth in pairs
    )


@given(st.integers(0, 10_000), st.sampled_from([(2, 255), (5, 5), (20, 255), (200, 255)]))
def test_figures_equal_those_of_sets(seed, kind):
    num_classes, ignore = kind
    pairs = drawn(seed, num_classes=num_classes, ignore=ignore)
    if any((truth != ignore).any() for _, truth in pairs):
        assert figures(added(pairs, num_classes, ignore)) == pytest.approx(
            by_sets(pairs, num_classes, ignore), abs=1e-12
        )


@pytest.mark.parametrize("num_classes, missing", [(4, ()), (150, (7, 149))])
def test_miou_equals_torchmetrics(num_classes, missing):
    classification = pytest.importorskip("torchmetrics.classification")
    import torch

    metric = classification.MulticlassJaccardIndex(num_classes, ignore_index=255)
    pairs = drawn(1, num_classes=num_classes, ignore=255, images=200, missing=missing)
    for predicted, truth in pairs:
        metric.update(
            torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
        )
    matrix = added(pairs, num_classes, 255)
    assert matrix.tolist() == metric.confmat.tolist()
    assert figures(matrix)["miou"] == pytest.approx(float(metric.compute()), abs=1e-7), (
        "theirs is computed in float32"
    )
    assert sorted(np.flatnonzero(np.isnan(class_ious(matrix)))) == sorted(missing)


def test_sixteen_bits_and_many_classes():
    """150 x 149 is beyond uint8; 300 labels are, too."""
    truth = np.array([[149, 299]], dtype=np.uint16)
    assert confusion(truth, truth, num_classes=300)[[149, 299], [149, 299]].tolist() == [1, 1]


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
def test_what_does_not_fit_is_named(predicted, truth, words):
    with pytest.raises(ValueError) as error:
        confusion(predicted, truth, num_classes=3, name="street")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


def test_a_set_of_ignored_pixels_alone_has_no_figures():
    matrix = confusion(PREDICTED, np.full_like(TRUTH, 255), num_classes=3)
    with pytest.raises(ValueError, match="all are ignored"):
        figures(matrix)
    with pytest.raises(AssertionError):
        confusion(PREDICTED.astype(float), TRUTH, num_classes=3)
