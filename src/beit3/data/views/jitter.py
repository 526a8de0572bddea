"""Large-scale jitter of images with objects for detection, and padding to a square.

Large-scale jitter as ViTDet trains with it (arXiv:2203.16527, appendix; detectron2's
configuration): flip, scale, crop. Images are uint8 [3, H, W]. Boxes are float32 [n, 4] with x1, y1,
x2, y2 in pixels, labels int64 [n], masks uint8 [n, h, w]. Resizing is antialiased. All randomness
comes from the numpy generator that is passed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.stores.rle import (
    RLE,
    Segmentation,
    compute_area,
    compute_box,
    decode_rle,
    encode_rle,
    merge_polygons,
    rasterize,
)
from beit3.data.views.preprocessing import fit_longer_side, resize

MIN_SIDE = 1.0
"""Smallest width and height in pixels of a clipped box, where no masks are known."""


@dataclass(frozen=True)
class ObjectAnnotations:
    """The objects of an image: boxes, labels, and polygons or an RLE of each if known."""

    boxes: Tensor
    labels: Tensor
    segmentations: Sequence[Segmentation] | None = None

    def __post_init__(self) -> None:
        assert self.boxes.shape == (len(self.labels), 4), (self.boxes.shape, self.labels.shape)
        assert self.segmentations is None or len(self.segmentations) == len(self.labels), (
            "one segmentation for each object"
        )


@dataclass(frozen=True)
class VisibleObjects:
    """The objects that are visible in a crop: boxes, labels, and masks if known."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


def large_scale_jitter(
    image: Tensor,
    objects: ObjectAnnotations,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: float = 0.5,
) -> tuple[Tensor, VisibleObjects]:
    """Flips, scales and crops an image with its objects.

    The position of the crop is drawn for each axis by itself. (detectron2 draws one number for
    both, which gives diagonal crops.)

    Args:
        image: uint8 [3, H, W].
        objects: The image's objects.
        rng: Random generator.
        size: Largest side of the result in pixels.
        scale: Range of the factor by which the image is scaled from the size that fits.
        flip: Probability of a horizontal flip.

    Returns:
        The crop, uint8 [3, h, w], and the objects in it. Boxes are those of the visible masks, or
        clipped where there are no masks. Objects that are not visible are dropped.
    """
    height, width = image.shape[-2:]
    flipped = bool(flip) and rng.random() < flip
    factor = scale[0] + (scale[1] - scale[0]) * rng.random()
    resized_height, resized_width = fit_longer_side(height, width, size * factor)
    crop_height, crop_width = min(resized_height, size), min(resized_width, size)
    top = int(rng.integers(resized_height - crop_height + 1))
    left = int(rng.integers(resized_width - crop_width + 1))
    transform = FlipResizeCrop(
        image_size=(height, width),
        resized_size=(resized_height, resized_width),
        crop_corner=(top, left),
        crop_size=(crop_height, crop_width),
        flipped=flipped,
    )
    return transform.transform_image(image), transform.transform_objects(objects)


def pad_to_square(pixels: Tensor, size: int) -> Tensor:
    """Pads pixels [3, h, w] with zeros at the bottom and the right to [3, size, size].

    In normalized pixels, zero is the mean color.
    """
    height, width = pixels.shape[-2:]
    assert max(height, width) <= size, (height, width, size)
    return F.pad(pixels, (0, size - width, 0, size - height))


@dataclass(frozen=True)
class FlipResizeCrop:
    """A horizontal flip, a resize and a crop, in this order. All sizes are (y, x) in pixels."""

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop_corner: tuple[int, int]
    crop_size: tuple[int, int]
    flipped: bool = False

    def transform_image(self, image: Tensor) -> Tensor:
        """Returns the crop of an image, uint8 [3, H, W] -> [3, h, w]."""
        (top, left), (height, width) = self.crop_corner, self.crop_size
        image = resize(image.flip(-1) if self.flipped else image, *self.resized_size)
        return image[:, top : top + height, left : left + width]

    def transform_objects(self, objects: ObjectAnnotations) -> VisibleObjects:
        """Returns the objects that are visible in the crop.

        Masks are drawn in the crop alone, with one byte per pixel and object.
        """
        if objects.segmentations is None:
            return self._clip_boxes(objects)
        rles = [self.transform_segmentation(item) for item in objects.segmentations]
        visible = torch.tensor([compute_area(rle) > 0 for rle in rles], dtype=torch.bool)
        rles = [rle for rle in rles if compute_area(rle) > 0]
        masks = torch.empty(len(rles), *self.crop_size, dtype=torch.uint8)
        for mask, rle in zip(masks, rles, strict=True):
            mask.copy_(decode_rle(rle))
        boxes = torch.tensor([compute_box(rle) for rle in rles]).float().view(-1, 4)
        return VisibleObjects(boxes, objects.labels[visible], masks)

    def transform_boxes(self, boxes: Tensor) -> Tensor:
        """Moves boxes [n, 4] of the image into the crop's pixels, without clipping them."""
        x1, y1, x2, y2 = boxes.unbind(1)
        if self.flipped:
            x1, x2 = self.image_size[1] - x2, self.image_size[1] - x1
        (scale_y, scale_x), (top, left) = self._scale, self.crop_corner
        moved = [x1 * scale_x - left, y1 * scale_y - top, x2 * scale_x - left, y2 * scale_y - top]
        return torch.stack(moved, 1)

    def transform_segmentation(self, segmentation: Segmentation) -> RLE:
        """Returns the visible pixels of one object.

        Polygons are moved, then drawn. Pixels of an RLE are taken where they are nearest.
        """
        if isinstance(segmentation, list):
            polygons = [self._transform_polygon(polygon) for polygon in segmentation]
            return merge_polygons(polygons, *self.crop_size)
        mask = rasterize(segmentation, *self.image_size)
        if self.flipped:
            mask = mask.flip(-1)
        rows, columns = (
            ((torch.arange(count) + start + 0.5) / scale).long().clamp(max=side - 1)
            for count, start, scale, side in zip(
                self.crop_size, self.crop_corner, self._scale, self.image_size, strict=True
            )
        )
        return encode_rle(mask[rows][:, columns])

    @property
    def _scale(self) -> tuple[float, float]:
        """Resized size / image size of each axis."""
        (height, width), (resized_height, resized_width) = self.image_size, self.resized_size
        return resized_height / height, resized_width / width

    def _clip_boxes(self, objects: ObjectAnnotations) -> VisibleObjects:
        """Clips boxes to the crop and drops those that become too small."""
        height, width = self.crop_size
        limits = torch.tensor([width, height, width, height])
        boxes = self.transform_boxes(objects.boxes).clamp(min=0).minimum(limits)
        visible = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1)
        return VisibleObjects(boxes[visible], objects.labels[visible])

    def _transform_polygon(self, polygon: Sequence[float]) -> list[float]:
        """Moves a polygon x1, y1, x2, y2, ... into the crop's pixels."""
        (scale_y, scale_x), (top, left) = self._scale, self.crop_corner
        xs = polygon[::2]
        if self.flipped:
            xs = [self.image_size[1] - x for x in xs]
        moved = [value * scale_y - top for value in polygon]
        moved[::2] = [x * scale_x - left for x in xs]
        return moved
