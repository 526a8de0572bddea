"""Soft-NMS (Bodla et al., arXiv:1704.04503), exact and for all classes at once.

The published loop runs per class: take the best box, lower the scores of those that overlap it, and
repeat until no box is left. The cascade's boxes are shared by all classes, so here all classes take
a step together. A class's boxes come out in the order of falling score, because scores are never
raised; so at most `limit` steps give the exact best boxes of all classes, and a class may stop once
its scores are below all of these.
"""

from typing import Literal

import torch
from torch import Tensor

from beit3.ops.precision import promote_to_float32

NmsKind = Literal["linear", "gaussian", "hard"]

REMOVED = -1.0
"""Score of a box that was selected or fell below the limit."""


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    kind: NmsKind = "linear",
    iou: float = 0.6,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    candidate_score: float = 0.0,
    limit: int = 100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the best boxes of all classes.

    A box of IoU o with a better box of its class has its score multiplied by 1 - o where o > `iou`
    (linear) or by exp(-o^2 / `sigma`) (gaussian), or is dropped where o > `iou` (hard). Defaults
    are those of EVA's public configuration (arXiv:2211.07636).

    Args:
        boxes: Boxes [R, 4], shared by all classes.
        scores: Class scores [R, C].
        kind: How scores are lowered.
        iou: Overlap above which linear and hard NMS act.
        sigma: Width of the gaussian decay.
        min_score: Boxes whose score is or falls below it are dropped.
        candidate_score: Only scores above it take part.
        limit: Number of boxes to select at most.

    Returns:
        Boxes [n, 4], lowered scores [n] and labels [n], n <= `limit`, best first; boxes of equal
        score are ordered by their index, then by label.
    """
    assert scores.ndim == 2 and boxes.shape == (len(scores), 4), (boxes.shape, scores.shape)
    assert min_score >= 0 and limit > 0, (min_score, limit)
    boxes = promote_to_float32(boxes)
    active = promote_to_float32(scores).T.contiguous()  # [C, R]
    active = active.where((active > candidate_score) & (active >= min_score), REMOVED)
    active_labels = torch.arange(len(active), device=active.device)
    selected_scores = active.new_empty(0)
    selected_boxes = active_labels.new_empty(0)
    selected_labels = active_labels.new_empty(0)
    for _ in range(limit if active.numel() else 0):
        best_scores, best_boxes = active.max(1)  # [C], the first of equal ones
        threshold = best_scores.new_tensor(REMOVED)
        if len(selected_scores) >= limit:
            threshold = selected_scores.topk(limit).values[-1]
        continues = (best_scores > REMOVED) & (best_scores >= threshold)
        if not continues.any():
            break
        active, active_labels = active[continues], active_labels[continues]
        best_boxes = best_boxes[continues]
        selected_scores = torch.cat([selected_scores, best_scores[continues]])
        selected_boxes = torch.cat([selected_boxes, best_boxes])
        selected_labels = torch.cat([selected_labels, active_labels])
        overlaps = pairwise_iou(boxes[best_boxes], boxes)
        lowered = _lower_scores(active, overlaps, kind, iou, sigma)
        remains = (active > REMOVED) & (lowered >= min_score)
        active = lowered.where(remains, REMOVED).scatter(1, best_boxes[:, None], REMOVED)
    order = (selected_boxes * scores.shape[1] + selected_labels).argsort()
    order = order[selected_scores[order].argsort(descending=True, stable=True)][:limit]
    return boxes[selected_boxes[order]], selected_scores[order], selected_labels[order]


def pairwise_iou(left: Tensor, right: Tensor) -> Tensor:
    """Returns the IoU [n, m] of boxes [n, 4] and [m, 4]; it is 0 where neither has an area."""
    top_left = torch.maximum(left[:, None, :2], right[:, :2])
    sides = (torch.minimum(left[:, None, 2:], right[:, 2:]) - top_left).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _compute_areas(left)[:, None] + _compute_areas(right) - intersection
    return torch.where(union > 0, intersection / union, 0)


def _lower_scores(
    scores: Tensor, overlaps: Tensor, kind: NmsKind, iou: float, sigma: float
) -> Tensor:
    """Lowers scores [C, R] of boxes that overlap the selected box of their class."""
    if kind == "gaussian":
        return scores * torch.exp(-overlaps.square() / sigma)
    if kind == "linear":
        return torch.where(overlaps > iou, scores * (1 - overlaps), scores)
    assert kind == "hard", kind
    return torch.where(overlaps > iou, REMOVED, scores)


def _compute_areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
