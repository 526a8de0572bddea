"""Finding objects in one or several views of each image. Views [B, 3, S, S] -> boxes in the images'
pixels, scores, masks as RLE.

Views of other sizes, and mirrored ones, are merged as detectron2 does: the boxes of all are laid
over the image and go through
ONE Soft-NMS; then every view reads the masks of the boxes that are left, and their probabilities
are averaged. One view is the
same with nothing to merge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beit3.data.stores.rle import RLE
from beit3.detection.cascade import BoxPredictions
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.masks import paste_masks
from beit3.detection.nms import soft_nms
from beit3.ops.precision import promote_to_float32

Kept = tuple[Tensor, Tensor, Tensor]
"""Boxes [n, 4], scores [n] and labels [n] of an image, best first."""


@dataclass(frozen=True)
class ImageView:
    """Pixels [B, 3, S, S], whose valid areas `sizes` [B, 2] (height, width) are at the top left;
    the rest is padding."""

    pixels: Tensor
    sizes: Tensor
    mirrored: bool = False


@dataclass(frozen=True)
class Detections:
    """One image's, on the CPU, best first: boxes float32 [n, 4] (x1 y1 x2 y2, the image's pixels),
    scores [n], labels [n].

    `masks` are of the image's size, one for each box; None where only boxes are learnt.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: list[RLE] | None


@torch.no_grad()
def detect_objects(
    trunk: Callable[[Tensor], Tensor],
    detector: Detector,
    views: Sequence[ImageView],
    originals: Tensor,
    config: DetectorConfig,
) -> list[Detections]:
    """The objects of each image; `originals` [B, 2] are the images' own heights and widths.

    ValueError where the network gives numbers that are not finite.
    """
    pyramids = [detector.pyramid(trunk(view.pixels)) for view in views]  # kept for the masks
    raws = [detector.detect(maps, view.sizes) for maps, view in zip(pyramids, views, strict=True)]
    images = originals.tolist()
    kept = [
        _merged([raw[place] for raw in raws], views, place, size, config)
        for place, size in enumerate(images)
    ]
    masks = (
        _masks(detector, pyramids, views, kept, images) if config.masks else [None] * len(images)
    )
    return [
        Detections(boxes.cpu(), scores.cpu(), labels.cpu(), own)
        for (boxes, scores, labels), own in zip(kept, masks, strict=True)
    ]


def flip_view(view: ImageView) -> ImageView:
    """The view with each valid area mirrored, left with right; the padding stays where it is."""
    columns = torch.arange(view.pixels.shape[-1], device=view.pixels.device)
    widths = view.sizes[:, 1:].to(columns.device)
    source = torch.where(columns < widths, widths - 1 - columns, columns)  # [B, S]
    return ImageView(
        view.pixels.gather(3, source[:, None, None].expand_as(view.pixels)),
        view.sizes,
        not view.mirrored,
    )


def _merged(
    raws: Sequence[BoxPredictions],
    views: Sequence[ImageView],
    place: int,
    size: Sequence[int],
    config: DetectorConfig,
) -> Kept:
    """What is left of one image's boxes in all views."""
    boxes = torch.cat(
        [
            _to_image(promote_to_float32(raw.boxes), view, place, size)
            for raw, view in zip(raws, views, strict=True)
        ]
    )
    scores = torch.cat([promote_to_float32(raw.scores) for raw in raws])
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError(
            "the detector gave boxes or scores that are not finite: take an earlier checkpoint, "
            "or float32"
        )
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return soft_nms(
        boxes[solid],
        scores[solid],
        kind=config.nms,
        iou=config.nms_iou,
        sigma=config.nms_sigma,
        min_score=config.min_score,
        candidate_score=config.candidate_score,
        limit=config.detections_per_image,
    )


def _masks(
    detector: Detector,
    pyramids: Sequence[list[Tensor]],
    views: Sequence[ImageView],
    kept: Sequence[Kept],
    images: Sequence[Sequence[int]],
) -> list[list[RLE] | None]:
    """Each image's masks, averaged over the views and drawn at its own size."""
    labels = [label for _, _, label in kept]
    if not sum(map(len, labels)):
        return [[] for _ in images]
    sums: list[Tensor] = []
    for maps, view in zip(pyramids, views, strict=True):
        boxes = [
            _to_view(own, view, place, size)
            for place, ((own, _, _), size) in enumerate(zip(kept, images, strict=True))
        ]
        read = [
            promote_to_float32(part.flip(-1) if view.mirrored else part)
            for part in detector.masks(maps, boxes, labels)
        ]
        sums = [total + part for total, part in zip(sums, read, strict=True)] if sums else read
    return [
        paste_masks(total / len(views), boxes, *size)
        for total, (boxes, _, _), size in zip(sums, kept, images, strict=True)
    ]


def _to_image(boxes: Tensor, view: ImageView, place: int, size: Sequence[int]) -> Tensor:
    """Boxes [n, 4] in the pixels of image `place` of a view -> in its own, clipped to its `size`
    (height, width)."""
    scale, bounds = _scale(boxes, view, place, size)
    boxes = _mirrored(boxes, int(view.sizes[place, 1])) if view.mirrored else boxes
    return (boxes * scale).clamp(min=0).minimum(bounds)


def _to_view(boxes: Tensor, view: ImageView, place: int, size: Sequence[int]) -> Tensor:
    """The way back: boxes [n, 4] in the image's own pixels -> in the view's."""
    boxes = boxes / _scale(boxes, view, place, size)[0]
    return _mirrored(boxes, int(view.sizes[place, 1])) if view.mirrored else boxes


def _scale(
    boxes: Tensor, view: ImageView, place: int, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Own pixels per pixel of the view, and the image's bounds: [4] each, for x1 y1 x2 y2."""
    (height, width), (tall, wide) = size, view.sizes[place].tolist()
    return boxes.new_tensor([width / wide, height / tall] * 2), boxes.new_tensor(
        [width, height] * 2
    )


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes [n, 4] in an area of that width, left with right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)
