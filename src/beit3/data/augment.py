"""RandAugment as the release fine-tunes VQA and captioning with it: two of ten operations, each done half of the time.

Across the border: uint8 [3, H, W] RGB in and out; all chance comes from the given numpy generator.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

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


def rand_augment(image: Tensor, rng: np.random.Generator, *, count: int = 2) -> Tensor:
    """`count` operations drawn with replacement, each applied with probability one half, signs at random."""
    for choice in rng.integers(len(OPERATIONS), size=count).tolist():
        applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        if applied:
            image = OPERATIONS[choice](image, sign)
    return image


def _affine(image: Tensor, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Shears about the upper left corner, as the release's warps do."""
    return F.affine(
        image, angle=0.0, translate=list(shift), scale=1.0, shear=list(shear), interpolation=InterpolationMode.BILINEAR,
        fill=FILL, center=[0.0, 0.0],
    )  # fmt: skip


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
    lambda image, sign: F.rotate(image, sign * TURN, interpolation=InterpolationMode.BILINEAR, fill=FILL),
)
"""Identity, auto-contrast, equalise, brightness, sharpness, shears, shifts, rotation: no solarising, no colors."""
