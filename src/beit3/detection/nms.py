"""Soft-NMS (Bodla et al., arXiv:1704.04503), exact and for all classes at once. Boxes [R, 4],
scores [R, C] -> the best [n].

The published loop runs per class: take the best box, lower the scores of those that overlap it,
until nothing is left. The
boxes of the cascade serve every class, so all classes take a step together; a class's boxes come
out by falling score, since
lowering never raises, so at most `limit` steps give the exact best of all, and a class can stop
once it falls behind them.
"""

from typing import Literal

import torch
from torch import Tensor

from beit3.ops.precision import promote_to_float32

NmsKind = Literal["linear", "gaussian", "hard"]

GONE = -1.0
"""Score of a box that was taken or fell below the limit."""


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
    """Boxes [n, 4], lowered scores [n] and labels [n], n <= `limit`, best first; equal scores by
    box, then by label.

    A box of IoU o with a better one of its class has its score multiplied by 1 - o where o > `iou`
    (linear), by
    exp(-o^2 / `sigma`) (gaussian), or is dropped where o > `iou` (hard). Only scores above
    `candidate_score` take part, and
    whatever is or falls below `min_score` is dropped. Defaults: EVA's (arXiv:2211.07636, its public
    configuration).
    """
    assert scores.ndim == 2 and boxes.shape == (len(scores), 4) and min_score >= 0 < limit, (
        boxes.shape,
        scores.shape,
        min_score,
        limit,
    )
    boxes, live = promote_to_float32(boxes), promote_to_float32(scores).T.contiguous()  # [C, R]
    live = live.where((live > candidate_score) & (live >= min_score), GONE)
    labels = torch.arange(len(live), device=live.device)  # of the classes still in the race
    score, place, label = (
        live.new_empty(0),
        labels.new_empty(0),
        labels.new_empty(0),
    )  # of what was taken
    for _ in range(limit if live.numel() else 0):
        best, chosen = live.max(1)  # [C], the first of equals
        bar = score.topk(limit).values[-1] if len(score) >= limit else GONE
        racing = (best > GONE) & (best >= bar)
        if not racing.any():
            break
        live, labels, chosen = live[racing], labels[racing], chosen[racing]
        score, place, label = (
            torch.cat([score, best[racing]]),
            torch.cat([place, chosen]),
            torch.cat([label, labels]),
        )
        lowered = _lowered(live, pairwise_iou(boxes[chosen], boxes), kind, iou, sigma)
        live = lowered.where((live > GONE) & (lowered >= min_score), GONE).scatter(
            1, chosen[:, None], GONE
        )
    order = (place * scores.shape[1] + label).argsort()
    order = order[score[order].argsort(descending=True, stable=True)][:limit]
    return boxes[place[order]], score[order], label[order]


def pairwise_iou(left: Tensor, right: Tensor) -> Tensor:
    """Intersection over union of boxes [n, 4] and [m, 4]: [n, m], 0 where neither has an area."""
    corner = torch.maximum(left[:, None, :2], right[:, :2])
    sides = (torch.minimum(left[:, None, 2:], right[:, 2:]) - corner).clamp(min=0)
    common = sides[..., 0] * sides[..., 1]
    union = _area(left)[:, None] + _area(right) - common
    return torch.where(union > 0, common / union, 0)


def _lowered(scores: Tensor, overlap: Tensor, kind: NmsKind, iou: float, sigma: float) -> Tensor:
    """Scores [C, R] beside a box that overlaps theirs by `overlap` [C, R]."""
    if kind == "gaussian":
        return scores * torch.exp(-overlap.square() / sigma)
    assert kind in ("linear", "hard"), kind
    return torch.where(overlap > iou, scores * (1 - overlap) if kind == "linear" else GONE, scores)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
