"""Pictures with a label for every pixel: reading, and the views of semantic segmentation.

Shapes: uint8 [3, H, W] RGB and its label map [H, W], uint8 or int32, in which `ignore` marks pixels without a
label. All chance comes from the given numpy generator. The training view is mmseg's for ADE20K, which ViT-Adapter uses.
"""

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit3.files import parse_tar_member, read_tar_member
from beit3.images import MAX_BYTES, MAX_PIXELS, UNREADABLE, open_image

IGNORE = 255

CROP_TRIES = 10
BRIGHTNESS = 32
"""At most added to every value of 0 to 255 (this and the next two: SSD, arXiv:1512.02325, as mmseg has them)."""

FACTORS = (0.5, 1.5)
"""Of contrast and of saturation."""

HUE = 0.1
"""Of the whole circle, either way: 18 of OpenCV's 180."""

INDEXED = {"1", "L", "P", "I", "I;16", "I;16B"}
"""Pillow's modes of one whole number a pixel; of a palette it is the index, whatever the colour."""


@dataclass(frozen=True)
class SceneView:
    """The training view: resized by the long-short rule times a factor, cropped, mirrored, distorted."""

    crop: int = 896
    short: int = 896
    long: int = 3584
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor."""
    largest_share: float = 0.75
    """A crop in which one class has that much of the labelled pixels is drawn anew, up to `CROP_TRIES` times."""
    flip: float = 0.5
    distort: bool = True
    """Whether brightness, contrast, saturation and hue change."""

    def __call__(
        self, image: Tensor, labels: Tensor, rng: np.random.Generator, *, ignore: int = IGNORE
    ) -> tuple[Tensor, Tensor]:
        """At most `crop` pixels a side: what is smaller stays so, for `pad` to fill once pixels are normalised."""
        height, width = fitted(
            *labels.shape, short=self.short, long=self.long, factor=rng.uniform(*self.scale)
        )
        image, labels = resized(image, height, width), nearest(labels, height, width)
        top, left = self.corner(labels, rng, ignore)
        image, labels = (
            each[..., top : top + self.crop, left : left + self.crop] for each in (image, labels)
        )
        if rng.random() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        return distorted(image, rng) if self.distort else image, labels

    def corner(self, labels: Tensor, rng: np.random.Generator, ignore: int) -> tuple[int, int]:
        """Top and left of a crop in which no class has too large a share, or of the last that was tried."""
        top = left = 0
        for _ in range(CROP_TRIES if self.largest_share < 1 else 1):
            top, left = (int(rng.integers(max(0, side - self.crop) + 1)) for side in labels.shape)
            found = labels[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(found[found != ignore].long())
            if (counts > 0).sum() > 1 and counts.max() < self.largest_share * counts.sum():
                break
        return top, left


def pad(
    pixels: Tensor, labels: Tensor, size: int, *, ignore: int = IGNORE
) -> tuple[Tensor, Tensor]:
    """Pixels [3, H, W] and labels [H, W] filled up to a square at the bottom and on the right, with 0 and `ignore`."""
    down, right = size - labels.shape[0], size - labels.shape[1]
    return F.pad_image(pixels, [0, 0, right, down], fill=0.0), F.pad_image(
        labels[None], [0, 0, right, down], fill=float(ignore)
    )[0]


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each at one half; contrast before or after the last two: uint8 [3, H, W]."""
    pixels = image.float()
    if rng.random() < 0.5:
        pixels = (pixels + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast = rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    early = rng.random() < 0.5
    if early:
        pixels = (pixels * contrast).clamp(0, 255)
    if rng.random() < 0.5:
        pixels = saturated(pixels, rng.uniform(*FACTORS))
    if rng.random() < 0.5:
        pixels = F.adjust_hue(pixels / 255, rng.uniform(-HUE, HUE)) * 255
    if not early:
        pixels = pixels * contrast
    return pixels.clamp(0, 255).round().to(torch.uint8)


def saturated(pixels: Tensor, factor: float) -> Tensor:
    """Hue and value kept, saturation times `factor` but at most full: float [3, H, W], 0 to 255."""
    value = pixels.amax(0)
    span = value - pixels.amin(0)
    factors = torch.full_like(value, factor).minimum(value / span.clamp(min=1e-6))
    return value - (value - pixels) * factors


# Sizes ---------------------------------------------------------------------------------------------------------------


def fitted(
    height: int, width: int, *, short: float, long: float, factor: float = 1.0
) -> tuple[int, int]:
    """The size whose shorter side is `short`, or whose longer is `long` where that is less, times `factor`; aspect kept."""
    scale = factor * min(short / min(height, width), long / max(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def evaluation_size(
    height: int, width: int, *, short: float, long: float, multiple: int
) -> tuple[int, int]:
    """`fitted`, with both sides rounded up to a multiple."""
    tall, wide = fitted(height, width, short=short, long=long)
    return -(-tall // multiple) * multiple, -(-wide // multiple) * multiple


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], bilinear and antialiased."""
    return F.resize_image(image, [height, width], InterpolationMode.BILINEAR, antialias=True)


def nearest(labels: Tensor, height: int, width: int) -> Tensor:
    """[H, W] -> [height, width] of any type: the label at the middle of every new pixel."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows][:, columns]


# Files ---------------------------------------------------------------------------------------------------------------


def open_scene(
    image: str | Path,
    label_map: str | Path | io.BytesIO,
    *,
    num_classes: int,
    reduce_zero: bool = False,
    unlabelled: Collection[int] = (),
    lookup: Sequence[int] = (),
    ignore: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """A picture and its label map. ValueError naming the file where one cannot be read, or they differ in size."""
    pixels = open_image(image)
    options: dict[str, Any] = {
        "reduce_zero": reduce_zero,
        "unlabelled": unlabelled,
        "lookup": lookup,
        "ignore": ignore,
    }
    labels = open_label_map(label_map, num_classes=num_classes, **options)
    if pixels.shape[1:] != labels.shape:
        (height, width), (tall, wide) = pixels.shape[1:], labels.shape
        raise ValueError(
            f"label map {label_map} is {wide} x {tall}, its image {image} {width} x {height}: give pairs of one size"
        )
    return pixels, labels


def open_label_map(
    path: str | Path | io.BytesIO,
    *,
    num_classes: int,
    reduce_zero: bool = False,
    unlabelled: Collection[int] = (),
    lookup: Sequence[int] = (),
    ignore: int = IGNORE,
) -> Tensor:
    """Labels [H, W] in 0..num_classes - 1 or `ignore`, uint8 where they fit, else int32.

    reduce_zero: 0 in the file means unlabelled, k is class k - 1 (ADE20K). unlabelled: other values of the file that mean
    so, beside `ignore`. lookup: the label of each number of the file, before all that. ValueError naming the file for any
    other value, and for files that are not a whole number a pixel.
    """
    if 0 <= ignore < num_classes:
        raise ValueError(
            f"the label {ignore} for ignored pixels is one of the {num_classes} classes: give another"
        )
    values = read_indices(path)
    if lookup:
        if values.max(initial=0) >= len(lookup):
            raise ValueError(
                f"label map {path} holds {values.max()}, its data set has numbers up to {len(lookup) - 1}: give its own files"
            )
        values = np.asarray(lookup)[values]
    hidden = np.isin(values, [ignore, *unlabelled, *([0] if reduce_zero else [])])
    labels = np.where(hidden, ignore, values - reduce_zero)
    wrong = labels[~hidden & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        first = int(wrong[0]) + reduce_zero
        remedy = "give the number of classes that the files have, or name the value as unlabelled"
        raise ValueError(
            f"label map {path} holds {first}, beyond its {num_classes} classes{' from 1 on' * reduce_zero}: {remedy}"
        )
    return torch.from_numpy(
        labels.astype(np.uint8 if max(ignore, num_classes - 1) <= 255 else np.int32)
    )


def read_indices(path: str | Path | io.BytesIO) -> np.ndarray:
    """The numbers of a picture of one channel, [H, W] int64: grey of 1 to 16 bits, or indices into a palette."""
    try:
        data = path.getvalue() if isinstance(path, io.BytesIO) else _bytes(path)
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            mode, values = picture.mode, np.asarray(picture)
    except Image.DecompressionBombError:
        raise ValueError(
            f"label map {path} has more than {MAX_PIXELS} pixels: make it smaller"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read label map {path}: {error.strerror or error}") from error
    except UNREADABLE as error:
        raise ValueError(f"label map {path} cannot be read: {error}") from error
    if mode not in INDEXED:
        raise ValueError(
            f"label map {path} is a picture of mode {mode}: give one number a pixel, 8 or 16 bits of grey or a palette"
        )
    return values.astype(np.int64) // _spread(data, mode)


def _bytes(path: str | Path) -> bytes:
    tar, start, size = parse_tar_member(str(path))
    if tar:
        return read_tar_member(tar, start, size)
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return path.read_bytes()


def _spread(data: bytes, mode: str) -> int:
    """What Pillow multiplies grey values of 2 or 4 bits by, to make white 255: 85 or 17. PNG keeps the bits in byte 24."""
    bits = data[24] if data.startswith(b"\x89PNG") and mode == "L" else 8
    return 255 // (2**bits - 1)
