"""Geometry of pictures with objects: large-scale jitter for training, and padding to a square.

Large-scale jitter as ViTDet trains with it (arXiv:2203.16527, appendix; detectron2's configuration): mirror, scale, crop.
uint8 pictures [3, H, W] and objects in, a view [3, h, w] and what it shows out; boxes float32 [n, 4], x1 y1 x2 y2 in pixels,
labels int64 [n], masks uint8 [n, h, w]. All chance comes from the given numpy generator. Resizing is antialiased.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from beit3.data.stores.rle import RLE, Segmentation, area, decode, encode, extent, rasterise, united
from beit3.data.views.transforms import fitting

MIN_SIDE = 1.0
"""Pixels of the view: where only boxes are known, one that is narrower or lower after clipping is dropped."""


@dataclass(frozen=True)
class Objects:
    """What a picture shows: boxes, labels, and polygons or an RLE of each; None where only boxes are known."""

    boxes: Tensor
    labels: Tensor
    segmentations: Sequence[Segmentation] | None = None

    def __post_init__(self) -> None:
        assert self.boxes.shape == (len(self.labels), 4), (self.boxes.shape, self.labels.shape)
        assert self.segmentations is None or len(self.segmentations) == len(self.labels), (
            "one segmentation for each object"
        )


@dataclass(frozen=True)
class Visible:
    """What a view shows of the objects: boxes, labels, and masks, or None where only boxes are known."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


def large_scale_jitter(
    image: Tensor,
    objects: Objects,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: float = 0.5,
) -> tuple[Tensor, Visible]:
    """A view of at most `size` x `size`: uint8 [3, h, w], and what it shows.

    Mirrored at rate `flip`; scaled by a uniform factor within `scale` of what fits into the square; cropped where larger, at a
    place drawn for each axis by itself (detectron2 draws one number for both, which gives diagonal crops). Boxes are those of
    the masks within the view, or clipped where there are none; objects that are not seen are dropped.
    """
    height, width = image.shape[-2:]
    mirrored = bool(flip) and rng.random() < flip
    factor = scale[0] + (scale[1] - scale[0]) * rng.random()
    tall, wide = fitting(height, width, size * factor)
    shape = min(tall, size), min(wide, size)
    corner = int(rng.integers(tall - shape[0] + 1)), int(rng.integers(wide - shape[1] + 1))
    view = View((height, width), (tall, wide), corner, shape, mirrored)
    return view.image(image), view.objects(objects)


def pad_square(pixels: Tensor, size: int) -> Tensor:
    """Pixels [3, h, w] -> [3, size, size]: zeros fill up at the bottom and on the right. Of normalised pixels they are the mean colour."""
    height, width = pixels.shape[-2:]
    assert max(height, width) <= size, (height, width, size)
    return F.pad(pixels, (0, size - width, 0, size - height))


@dataclass(frozen=True)
class View:
    """A picture of `size`, mirrored or not, resized to `scaled`, of which `shape` from `corner` on is kept; all (y, x) in pixels."""

    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    shape: tuple[int, int]
    mirrored: bool = False

    def image(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> [3, h, w]."""
        (top, left), (height, width) = self.corner, self.shape
        image = _resized(image.flip(-1) if self.mirrored else image, *self.scaled)
        return image[:, top : top + height, left : left + width]

    def objects(self, objects: Objects) -> Visible:
        """What of them is seen; masks are drawn within the view alone, one byte per pixel and object."""
        height, width = self.shape
        if objects.segmentations is None:
            boxes = (
                self.boxes(objects.boxes)
                .clamp(min=0)
                .minimum(torch.tensor([width, height, width, height]))
            )
            seen = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1)
            return Visible(boxes[seen], objects.labels[seen])
        drawn = [self.draw(segmentation) for segmentation in objects.segmentations]
        seen = torch.tensor([area(rle) > 0 for rle in drawn], dtype=torch.bool)
        drawn = [rle for rle in drawn if area(rle) > 0]
        masks = torch.empty(len(drawn), height, width, dtype=torch.uint8)
        for mask, rle in zip(masks, drawn, strict=True):
            mask.copy_(decode(rle))
        return Visible(
            torch.tensor([extent(rle) for rle in drawn]).float().view(-1, 4),
            objects.labels[seen],
            masks,
        )

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes [n, 4] of the picture -> of the view, not clipped to it."""
        x1, y1, x2, y2 = boxes.unbind(1)
        if self.mirrored:
            x1, x2 = self.size[1] - x2, self.size[1] - x1
        (by_y, by_x), (top, left) = self._scale(), self.corner
        return torch.stack(
            [x1 * by_x - left, y1 * by_y - top, x2 * by_x - left, y2 * by_y - top], 1
        )

    def draw(self, segmentation: Segmentation) -> RLE:
        """What the view shows of one object. Polygons are moved, then drawn; pixels of an RLE are taken where they are nearest."""
        if isinstance(segmentation, list):
            return united([self._moved(polygon) for polygon in segmentation], *self.shape)
        mask = rasterise(segmentation, *self.size)
        (rows, columns) = (
            ((torch.arange(count) + start + 0.5) / factor).long().clamp(max=side - 1)
            for count, start, factor, side in zip(
                self.shape, self.corner, self._scale(), self.size, strict=True
            )
        )
        return encode((mask.flip(-1) if self.mirrored else mask)[rows][:, columns])

    def _moved(self, polygon: Sequence[float]) -> list[float]:
        """A polygon x1, y1, x2, y2, ... in the view's pixels."""
        (by_y, by_x), (top, left), width = self._scale(), self.corner, self.size[1]
        moved = [number * by_y - top for number in polygon]
        moved[::2] = [
            (width - number if self.mirrored else number) * by_x - left for number in polygon[::2]
        ]
        return moved

    def _scale(self) -> tuple[float, float]:
        return self.scaled[0] / self.size[0], self.scaled[1] / self.size[1]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]."""
    if image.shape[-2:] == (height, width):
        return image
    return V.resize_image(image, [height, width], InterpolationMode.BICUBIC, antialias=True)
