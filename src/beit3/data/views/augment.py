"""Augmentations of fine-tuning: RandAugment and random erasing.

`rand_augment` is the release's RandAugment for VQA and captioning. `rand_augment_timm` and
`draw_erasing` are timm's RandAugment and random erasing, which the release uses for ImageNet.
Images are uint8 [3, H, W] RGB in and out. All randomness comes from the numpy generator that is
passed in.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD

# RandAugment of the release --------------------------------------------------------------------

MAGNITUDE = 0.7
"""The release's magnitude: 7 of 10."""

GRAY_FILL = [128.0, 128.0, 128.0]
"""Color of pixels that a warp takes from outside the image."""

ENHANCE_FACTOR = 1.8 * MAGNITUDE + 0.1
"""Factor of brightness and sharpness, 1.36; a factor of 1 changes nothing."""

SHEAR_DEGREES = math.degrees(math.atan(0.3 * MAGNITUDE))

SHIFT_PIXELS = round(10 * MAGNITUDE)
"""Translation in pixels, whatever the size of the image."""

ROTATION_DEGREES = 30 * MAGNITUDE


def rand_augment(image: Tensor, rng: np.random.Generator, *, count: int = 2) -> Tensor:
    """Applies `count` operations, drawn with replacement, each with probability one half.

    Directions are random.
    """
    image = image.contiguous()  # auto-contrast of interleaved colors takes five times as long
    for choice in rng.integers(len(OPERATIONS), size=count).tolist():
        is_applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        if is_applied:
            image = OPERATIONS[choice](image, sign)
    return image


def _warp(
    image: Tensor, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Shifts by pixels and shears by degrees about the upper left corner, as the release does."""
    return F.affine(
        image,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=GRAY_FILL,
        center=[0.0, 0.0],
    )


def _rotate(image: Tensor, degrees: float) -> Tensor:
    return F.rotate(image, degrees, interpolation=InterpolationMode.BILINEAR, fill=GRAY_FILL)


OPERATIONS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda image, sign: image,
    lambda image, sign: F.autocontrast(image),
    lambda image, sign: F.equalize(image),
    lambda image, sign: F.adjust_brightness(image, ENHANCE_FACTOR),
    lambda image, sign: F.adjust_sharpness(image, ENHANCE_FACTOR),
    lambda image, sign: _warp(image, shear=(sign * SHEAR_DEGREES, 0.0)),
    lambda image, sign: _warp(image, shear=(0.0, sign * SHEAR_DEGREES)),
    lambda image, sign: _warp(image, shift=(sign * SHIFT_PIXELS, 0)),
    lambda image, sign: _warp(image, shift=(0, sign * SHIFT_PIXELS)),
    lambda image, sign: _rotate(image, sign * ROTATION_DEGREES),
)
"""The release's operations: (image, sign 1 or -1) -> image.

Identity, auto-contrast, equalize, brightness, sharpness, shears, shifts and rotation. There is no
solarize, no posterize and no change of color.
"""


# RandAugment of timm --------------------------------------------------------------------------

STRENGTH_MEAN, STRENGTH_STD = 0.9, 0.05
"""Distribution of an operation's strength between 0 and 1: m9-mstd0.5 of 10."""

MEAN_COLOR_FILL = [float(round(255 * mean)) for mean in IMAGENET_MEAN_STD[0]]


def rand_augment_timm(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Applies timm's rand-m9-mstd0.5-inc1: two operations, each with probability one half.

    They are drawn from `INCREASING_OPERATIONS` with replacement. Strengths are normal(0.9, 0.05)
    clipped to 0 and 1, directions are random. Pillow applies them, as in timm: torchvision warps
    tensors bilinearly at best, and this recipe's interpolation is bicubic.
    """
    pillow = F.to_pil_image(image)
    operations = list(INCREASING_OPERATIONS.values())
    for choice in rng.integers(len(operations), size=2).tolist():
        is_applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        strength = min(max(rng.normal(STRENGTH_MEAN, STRENGTH_STD), 0.0), 1.0)
        if is_applied:
            pillow = operations[choice](pillow, sign * strength)
    return F.pil_to_tensor(pillow)


def _warp_pillow(
    image: Image.Image,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Image.Image:
    """Shifts by pixels and shears by a factor of the distance to the upper left corner.

    Pixels from outside the image have the mean color.
    """
    return F.affine(
        image,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=[math.degrees(math.atan(factor)) for factor in shear],
        interpolation=InterpolationMode.BICUBIC,
        fill=MEAN_COLOR_FILL,
        center=[0.0, 0.0],
    )


def _rotate_pillow(image: Image.Image, degrees: float) -> Image.Image:
    return F.rotate(image, degrees, interpolation=InterpolationMode.BICUBIC, fill=MEAN_COLOR_FILL)


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Adds `amount` to values below 128."""
    return image.point(lambda value: min(255, value + amount) if value < 128 else value)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps `bits` of each value. Full strength leaves 0, which newer Pillow's own refuses."""
    return image.point(lambda value: value & -(1 << (8 - bits)))


INCREASING_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto-contrast": lambda image, strength: F.autocontrast(image),
    "equalize": lambda image, strength: F.equalize(image),
    "invert": lambda image, strength: F.invert(image),
    "rotate": lambda image, strength: _rotate_pillow(image, 30 * strength),
    "posterize": lambda image, strength: _posterize(image, 4 - int(4 * abs(strength))),
    "solarize": lambda image, strength: F.solarize(image, 256 - int(256 * abs(strength))),
    "solarize-add": lambda image, strength: _solarize_add(image, int(110 * abs(strength))),
    "color": lambda image, strength: F.adjust_saturation(image, 1 + 0.9 * strength),
    "contrast": lambda image, strength: F.adjust_contrast(image, 1 + 0.9 * strength),
    "brightness": lambda image, strength: F.adjust_brightness(image, 1 + 0.9 * strength),
    "sharpness": lambda image, strength: F.adjust_sharpness(image, 1 + 0.9 * strength),
    "shear-x": lambda image, strength: _warp_pillow(image, shear=(0.3 * strength, 0.0)),
    "shear-y": lambda image, strength: _warp_pillow(image, shear=(0.0, 0.3 * strength)),
    "shift-x": lambda image, strength: _warp_pillow(
        image, shift=(0.45 * strength * image.width, 0.0)
    ),
    "shift-y": lambda image, strength: _warp_pillow(
        image, shift=(0.0, 0.45 * strength * image.height)
    ),
}
"""timm's "increasing" operations: (image, strength between -1 and 1) -> image.

Strength 0 changes nothing where an operation has a strength, except that posterize keeps 4 bits.
"""


# Random erasing -------------------------------------------------------------------------------

ERASED_AREA = (0.02, 1 / 3)
"""Range of a box's area as a fraction of the image's."""

MIN_ERASED_ASPECT = 0.3
"""Smallest height / width of a box; the largest is its inverse."""

ERASE_TRIES = 10
"""How often a box is drawn again that does not fit into the image."""

ErasedBox = tuple[int, int, np.ndarray]
"""Top, left and standard normal noise [3, h, w] for the pixels of a normalized image."""


def draw_erasing(
    image: Tensor, rng: np.random.Generator, *, rate: float = 0.25
) -> ErasedBox | None:
    """Draws a box of an image [3, S, S] to erase with probability `rate`, else None."""
    # torchvision's RandomErasing uses torch's global generator, and aspects up to 3.3.
    if rng.random() >= rate:
        return None
    height, width = image.shape[-2:]
    limit = math.log(1 / MIN_ERASED_ASPECT)
    for _ in range(ERASE_TRIES):
        area = height * width * rng.uniform(*ERASED_AREA)
        aspect = math.exp(rng.uniform(-limit, limit))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            shape = (len(image), box_height, box_width)
            return top, left, rng.standard_normal(shape, dtype=np.float32)
    return None


def erase_boxes(pixels: Tensor, boxes: Sequence[ErasedBox | None]) -> Tensor:
    """Fills the box of each image with its noise: a copy of normalized pixels [B, 3, S, S]."""
    pixels = pixels.clone()
    for image, box in zip(pixels, boxes, strict=True):
        if box is not None:
            top, left, noise = box
            bottom, right = top + noise.shape[1], left + noise.shape[2]
            values = torch.from_numpy(noise).to(image, non_blocking=True)
            image[:, top:bottom, left:right] = values
    return pixels
