"""Soft-NMS against the paper's loop and torchvision's hard NMS; ties, thresholds and what is
empty."""

import math

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from beit3.detection.nms import pairwise_iou, soft_nms
from tests.reference import suppression

KINDS = ("linear", "gaussian", "hard")
SETTINGS = {"iou": 0.4, "sigma": 0.5, "min_score": 1e-3, "candidate_score": 0.0}


def candidates(seed, boxes=60, classes=5, side=30.0):
    """Boxes [R, 4] that overlap a good deal, and scores [R, C], float64."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator, dtype=torch.float64) * side
    size = torch.rand(boxes, 2, generator=generator, dtype=torch.float64) * side + 1
    return torch.cat([corner, corner + size], 1), torch.rand(
        boxes, classes, generator=generator, dtype=torch.float64
    )


def same(boxes, scores, **settings):
    found_boxes, found_scores, labels = soft_nms(boxes, scores, **settings)
    wanted = suppression.soft_nms(boxes.tolist(), scores.tolist(), **settings)
    assert labels.tolist() == [label for _, _, label in wanted]
    assert torch.equal(found_boxes, boxes[[place for _, place, _ in wanted]])
    torch.testing.assert_close(
        found_scores,
        torch.tensor([score for score, _, _ in wanted], dtype=boxes.dtype),
        rtol=0,
        atol=1e-12,
    )
    return len(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed, limit", [(0, 290), (1, 100), (2, 20), (3, 1)])
def test_equals_the_loop(kind, seed, limit):
    count = same(*candidates(seed), kind=kind, limit=limit, **SETTINGS)
    assert count == limit or (kind == "hard" and 100 < count < limit == 290)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop_where_one_class_leads(kind):
    """Most classes leave the race at once, one runs to the end; and few candidates are high enough
    to enter."""
    boxes, scores = candidates(4, classes=40)
    scores[:, 1:] *= 0.02
    same(boxes, scores, kind=kind, limit=50, **SETTINGS)
    same(
        boxes, scores, kind=kind, limit=50, **SETTINGS | {"candidate_score": 0.6, "min_score": 0.1}
    )


@pytest.mark.parametrize(
    "kind, limit", [("linear", 400), ("linear", 17), ("hard", 400), ("hard", 4), ("gaussian", 17)]
)
def test_ties_go_by_box_then_label(kind, limit):
    """Gaussian only as far as no score was lowered: equal products of exponentials differ in their
    last bit."""
    boxes, scores = candidates(5, boxes=40, classes=6, side=12.0)
    boxes = torch.cat([boxes.round(), boxes.round()])  # every box twice
    scores = torch.cat([scores, scores.flip(1)]).mul(4).ceil().div(4)  # .25, .5, .75, 1
    same(boxes, scores, kind=kind, limit=limit, **SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_is_torchvisions(dtype):
    boxes, scores = (part.to(dtype) for part in candidates(6, boxes=150, classes=4))
    place, label = (
        part.flatten() for part in torch.meshgrid(torch.arange(150), torch.arange(4), indexing="ij")
    )
    keep = batched_nms(boxes[place], scores.flatten(), label, 0.5)
    found = soft_nms(boxes, scores, kind="hard", iou=0.5, min_score=0.0, limit=600)
    assert 50 < len(keep) < 600
    for part, wanted in zip(
        found, (boxes[place][keep], scores.flatten()[keep], label[keep]), strict=True
    ):
        assert torch.equal(part, wanted)


def test_hand_worked():
    boxes = torch.tensor(
        [[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [20, 0, 30, 10]]
    ).double()  # IoU with the first: 1, .8, .5, 0
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.1]], dtype=torch.float64)
    options = {"iou": 0.6, "sigma": 0.5, "limit": 10}
    linear = soft_nms(boxes, scores, kind="linear", **options)
    # The second is lowered by the first, then by the third, with which its IoU is .625.
    assert linear[1].tolist() == pytest.approx([0.9, 0.7, 0.1, 0.8 * 0.2 * (1 - 0.625)])
    assert torch.equal(linear[0], boxes[[0, 2, 3, 1]])
    gaussian = soft_nms(boxes, scores, kind="gaussian", **options)
    assert gaussian[1][:2].tolist() == pytest.approx([0.9, 0.7 * math.exp(-0.25 / 0.5)])
    assert soft_nms(boxes, scores, kind="hard", **options)[1].tolist() == [0.9, 0.7, 0.1]
    assert soft_nms(boxes, scores, kind="linear", min_score=0.1, **options)[1].tolist() == [
        0.9,
        0.7,
        0.1,
    ]
    assert soft_nms(boxes, scores, kind="linear", candidate_score=0.1, **options)[
        1
    ].tolist() == pytest.approx([0.9, 0.7, 0.06])


def test_low_scores_never_come_back():
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]).double()
    for kind, count in (("linear", 3), ("hard", 1)):
        found = soft_nms(
            boxes,
            torch.tensor([[0.9], [0.5], [0.0]]),
            kind=kind,
            min_score=0.0,
            candidate_score=-0.5,
            limit=9,
        )
        assert found[1].tolist() == pytest.approx([0.9, 0.0, 0.0][:count])


def test_empty_and_degenerate():
    for scores in (torch.empty(0, 3), torch.empty(4, 0), torch.zeros(4, 3)):
        found = soft_nms(torch.rand(len(scores), 4), scores)
        assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)] and found[
            2
        ].dtype == torch.long
    points = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])
    assert soft_nms(points, torch.tensor([[0.5], [0.4], [0.3]]), kind="gaussian")[
        1
    ].tolist() == pytest.approx([0.5, 0.4, 0.3])
    half = soft_nms(torch.rand(4, 4).bfloat16(), torch.rand(4, 2).bfloat16())
    assert half[0].dtype == half[1].dtype == torch.float32


def test_pairwise_iou_is_torchvisions():
    boxes = candidates(7)[0]
    torch.testing.assert_close(
        pairwise_iou(boxes[:20], boxes), box_iou(boxes[:20], boxes), rtol=0, atol=1e-15
    )
