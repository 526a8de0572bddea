"""Semantic segmentation: one confusion matrix over all pixels of a data set -> mIoU, pixel accuracy, mean class accuracy.

As mmsegmentation counts them (Cityscapes' and ADE20K's benchmarks): intersections and unions are added up over the images at
the size of their label maps, never averaged per image. Shapes: integers [H, W]; the matrix int64 [C, C], rows
what is true and columns what was predicted; figures from 0 to 1.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]


def confusion(
    predicted: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    num_classes: int,
    ignore: int = 255,
    name: str = "",
) -> Matrix:
    """How many pixels [H, W] of each true class got each label; those whose truth is `ignore` count nowhere.

    Add the matrices of all images. ValueError naming the image for a prediction of another shape, or a label that is no class.
    """
    assert predicted.dtype.kind in "iu" and truth.dtype.kind in "iu", (predicted.dtype, truth.dtype)
    if predicted.shape != truth.shape:
        raise ValueError(
            f"the prediction of {name} is {_size(predicted)}, its label map {_size(truth)}: predict at the map's own size"
        )
    kept = truth != ignore
    rows, columns = (
        truth[kept].astype(np.int64),
        predicted[kept].astype(np.int64),
    )  # uint8 would overflow below
    for what, labels in (("label map", rows), ("prediction", columns)):
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"the {what} of {name} holds {wrong[0]}, which is no class: labels are 0 to {num_classes - 1}"
            )
    return np.bincount(rows * num_classes + columns, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def class_ious(matrix: Matrix) -> NDArray[np.float64]:
    """Intersection over union of each class [C]; NaN for one that is neither there nor predicted."""
    right = np.diagonal(matrix)
    return _ratio(right, matrix.sum(0) + matrix.sum(1) - right)


def class_accuracies(matrix: Matrix) -> NDArray[np.float64]:
    """Share of the pixels of each class [C] that are labelled so; NaN for one that is not there."""
    return _ratio(np.diagonal(matrix), matrix.sum(1))


def figures(matrix: Matrix) -> dict[str, float]:
    """`miou` and `macc`, means over the classes that have one, and `aacc`, the share of all pixels that are right.

    ValueError where no pixel was counted.
    """
    if matrix.sum() == 0:
        raise ValueError(
            "no pixel has a class, all are ignored: check the label maps, and the label that is ignored"
        )
    return {
        "miou": float(np.nanmean(class_ious(matrix))),
        "aacc": float(np.diagonal(matrix).sum() / matrix.sum()),
        "macc": float(np.nanmean(class_accuracies(matrix))),
    }


def _ratio(part: Matrix, whole: Matrix) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _size(labels: NDArray[np.integer]) -> str:
    return " x ".join(map(str, labels.shape))
