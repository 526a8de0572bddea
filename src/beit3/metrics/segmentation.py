"""Semantic segmentation: mean IoU, pixel accuracy and mean class accuracy of a dataset.

As in mmsegmentation and the benchmarks of Cityscapes and ADE20K, intersections and unions are
summed over all images at the size of their label maps, never averaged per image. One confusion
matrix holds the counts: int64 [C, C], a row per true class, a column per predicted class. Scores
are from 0 to 1.
"""

import numpy as np
from numpy.typing import NDArray

ConfusionMatrix = NDArray[np.int64]


def compute_confusion(
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    num_classes: int,
    ignore: int = 255,
    name: str = "",
) -> ConfusionMatrix:
    """Returns how many pixels of each true class were predicted as each class.

    The matrices of several images may be added.

    Args:
        predicted: Predicted labels, integers [H, W].
        truth: The label map, integers [H, W]; pixels of label `ignore` are not counted.
        num_classes: Number of classes C; labels are 0 to C - 1.
        ignore: Label of pixels without a class.
        name: The image's name for error messages.

    Raises:
        ValueError: If the shapes differ or a counted pixel has a label that is not a class.
    """
    assert predicted.dtype.kind in "iu" and truth.dtype.kind in "iu", (predicted.dtype, truth.dtype)
    if predicted.shape != truth.shape:
        raise ValueError(
            f"the prediction of {name} is {_format_size(predicted)}, its label map "
            f"{_format_size(truth)}: predict at the size of the label map"
        )
    counted = truth != ignore
    # int64, because the cell index below would overflow uint8.
    true_labels = truth[counted].astype(np.int64)
    predicted_labels = predicted[counted].astype(np.int64)
    for source, labels in (("label map", true_labels), ("prediction", predicted_labels)):
        invalid = labels[(labels < 0) | (labels >= num_classes)]
        if len(invalid):
            raise ValueError(
                f"the {source} of {name} holds {invalid[0]}, which is no class: "
                f"labels are 0 to {num_classes - 1}"
            )
    cells = true_labels * num_classes + predicted_labels
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def compute_class_ious(matrix: ConfusionMatrix) -> NDArray[np.float64]:
    """Returns each class's intersection over union [C].

    It is NaN for a class that is neither in the label maps nor predicted.
    """
    intersection = np.diagonal(matrix)
    return _divide(intersection, matrix.sum(0) + matrix.sum(1) - intersection)


def compute_class_accuracies(matrix: ConfusionMatrix) -> NDArray[np.float64]:
    """Returns the fraction of each class's pixels that is predicted correctly [C].

    It is NaN for a class that is not in the label maps.
    """
    return _divide(np.diagonal(matrix), matrix.sum(1))


def summarize_confusion(matrix: ConfusionMatrix) -> dict[str, float]:
    """Returns `miou`, `aacc` (pixel accuracy) and `macc` (mean class accuracy).

    The means are over the classes for which the value is defined. Raises ValueError if no pixel was
    counted.
    """
    if matrix.sum() == 0:
        raise ValueError(
            "no pixel has a class, all are ignored: check the label maps and the ignored label"
        )
    return {
        "miou": float(np.nanmean(compute_class_ious(matrix))),
        "aacc": float(np.diagonal(matrix).sum() / matrix.sum()),
        "macc": float(np.nanmean(compute_class_accuracies(matrix))),
    }


def _divide(numerator: ConfusionMatrix, denominator: ConfusionMatrix) -> NDArray[np.float64]:
    """Divides counts [C]; the result is NaN where the denominator is 0."""
    undefined = np.full(len(denominator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def _format_size(labels: NDArray[np.integer]) -> str:
    return " x ".join(map(str, labels.shape))
