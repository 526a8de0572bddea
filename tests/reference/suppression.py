"""Soft-NMS as its paper tells it: one class after another, one box after another, in plain
floats."""

import math


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def decay(kind, o, iou, sigma):
    if kind == "gaussian":
        return math.exp(-o * o / sigma)
    if o <= iou:
        return 1.0
    return 1 - o if kind == "linear" else None


def soft_nms(boxes, scores, *, kind, iou, sigma, min_score, candidate_score, limit):
    """(score, box number, label) of the best `limit`, from lists of boxes and of each box's scores
    of all classes."""
    taken = []
    for label in range(len(scores[0])):
        left = {
            i: row[label]
            for i, row in enumerate(scores)
            if row[label] > candidate_score and row[label] >= min_score
        }
        while left:
            best = min(left, key=lambda i: (-left[i], i))
            taken.append((left.pop(best), best, label))
            for i in list(left):
                factor = decay(kind, overlap(boxes[best], boxes[i]), iou, sigma)
                if factor is None or left[i] * factor < min_score:
                    del left[i]
                else:
                    left[i] *= factor
    return sorted(taken, key=lambda entry: (-entry[0], entry[1], entry[2]))[:limit]
