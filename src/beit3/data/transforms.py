"""From an image to the network's pixels: evaluation, fine-tuning crops, and the two views of masked data modelling.

Everything takes uint8 [3, H, W] RGB; all chance comes from the given numpy generator. Evaluation follows the release's
transforms: "squash" (resize to a square, aspect not kept) for vision-language tasks, "crop" (shorter side, then centre)
for ImageNet. Resizing is antialiased, as Pillow's always is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Statistics = tuple[float, float, float]
# A box inside an image: top, left, height, width in pixels.
Box = tuple[int, int, int, int]

VL: tuple[Statistics, Statistics] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Rec. 601 luma, the greyscale that contrast and saturation blend with.
LUMA = (0.299, 0.587, 0.114)
CROP_TRIES = 10


@dataclass(frozen=True)
class Preprocessing:
    """How evaluation turns an image into pixels; saved with the weights (`dataclasses.asdict`, and back by `**`)."""

    image_size: int = 224
    mean: Statistics = VL[0]
    std: Statistics = VL[1]
    resize: Literal["squash", "crop"] = "squash"
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        # JSON gives lists; tuples keep equality and hashing.
        object.__setattr__(self, "mean", _three("mean", self.mean))
        object.__setattr__(self, "std", _three("std", self.std))
        if self.image_size < 1:
            raise ValueError(f"image_size {self.image_size} is not a size: give the side in pixels, at least 1")
        if self.resize not in ("squash", "crop"):
            raise ValueError(f"resize {self.resize!r} is unknown: use squash or crop")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct {self.crop_pct} is outside (0, 1]: use 1.0 to keep the whole shorter side")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive in every channel")
        _mode(self.interpolation)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> normalised float [3, S, S]."""
        size = self.image_size
        if self.resize == "squash":
            return self.normalize(_resize(image, size, size, self.interpolation))
        height, width = image.shape[-2:]
        shorter = math.floor(size / self.crop_pct)
        tall, wide = (shorter, shorter * width // height) if height <= width else (shorter * height // width, shorter)
        image = _resize(image, tall, wide, self.interpolation)
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        return self.normalize(image[..., top : top + size, left : left + size])

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8, or float in [0, 1], of any shape [..., 3, H, W] -> float, channel means off and deviations one."""
        scale, shift = _affine(self.mean, self.std, pixels.dtype == torch.uint8)
        pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
        return torch.mul(pixels, scale.to(pixels.device)).sub_(shift.to(pixels.device))


def two_views(
    image: Tensor,
    rng: np.random.Generator,
    *,
    image_size: int,
    token_size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """One geometric draw, seen by the network and by the visual tokenizer: [3, S, S] and [3, T, T], float in [0, 1].

    Colours jitter (brightness, contrast, saturation by 1 +- `color_jitter`, in random order), then one crop is resized
    twice. Equal sizes give one tensor twice. The network's view is yet to be normalised.
    """
    image = _jitter(image, rng, color_jitter)
    crop = _flip(_crop(image, _draw_box(image, rng, scale, ratio)), rng, hflip)
    patches = torch.mul(_resize(crop, image_size, image_size), 1 / 255)
    if token_size == image_size:
        return patches, patches
    return patches, torch.mul(_resize(crop, token_size, token_size), 1 / 255)


def random_resized_crop(
    image: Tensor,
    rng: np.random.Generator,
    *,
    image_size: int,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> Tensor:
    """The fine-tuning view: a crop of `scale` of the area, resized, mirrored at rate `hflip`: uint8 [3, S, S]."""
    crop = _flip(_crop(image, _draw_box(image, rng, scale, ratio)), rng, hflip)
    return _resize(crop, image_size, image_size)


def training_view(
    image: Tensor, rng: np.random.Generator, *, image_size: int, crop: tuple[float, float], flip: float
) -> Tensor:
    """What fine-tuning sees: a random crop of that share of the area, resized, or from 1 on the whole; mirrored at rate `flip`."""
    if crop[0] < 1:
        return random_resized_crop(image, rng, image_size=image_size, scale=crop, hflip=flip)
    return _flip(image, rng, flip)


def _draw_box(
    image: Tensor, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A box of `scale` of the area and width / height `ratio` (log-uniform); the largest centred one if none fits."""
    height, width = image.shape[-2:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # With the whole area asked for, only a ratio drawn to the pixel could fit: take the centred box at once.
    for _ in range(CROP_TRIES if scale[0] < 1 else 0):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        shape = math.exp(low + (high - low) * rng.random())
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            return int(rng.random() * (height - tall + 1)), int(rng.random() * (width - wide + 1)), tall, wide
    tall = min(height, max(1, round(width / ratio[0])))
    wide = min(width, max(1, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _jitter(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast and saturation by factors within 1 +- `strength`, in random order: uint8 [3, H, W]."""
    if not strength:
        return image
    # Decoders give interleaved colors; apart, and changed in place, they take less than half the time.
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format)  # [3, H, W], 0 to 255
    for change in rng.permutation(3).tolist():
        factor = max(0.0, 1 - strength) + (1 + strength - max(0.0, 1 - strength)) * rng.random()
        if change == 1:  # contrast: towards the mean of the grey image
            grey = sum(luma * mean for luma, mean in zip(LUMA, pixels.mean((1, 2)).tolist(), strict=True))
            pixels.mul_(factor).add_((1 - factor) * grey)
        elif change == 2:  # saturation: towards the grey image
            greys = torch.zeros_like(pixels[0])  # [H, W]
            for luma, plane in zip(LUMA, pixels, strict=True):
                greys.add_(plane, alpha=luma * (1 - factor))
            pixels.mul_(factor).add_(greys)
        else:
            pixels.mul_(factor)
        pixels.clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def _crop(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def _flip(image: Tensor, rng: np.random.Generator, rate: float) -> Tensor:
    return image.flip(-1) if rate and rng.random() < rate else image


def _resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]; nothing is done where the size fits already."""
    if image.shape[-2:] == (height, width):
        return image
    return F.resize_image(image, [height, width], _mode(interpolation), antialias=True)


@lru_cache
def _mode(interpolation: str) -> InterpolationMode:
    modes = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
    if interpolation not in modes:
        raise ValueError(f"interpolation {interpolation!r} is unknown: use {' or '.join(modes)}")
    return modes[interpolation]


@lru_cache
def _affine(mean: Statistics, std: Statistics, bytes: bool) -> tuple[Tensor, Tensor]:
    """(pixel / 255 - mean) / std as one scale and one shift, each [3, 1, 1]."""
    deviation = torch.tensor(std, dtype=torch.float64)
    scale = 1 / (deviation * (255 if bytes else 1))
    shift = torch.tensor(mean, dtype=torch.float64) / deviation
    return scale.float().view(3, 1, 1), shift.float().view(3, 1, 1)


def _three(name: str, values: Sequence[float]) -> Statistics:
    if len(values) != 3:
        raise ValueError(f"{name} {values} has {len(values)} numbers: give one each for red, green and blue")
    return float(values[0]), float(values[1]), float(values[2])
