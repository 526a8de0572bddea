"""Detects objects in one or several views of each image (test-time augmentation).

Views of other sizes and flipped views are merged as in detectron2: the boxes of all views go
through one Soft-NMS in the image's own pixels. Then every view predicts the masks of the remaining
boxes, and the probabilities are averaged. A single view takes the same path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from beit3.data.stores.rle import RLE
from beit3.detection.cascade import BoxPredictions
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.masks import paste_masks
from beit3.detection.nms import soft_nms
from beit3.ops.precision import promote_to_float32


@dataclass(frozen=True)
class ImageView:
    """A batch of images in the form in which the network sees them once."""

    pixels: Tensor
    """[B, 3, S, S], normalized. The image is at the top left; the rest is padding."""
    sizes: Tensor
    """Height and width of each image in this view, [B, 2]."""
    flipped: bool = False
    """Whether the images are flipped horizontally."""


@dataclass(frozen=True)
class Detections:
    """The detected objects of an image, best first; tensors are on the CPU."""

    boxes: Tensor
    """float32 [n, 4], x1 y1 x2 y2 in the image's own pixels."""
    scores: Tensor
    """[n]."""
    labels: Tensor
    """[n]."""
    masks: list[RLE] | None
    """One per object, of the image's size; None if the detector predicts boxes alone."""


class SelectedBoxes(NamedTuple):
    """The boxes of an image that NMS selected, best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@torch.no_grad()
def detect_objects(
    trunk: Callable[[Tensor], Tensor],
    detector: Detector,
    views: Sequence[ImageView],
    original_sizes: Tensor,
    config: DetectorConfig,
) -> list[Detections]:
    """Detects the objects of each image.

    Args:
        trunk: Returns features [B, h, w, D] of pixels.
        detector: The detector for these features.
        views: The batch of images, once per view.
        original_sizes: Height and width of the images themselves, [B, 2].
        config: The detector's configuration.

    Raises:
        ValueError: If the network's outputs are not finite.
    """
    # Kept until the masks are predicted.
    pyramids = [detector.pyramid(trunk(view.pixels)) for view in views]
    predictions = [
        detector.predict_boxes(maps, view.sizes) for maps, view in zip(pyramids, views, strict=True)
    ]
    sizes = original_sizes.tolist()
    selected = [
        _merge_views([batch[index] for batch in predictions], views, index, size, config)
        for index, size in enumerate(sizes)
    ]
    masks: Sequence[list[RLE] | None] = [None] * len(sizes)
    if config.masks:
        masks = _predict_masks(detector, pyramids, views, selected, sizes)
    return [
        Detections(image.boxes.cpu(), image.scores.cpu(), image.labels.cpu(), image_masks)
        for image, image_masks in zip(selected, masks, strict=True)
    ]


def flip_view(view: ImageView) -> ImageView:
    """Flips each image of a view horizontally; the padding stays where it is."""
    columns = torch.arange(view.pixels.shape[-1], device=view.pixels.device)
    widths = view.sizes[:, 1:].to(columns.device)
    source_columns = torch.where(columns < widths, widths - 1 - columns, columns)  # [B, S]
    pixels = view.pixels.gather(3, source_columns[:, None, None].expand_as(view.pixels))
    return ImageView(pixels, view.sizes, not view.flipped)


def _merge_views(
    predictions: Sequence[BoxPredictions],
    views: Sequence[ImageView],
    index: int,
    size: Sequence[int],
    config: DetectorConfig,
) -> SelectedBoxes:
    """Applies NMS to the boxes that all views predict for the image `index`."""
    boxes = torch.cat(
        [
            _boxes_to_image(promote_to_float32(predicted.boxes), view, index, size)
            for predicted, view in zip(predictions, views, strict=True)
        ]
    )
    scores = torch.cat([promote_to_float32(predicted.scores) for predicted in predictions])
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError(
            "the detector's boxes or scores are not finite: use an earlier checkpoint or float32"
        )
    not_empty = (boxes[:, 2:] > boxes[:, :2]).all(1)
    selected = soft_nms(
        boxes[not_empty],
        scores[not_empty],
        kind=config.nms,
        iou=config.nms_iou,
        sigma=config.nms_sigma,
        min_score=config.min_score,
        candidate_score=config.candidate_score,
        limit=config.detections_per_image,
    )
    return SelectedBoxes(*selected)


def _predict_masks(
    detector: Detector,
    pyramids: Sequence[list[Tensor]],
    views: Sequence[ImageView],
    selected: Sequence[SelectedBoxes],
    sizes: Sequence[Sequence[int]],
) -> list[list[RLE]]:
    """Returns each image's masks, averaged over the views and pasted at the image's own size."""
    labels = [image.labels for image in selected]
    if not sum(map(len, labels)):
        return [[] for _ in sizes]
    sums: list[Tensor] = []
    for maps, view in zip(pyramids, views, strict=True):
        boxes = [
            _boxes_to_view(image.boxes, view, index, size)
            for index, (image, size) in enumerate(zip(selected, sizes, strict=True))
        ]
        masks = detector.predict_masks(maps, boxes, labels)
        if view.flipped:
            masks = [image_masks.flip(-1) for image_masks in masks]
        masks = list(map(promote_to_float32, masks))
        sums = [total + part for total, part in zip(sums, masks, strict=True)] if sums else masks
    return [
        paste_masks(total / len(views), image.boxes, *size)
        for total, image, size in zip(sums, selected, sizes, strict=True)
    ]


def _boxes_to_image(boxes: Tensor, view: ImageView, index: int, size: Sequence[int]) -> Tensor:
    """Maps boxes [n, 4] from a view's pixels to those of image `index`, clipped to its `size`."""
    height, width = size
    if view.flipped:
        boxes = _flip_boxes(boxes, int(view.sizes[index, 1]))
    boxes = boxes * _compute_scale(boxes, view, index, size)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))


def _boxes_to_view(boxes: Tensor, view: ImageView, index: int, size: Sequence[int]) -> Tensor:
    """Maps boxes [n, 4] from the pixels of image `index` to those of a view."""
    boxes = boxes / _compute_scale(boxes, view, index, size)
    return _flip_boxes(boxes, int(view.sizes[index, 1])) if view.flipped else boxes


def _compute_scale(boxes: Tensor, view: ImageView, index: int, size: Sequence[int]) -> Tensor:
    """Returns the image's pixels per pixel of the view, for x1 y1 x2 y2: [4]."""
    view_height, view_width = view.sizes[index].tolist()
    height, width = size
    return boxes.new_tensor([width / view_width, height / view_height] * 2)


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Flips boxes [n, 4] horizontally in an image of the given width."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)
