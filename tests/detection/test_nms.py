"""Soft-NMS against the paper's loop and torchvision's hard NMS; ties, thresholds, empty inputs."""

import math

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from beit3.detection.nms import pairwise_iou, soft_nms
from tests.reference import suppression

KINDS = ("linear", "gaussian", "hard")
SETTINGS = {"iou": 0.4, "sigma": 0.5, "min_score": 1e-3, "candidate_score": 0.0}


def make_candidates(seed, num_boxes=60, num_classes=5, side=30.0):
    """Boxes [R, 4] that overlap strongly, and scores [R, C], both float64."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_boxes, 2, generator=generator, dtype=torch.float64) * side
    sizes = torch.rand(num_boxes, 2, generator=generator, dtype=torch.float64) * side + 1
    scores = torch.rand(num_boxes, num_classes, generator=generator, dtype=torch.float64)
    return torch.cat([corners, corners + sizes], 1), scores


def assert_equals_reference(boxes, scores, **settings):
    """Returns the number of selected boxes."""
    selected_boxes, selected_scores, labels = soft_nms(boxes, scores, **settings)
    expected = suppression.soft_nms(boxes.tolist(), scores.tolist(), **settings)
    assert labels.tolist() == [label for _, _, label in expected]
    assert torch.equal(selected_boxes, boxes[[index for _, index, _ in expected]])
    expected_scores = torch.tensor([score for score, _, _ in expected], dtype=boxes.dtype)
    torch.testing.assert_close(selected_scores, expected_scores, rtol=0, atol=1e-12)
    return len(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed, limit", [(0, 290), (1, 100), (2, 20), (3, 1)])
def test_selection_equals_the_papers_loop(kind, seed, limit):
    count = assert_equals_reference(*make_candidates(seed), kind=kind, limit=limit, **SETTINGS)
    assert count == limit or (kind == "hard" and 100 < count < limit == 290)


@pytest.mark.parametrize("kind", KINDS)
def test_selection_equals_the_papers_loop_where_one_class_leads(kind):
    """Most classes stop at once and one runs to the end; or few candidates score high enough."""
    boxes, scores = make_candidates(4, num_classes=40)
    scores[:, 1:] *= 0.02
    strict = SETTINGS | {"candidate_score": 0.6, "min_score": 0.1}
    for settings in (SETTINGS, strict):
        assert_equals_reference(boxes, scores, kind=kind, limit=50, **settings)


@pytest.mark.parametrize(
    "kind, limit", [("linear", 400), ("linear", 17), ("hard", 400), ("hard", 4), ("gaussian", 17)]
)
def test_ties_are_ordered_by_box_then_label(kind, limit):
    """Gaussian is tested only as far as no score was lowered.

    Products of exponentials that should be equal differ in their last bit.
    """
    boxes, scores = make_candidates(5, num_boxes=40, num_classes=6, side=12.0)
    boxes = torch.cat([boxes.round(), boxes.round()])  # every box twice
    scores = torch.cat([scores, scores.flip(1)]).mul(4).ceil().div(4)  # .25, .5, .75, 1
    assert_equals_reference(boxes, scores, kind=kind, limit=limit, **SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_nms_equals_torchvisions(dtype):
    boxes, scores = (part.to(dtype) for part in make_candidates(6, num_boxes=150, num_classes=4))
    grid = torch.meshgrid(torch.arange(150), torch.arange(4), indexing="ij")
    indices, labels = (part.flatten() for part in grid)
    keep = batched_nms(boxes[indices], scores.flatten(), labels, 0.5)
    selected = soft_nms(boxes, scores, kind="hard", iou=0.5, min_score=0.0, limit=600)
    assert 50 < len(keep) < 600
    expected = boxes[indices][keep], scores.flatten()[keep], labels[keep]
    for part, expected_part in zip(selected, expected, strict=True):
        assert torch.equal(part, expected_part)


def test_scores_equal_those_by_hand():
    # IoU with the first box: 1, .8, .5, 0.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [20, 0, 30, 10]]).double()
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.1]], dtype=torch.float64)

    def select(**settings):
        return soft_nms(boxes, scores, iou=0.6, sigma=0.5, limit=10, **settings)

    linear = select(kind="linear")
    # The second box is lowered by the first, then by the third, with which its IoU is .625.
    assert linear[1].tolist() == pytest.approx([0.9, 0.7, 0.1, 0.8 * 0.2 * (1 - 0.625)])
    assert torch.equal(linear[0], boxes[[0, 2, 3, 1]])
    gaussian = select(kind="gaussian")
    assert gaussian[1][:2].tolist() == pytest.approx([0.9, 0.7 * math.exp(-0.25 / 0.5)])
    assert select(kind="hard")[1].tolist() == [0.9, 0.7, 0.1]
    assert select(kind="linear", min_score=0.1)[1].tolist() == [0.9, 0.7, 0.1]
    high = select(kind="linear", candidate_score=0.1)
    assert high[1].tolist() == pytest.approx([0.9, 0.7, 0.06])


def test_removed_boxes_are_not_selected_again():
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]).double()
    scores = torch.tensor([[0.9], [0.5], [0.0]])
    settings = {"min_score": 0.0, "candidate_score": -0.5, "limit": 9}
    for kind, expected in (("linear", [0.9, 0.0, 0.0]), ("hard", [0.9])):
        assert soft_nms(boxes, scores, kind=kind, **settings)[1].tolist() == pytest.approx(expected)


def test_empty_inputs_and_boxes_without_area_are_accepted():
    for scores in (torch.empty(0, 3), torch.empty(4, 0), torch.zeros(4, 3)):
        selected = soft_nms(torch.rand(len(scores), 4), scores)
        assert [tuple(part.shape) for part in selected] == [(0, 4), (0,), (0,)]
        assert selected[2].dtype == torch.long
    points = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])
    selected = soft_nms(points, torch.tensor([[0.5], [0.4], [0.3]]), kind="gaussian")
    assert selected[1].tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_results_are_float32_for_bfloat16():
    selected = soft_nms(torch.rand(4, 4).bfloat16(), torch.rand(4, 2).bfloat16())
    assert selected[0].dtype == selected[1].dtype == torch.float32


def test_pairwise_iou_equals_torchvisions():
    boxes = make_candidates(7)[0]
    expected = box_iou(boxes[:20], boxes)
    torch.testing.assert_close(pairwise_iou(boxes[:20], boxes), expected, rtol=0, atol=1e-15)
