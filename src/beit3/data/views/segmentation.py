"""Augmentation and resizing of images together with their label maps, for semantic segmentation.

An image is uint8 [3, H, W] RGB. Its label map is [H, W], uint8 or int32, in which `ignore` marks
pixels without a label. All randomness comes from the numpy generator that is passed in. The
training augmentation is mmseg's for ADE20K, which ViT-Adapter uses.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit3.data.views.label_maps import IGNORE_INDEX

CROP_TRIES = 10
"""How often a crop is drawn again in which one class covers too much."""

# Changes of color: SSD's (arXiv:1512.02325) as mmseg has them.

MAX_BRIGHTNESS_CHANGE = 32
"""Largest value that is added to pixels of 0 to 255."""

FACTORS = (0.5, 1.5)
"""Range of the factors of contrast and saturation."""

MAX_HUE_CHANGE = 0.1
"""Fraction of the color circle, in both directions: 18 of OpenCV's 180."""


# Augmentation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Resizes by a random factor, crops, flips and changes colors of an image and its label map."""

    crop: int = 896
    """Side of the crop in pixels."""
    short: int = 896
    """The image is resized to this shorter side, unless the longer one would exceed `long`."""
    long: int = 3584
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor by which that size is multiplied."""
    largest_share: float = 0.75
    """A crop in which one class has at least this fraction of the labeled pixels is drawn again, up
    to `CROP_TRIES` times."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    distort: bool = True
    """Whether brightness, contrast, saturation and hue change."""

    def __call__(
        self, image: Tensor, labels: Tensor, rng: np.random.Generator, *, ignore: int = IGNORE_INDEX
    ) -> tuple[Tensor, Tensor]:
        """Augments an image and its label map.

        The result has at most `crop` pixels a side. A smaller one stays as it is, to be padded by
        `pad_image_and_labels` after normalization.
        """
        factor = rng.uniform(*self.scale)
        height, width = rescale_size(*labels.shape, short=self.short, long=self.long, factor=factor)
        image, labels = resize_image(image, height, width), resize_labels(labels, height, width)
        top, left = self.sample_corner(labels, rng, ignore)
        bottom, right = top + self.crop, left + self.crop
        image, labels = image[:, top:bottom, left:right], labels[top:bottom, left:right]
        if rng.random() < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        return distort_colors(image, rng) if self.distort else image, labels

    def sample_corner(
        self, labels: Tensor, rng: np.random.Generator, ignore: int
    ) -> tuple[int, int]:
        """Draws top and left of a crop in which no class covers too much.

        Returns the last one that was tried if there is none.
        """
        top = left = 0
        for _ in range(CROP_TRIES if self.largest_share < 1 else 1):
            top, left = (int(rng.integers(max(0, side - self.crop) + 1)) for side in labels.shape)
            crop = labels[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(crop[crop != ignore].long())
            if (counts > 0).sum() > 1 and counts.max() < self.largest_share * counts.sum():
                break
        return top, left


def pad_image_and_labels(
    pixels: Tensor, labels: Tensor, size: int, *, ignore: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Pads pixels [3, H, W] with 0 and labels [H, W] with `ignore`, at the bottom and the right.

    Returns tensors of `size` pixels a side.
    """
    padding = [0, 0, size - labels.shape[1], size - labels.shape[0]]
    pixels = F.pad_image(pixels, padding, fill=0.0)
    return pixels, F.pad_image(labels[None], padding, fill=float(ignore))[0]


def distort_colors(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability one half.

    Contrast changes before or after the last two. uint8 [3, H, W] in and out.
    """
    pixels = image.float()
    if rng.random() < 0.5:
        change = rng.uniform(-MAX_BRIGHTNESS_CHANGE, MAX_BRIGHTNESS_CHANGE)
        pixels = (pixels + change).clamp(0, 255)
    contrast = rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        pixels = (pixels * contrast).clamp(0, 255)
    if rng.random() < 0.5:
        pixels = adjust_saturation(pixels, rng.uniform(*FACTORS))
    if rng.random() < 0.5:
        pixels = F.adjust_hue(pixels / 255, rng.uniform(-MAX_HUE_CHANGE, MAX_HUE_CHANGE)) * 255
    if not contrast_first:
        pixels = pixels * contrast
    return pixels.clamp(0, 255).round().to(torch.uint8)


def adjust_saturation(pixels: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation of float pixels [3, H, W] between 0 and 255, up to its maximum.

    Hue and value are kept.
    """
    value = pixels.amax(0)
    span = value - pixels.amin(0)
    factors = torch.full_like(value, factor).minimum(value / span.clamp(min=1e-6))
    return value - (value - pixels) * factors


# Sizes ----------------------------------------------------------------------------------------


def rescale_size(
    height: int, width: int, *, short: float, long: float, factor: float = 1.0
) -> tuple[int, int]:
    """Scales (height, width) and keeps the aspect ratio.

    The shorter side becomes `short`, or less where the longer one would exceed `long`. Then both
    are multiplied by `factor`.
    """
    scale = factor * min(short / min(height, width), long / max(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def compute_evaluation_size(
    height: int, width: int, *, short: float, long: float, multiple: int
) -> tuple[int, int]:
    """Returns `rescale_size` with both sides rounded up to a multiple of `multiple`."""
    new_height, new_width = rescale_size(height, width, short=short, long=long)
    return -(-new_height // multiple) * multiple, -(-new_width // multiple) * multiple


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Resizes an image, uint8 [3, H, W] -> [3, height, width], bilinearly with antialiasing."""
    return F.resize_image(image, [height, width], InterpolationMode.BILINEAR, antialias=True)


def resize_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Resizes a label map of any type, [H, W] -> [height, width].

    A new pixel gets the label at its center.
    """
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows][:, columns]
