"""What the release does to fine-tuning pictures: its RandAugment for VQA and captioning, timm's and erasing for ImageNet.

Shapes: uint8 [3, H, W] RGB in and out, of erasing normalised float [B, 3, S, S]; all chance comes from the given
numpy generator.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit3.data.views.transforms import IMAGENET

MAGNITUDE = 0.7
"""7 of 10, the release's."""

FILL = [128.0, 128.0, 128.0]
ENHANCE = 1.8 * MAGNITUDE + 0.1
"""Factor of brightness and sharpness: 1.36; 1 changes nothing."""

SHEAR = math.degrees(math.atan(0.3 * MAGNITUDE))
SHIFT = round(10 * MAGNITUDE)
"""Pixels, whatever the size of the picture."""

TURN = 30 * MAGNITUDE
"""Degrees."""

LEVEL, LEVEL_STD = 0.9, 0.05
"""Mean and deviation of a strength between 0 and 1: m9-mstd0.5 of 10."""

IMAGENET_FILL = [float(round(255 * mean)) for mean in IMAGENET[0]]
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = 0.3
"""Height over width at least, and at most its inverse."""

ERASE_TRIES = 10

Erased = tuple[int, int, np.ndarray]
"""A box of a picture: top, left, and the standard normal noise [3, h, w] that a normalised picture holds there."""


def rand_augment(image: Tensor, rng: np.random.Generator, *, count: int = 2) -> Tensor:
    """`count` operations drawn with replacement, each applied with probability one half, signs at random."""
    image = image.contiguous()  # auto-contrast of interleaved colors takes five times as long
    for choice in rng.integers(len(OPERATIONS), size=count).tolist():
        applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        if applied:
            image = OPERATIONS[choice](image, sign)
    return image


def auto_augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """timm's rand-m9-mstd0.5-inc1: two of `INCREASING` with replacement, each applied with probability one half.

    Strengths are normal(0.9, 0.05) cut to 0 and 1, signs at random. Goes by Pillow, as timm does: torchvision warps
    tensors bilinearly at best, and the recipe's interpolation is bicubic.
    """
    picture = F.to_pil_image(image)
    operations = list(INCREASING.values())
    for choice in rng.integers(len(operations), size=2).tolist():
        applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        strength = min(max(rng.normal(LEVEL, LEVEL_STD), 0.0), 1.0)
        if applied:
            picture = operations[choice](picture, sign * strength)
    return F.pil_to_tensor(picture)


def random_erasing(image: Tensor, rng: np.random.Generator, *, rate: float = 0.25) -> Erased | None:
    """At `rate` a box of [3, S, S] and the noise for it; a box that does not fit is drawn anew."""
    # torchvision's RandomErasing draws from torch's global generator, and aspects up to 3.3.
    if rng.random() >= rate:
        return None
    height, width = image.shape[-2:]
    limit = math.log(1 / ERASED_ASPECT)
    for _ in range(ERASE_TRIES):
        area, aspect = (
            height * width * rng.uniform(*ERASED_AREA),
            math.exp(rng.uniform(-limit, limit)),
        )
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
            return top, left, rng.standard_normal((len(image), tall, wide), dtype=np.float32)
    return None


def erase(pixels: Tensor, erased: Sequence[Erased | None]) -> Tensor:
    """Normalised [B, 3, S, S], a copy in which the boxes of `random_erasing` hold their noise."""
    pixels = pixels.clone()
    for image, box in zip(pixels, erased, strict=True):
        if box is not None:
            top, left, noise = box
            image[:, top : top + noise.shape[1], left : left + noise.shape[2]] = torch.from_numpy(
                noise
            ).to(image, non_blocking=True)
    return pixels


def _affine(
    image: Tensor, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Shears about the upper left corner, as the release's warps do."""
    return F.affine(
        image,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=FILL,
        center=[0.0, 0.0],
    )


OPERATIONS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda image, sign: image,
    lambda image, sign: F.autocontrast(image),
    lambda image, sign: F.equalize(image),
    lambda image, sign: F.adjust_brightness(image, ENHANCE),
    lambda image, sign: F.adjust_sharpness(image, ENHANCE),
    lambda image, sign: _affine(image, shear=(sign * SHEAR, 0.0)),
    lambda image, sign: _affine(image, shear=(0.0, sign * SHEAR)),
    lambda image, sign: _affine(image, shift=(sign * SHIFT, 0)),
    lambda image, sign: _affine(image, shift=(0, sign * SHIFT)),
    lambda image, sign: F.rotate(
        image, sign * TURN, interpolation=InterpolationMode.BILINEAR, fill=FILL
    ),
)
"""Identity, auto-contrast, equalise, brightness, sharpness, shears, shifts, rotation: no solarising, no colors."""


def _warp(
    picture: Image.Image,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Image.Image:
    """Shift in pixels, shear as a factor of the distance to the upper left corner; the mean color comes in."""
    degrees = [math.degrees(math.atan(factor)) for factor in shear]
    return F.affine(
        picture,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=degrees,
        interpolation=InterpolationMode.BICUBIC,
        fill=IMAGENET_FILL,
        center=[0.0, 0.0],
    )


def _lighten_dark(picture: Image.Image, amount: int) -> Image.Image:
    return picture.point(lambda value: min(255, value + amount) if value < 128 else value)


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """Full strength leaves 0 bits, a black picture, which `F.posterize` refuses with newer Pillow."""
    return picture.point(lambda value: value & -(1 << (8 - bits)))


INCREASING: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto-contrast": lambda picture, strength: F.autocontrast(picture),
    "equalize": lambda picture, strength: F.equalize(picture),
    "invert": lambda picture, strength: F.invert(picture),
    "rotate": lambda picture, strength: F.rotate(
        picture, 30 * strength, interpolation=InterpolationMode.BICUBIC, fill=IMAGENET_FILL
    ),
    "posterize": lambda picture, strength: _posterize(picture, 4 - int(4 * abs(strength))),
    "solarize": lambda picture, strength: F.solarize(picture, 256 - int(256 * abs(strength))),
    "solarize-add": lambda picture, strength: _lighten_dark(picture, int(110 * abs(strength))),
    "color": lambda picture, strength: F.adjust_saturation(picture, 1 + 0.9 * strength),
    "contrast": lambda picture, strength: F.adjust_contrast(picture, 1 + 0.9 * strength),
    "brightness": lambda picture, strength: F.adjust_brightness(picture, 1 + 0.9 * strength),
    "sharpness": lambda picture, strength: F.adjust_sharpness(picture, 1 + 0.9 * strength),
    "shear-x": lambda picture, strength: _warp(picture, shear=(0.3 * strength, 0.0)),
    "shear-y": lambda picture, strength: _warp(picture, shear=(0.0, 0.3 * strength)),
    "shift-x": lambda picture, strength: _warp(
        picture, shift=(0.45 * strength * picture.width, 0.0)
    ),
    "shift-y": lambda picture, strength: _warp(
        picture, shift=(0.0, 0.45 * strength * picture.height)
    ),
}
"""timm's "increasing" operations of a strength between -1 and 1. Strength 0 changes nothing where it means anything, but
posterising keeps 4 bits there."""
