"""Reference Soft-NMS as in its paper: one class and one box at a time, in plain floats."""

import math


def compute_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection)


def compute_decay(kind, overlap, iou, sigma):
    """The factor of a score, or None if the box is dropped."""
    if kind == "gaussian":
        return math.exp(-overlap * overlap / sigma)
    if overlap <= iou:
        return 1.0
    return 1 - overlap if kind == "linear" else None


def soft_nms(boxes, scores, *, kind, iou, sigma, min_score, candidate_score, limit):
    """(score, box index, label) of the best `limit` boxes.

    `boxes` is a list of boxes, `scores` the list of class scores of each.
    """
    selected = []
    for label in range(len(scores[0])):
        remaining = {
            index: row[label]
            for index, row in enumerate(scores)
            if row[label] > candidate_score and row[label] >= min_score
        }
        while remaining:
            best = min(remaining, key=lambda index: (-remaining[index], index))
            selected.append((remaining.pop(best), best, label))
            for index in list(remaining):
                overlap = compute_iou(boxes[best], boxes[index])
                factor = compute_decay(kind, overlap, iou, sigma)
                if factor is None or remaining[index] * factor < min_score:
                    del remaining[index]
                else:
                    remaining[index] *= factor
    return sorted(selected, key=lambda item: (-item[0], item[1], item[2]))[:limit]
