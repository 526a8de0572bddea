"""Training targets of boxes: which object each box is matched to, and the mask it should predict.

Boxes are x1 y1 x2 y2 in pixels of the network's input. Labels are 0 to C - 1; C is background.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align

MASK_SIZE = 28
"""Side of a predicted mask, in cells over its box."""
MASKS_PER_BLOCK = 16
"""Full-size masks that are converted to floats at once: a hundred at 1280 px take 655 MB."""


class Target(NamedTuple):
    """The annotated objects of an image. Boxes have a positive area and lie within the image."""

    boxes: Tensor
    """float32 [n, 4]."""
    labels: Tensor
    """int64 [n], 0 to C - 1."""
    masks: Tensor | None = None
    """uint8 [n, H, W] of 0 and 1, as large as the padded image. Detectors with masks need them."""


class MatchedBoxes(NamedTuple):
    """Boxes of an image with the object that each is matched to."""

    boxes: Tensor
    """[R, 4]."""
    labels: Tensor
    """[R] int64; C is background."""
    object_indices: Tensor
    """[R] int64, the object of the largest overlap; 0 if the image has no object."""
    object_boxes: Tensor
    """[R, 4], that object's box; the box itself if the image has no object."""

    def select(self, keep: Tensor) -> "MatchedBoxes":
        """Returns the boxes where `keep` [R] is true."""
        return MatchedBoxes(*(values[keep] for values in self))


def match_boxes(boxes: Tensor, target: Target, iou: float, background: int) -> MatchedBoxes:
    """Matches boxes [R, 4] of one image to the objects that they overlap most.

    A box gets the label of its object if their IoU is at least `iou`, else the label `background`.
    """
    if not len(target.boxes):
        zeros = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return MatchedBoxes(boxes, zeros + background, zeros, boxes)
    best_ious, indices = box_iou(target.boxes.to(boxes.dtype), boxes).max(0)
    labels = torch.where(best_ious >= iou, target.labels[indices], background)
    return MatchedBoxes(boxes, labels, indices, target.boxes[indices].to(boxes.dtype))


def compute_mask_targets(target: Target, positives: MatchedBoxes) -> Tensor:
    """Crops the objects' masks to positive boxes: float32 [n, 28, 28] of 0 and 1.

    A cell is 1 if the mask covers at least half of it.
    """
    assert target.masks is not None, "a detector with masks is trained on targets with masks"
    mask_targets = positives.boxes.new_zeros(len(positives.boxes), MASK_SIZE, MASK_SIZE)
    for block, masks in enumerate(target.masks.split(MASKS_PER_BLOCK)):
        indices = positives.object_indices - block * MASKS_PER_BLOCK
        in_block = (indices >= 0) & (indices < len(masks))
        rois = torch.cat((indices[in_block, None], positives.boxes[in_block]), 1)
        coverage = roi_align(
            masks[:, None].to(rois.dtype), rois, MASK_SIZE, sampling_ratio=0, aligned=True
        )
        mask_targets[in_block] = (coverage[:, 0] >= 0.5).to(mask_targets.dtype)
    return mask_targets


def clip_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Clips boxes [R, 4] to an image of `size` [2] (height, width).

    Values that are not a number become 0, because RoIAlign would read outside of the map there.
    """
    return boxes.nan_to_num(nan=0.0).clamp(min=0).minimum(size[[1, 0, 1, 0]].to(boxes.dtype))


def drop_empty_boxes(boxes: Tensor) -> Tensor:
    """Returns the boxes of positive width and height."""
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
