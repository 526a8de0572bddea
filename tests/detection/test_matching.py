"""Matching of boxes to objects, mask targets and clipping, by hand-worked cases."""

import torch

from beit3.detection.matching import (
    MASKS_PER_BLOCK,
    MatchedBoxes,
    Target,
    clip_boxes,
    compute_mask_targets,
    match_boxes,
)

BACKGROUND = 3


def test_boxes_get_the_label_of_the_object_they_overlap_enough():
    """Overlaps of .55, .65 and .75 with an object, none, and .9 with another object."""
    target = Target(torch.tensor([[0.0, 0, 10, 100], [200, 0, 210, 100]]), torch.tensor([1, 0]))
    boxes = torch.tensor(
        [[0.0, 0, 10, 55], [0, 0, 10, 65], [0, 0, 10, 75], [100, 0, 110, 100], [200, 0, 210, 90]]
    )
    for iou, labels in ((0.5, [1, 1, 1, 3, 0]), (0.6, [3, 1, 1, 3, 0]), (0.7, [3, 3, 1, 3, 0])):
        matched = match_boxes(boxes, target, iou, BACKGROUND)
        assert matched.labels.tolist() == labels
        assert matched.object_indices[:3].tolist() == [0, 0, 0]
        assert torch.equal(matched.object_boxes[4], target.boxes[1])


def test_without_objects_all_boxes_are_background():
    boxes = torch.tensor([[0.0, 0, 10, 55], [0, 0, 10, 65]])
    target = Target(boxes[:0], torch.zeros(0, dtype=torch.int64))
    matched = match_boxes(boxes, target, 0.5, BACKGROUND)
    assert matched.labels.tolist() == [BACKGROUND] * 2
    assert torch.equal(matched.object_boxes, boxes)


def test_mask_targets_equal_those_by_hand():
    """The mask of each object is the left half of its box, but the last one's is all of it.

    There are more objects than are converted to floats at once.
    """
    count = MASKS_PER_BLOCK + 3
    masks = torch.zeros(count, 64, 64, dtype=torch.uint8)
    masks[:, 8:36, 4:18] = 1
    masks[-1] = 1
    boxes = torch.tensor([[4.0, 8, 32, 36]]).repeat(count, 1)
    target = Target(boxes, torch.zeros(count, dtype=torch.int64), masks)
    reversed_order = torch.arange(count).flip(0)
    matched = MatchedBoxes(boxes, target.labels, reversed_order, boxes)
    mask_targets = compute_mask_targets(target, matched)
    left_half = (torch.arange(28) < 14).float().expand(28, 28)
    assert torch.equal(mask_targets[0], torch.ones(28, 28))
    assert torch.equal(mask_targets[1:], left_half.expand(count - 1, 28, 28))


def test_boxes_are_clipped_to_the_image():
    boxes = torch.tensor([[-5.0, 3, 70, 90], [float("nan"), 1, float("inf"), 2]])
    clipped = clip_boxes(boxes, torch.tensor([40, 60]))
    assert clipped.tolist() == [[0, 3, 60, 40], [0, 1, 60, 2]]
