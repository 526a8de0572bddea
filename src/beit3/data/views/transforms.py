"""From an image to the network's pixels: evaluation, fine-tuning crops, and the two views of masked data modelling.

Everything takes uint8 [3, H, W] RGB and gives uint8: bytes are a quarter of the floats to stack, hand over and move to a
device, so that normalising waits until a batch is there (`Task.pixels`). All chance comes from the given numpy
generator. Evaluation follows the release's transforms: "squash" (resize to a square, aspect not kept) for vision-language
tasks, "crop" (shorter side, then centre) for ImageNet; "fit" (the longer side, aspect kept) is detection's. Resizing is
antialiased, as Pillow's always is.
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
CHANGES = ("brightness", "contrast", "saturation")
CROP_TRIES = 10


@dataclass(frozen=True)
class Preprocessing:
    """How evaluation turns an image into pixels; saved with the weights (`dataclasses.asdict`, and back by `**`)."""

    image_size: int = 224
    mean: Statistics = VL[0]
    std: Statistics = VL[1]
    resize: Literal["squash", "crop", "fit"] = "squash"
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        # JSON gives lists; tuples keep equality and hashing.
        object.__setattr__(self, "mean", _three("mean", self.mean))
        object.__setattr__(self, "std", _three("std", self.std))
        if self.image_size < 1:
            raise ValueError(
                f"image_size {self.image_size} is not a size: give the side in pixels, at least 1"
            )
        if self.resize not in ("squash", "crop", "fit"):
            raise ValueError(f"resize {self.resize!r} is unknown: use squash, crop or fit")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"crop_pct {self.crop_pct} is outside (0, 1]: use 1.0 to keep the whole shorter side"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive in every channel")
        _mode(self.interpolation)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> normalised float [3, S, S]."""
        return self.normalize(self.preprocess(image))

    def preprocess(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, S, S], with "fit" [3, h, w] of at most S: what evaluation sees of it, yet to be normalised."""
        size = self.image_size
        if self.resize == "squash":
            return _resize(image, size, size, self.interpolation)
        height, width = image.shape[-2:]
        if self.resize == "fit":
            return _resize(image, *fitting(height, width, size), self.interpolation)
        shorter = math.floor(size / self.crop_pct)
        tall, wide = (
            (shorter, shorter * width // height)
            if height <= width
            else (shorter * height // width, shorter)
        )
        image = _resize(image, tall, wide, self.interpolation)
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        return image[..., top : top + size, left : left + size]

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8, or float in [0, 1], of any shape [..., 3, H, W] -> float, channel means off and deviations one."""
        scale, shift = _affine(self.mean, self.std, pixels.dtype == torch.uint8, pixels.device)
        # Converted first: a product of bytes and floats takes a third longer on CPU.
        floats = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return floats.mul_(scale).sub_(shift)


def blanked(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Normalised pixels [B, 3, H, W] with zeros, the mean color, beyond each picture's own `sizes` [B, 2] (height, width)."""
    rows, columns = (torch.arange(count, device=pixels.device) for count in pixels.shape[2:])
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]  # [B, H, W]
    return pixels * inside[:, None]


def fitting(height: int, width: int, size: float) -> tuple[int, int]:
    """Height and width of a picture scaled so that its longer side is `size`, rounded, at least 1."""
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


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
    """One geometric draw, seen by the network and by the visual tokenizer: uint8 [3, S, S] and [3, T, T].

    Colours jitter (brightness, contrast, saturation by 1 +- `color_jitter`, in random order), then one crop is resized
    twice. Equal sizes give one tensor twice.
    """
    changes = _draw_changes(rng, color_jitter) if color_jitter else []
    box = _draw_box(image, rng, scale, ratio)
    crop = _flip(_jitter(image, changes, box) if changes else _crop(image, box), rng, hflip)
    patches = _resize(crop, image_size, image_size)
    return patches, patches if token_size == image_size else _resize(crop, token_size, token_size)


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
    image: Tensor,
    rng: np.random.Generator,
    *,
    image_size: int,
    crop: tuple[float, float],
    flip: float,
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
            return (
                int(rng.random() * (height - tall + 1)),
                int(rng.random() * (width - wide + 1)),
                tall,
                wide,
            )
    tall = min(height, max(1, round(width / ratio[0])))
    wide = min(width, max(1, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _draw_changes(rng: np.random.Generator, strength: float) -> list[tuple[str, float]]:
    """Brightness, contrast and saturation in random order, each with a factor within 1 +- `strength`."""
    order = [CHANGES[place] for place in rng.permutation(3).tolist()]
    least = max(0.0, 1 - strength)
    return [(name, least + (1 + strength - least) * rng.random()) for name in order]


def _jitter(image: Tensor, changes: Sequence[tuple[str, float]], box: Box) -> Tensor:
    """The box of a picture whose colors have changed: uint8 [3, h, w]. Colors stay interleaved, as decoders give them."""
    pixels = image.permute(1, 2, 0).to(
        torch.float32, memory_format=torch.contiguous_format
    )  # [H, W, 3], 0 to 255
    luma, (top, left, height, width) = torch.tensor(LUMA), box
    for name, factor in changes:
        if (
            name == "contrast"
        ):  # towards the mean of the grey image, of all of it; whatever comes after needs the box alone
            grey = pixels.mean(0).mean(0) @ luma
            pixels = pixels[top : top + height, left : left + width].contiguous()
            torch.add((1 - factor) * grey, pixels, alpha=factor, out=pixels)
        elif name == "saturation":  # towards the grey image
            pixels = pixels @ (factor * torch.eye(3) + (1 - factor) * luma[:, None])
        else:
            pixels.mul_(factor)
        if factor > 1:  # what lies between two colors is one
            pixels.clamp_(0, 255)
    # numpy converts three times as fast
    return torch.from_numpy(pixels.round_().numpy().astype(np.uint8)).permute(2, 0, 1)


def _crop(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def _flip(image: Tensor, rng: np.random.Generator, rate: float) -> Tensor:
    return image.flip(-1) if rate and rng.random() < rate else image


def _resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]; nothing is done where the size fits already."""
    if image.shape[-2:] == (height, width):
        return image
    if (
        image.stride(0) == 1
    ):  # interleaved colors, as decoders give them, resize in two thirds of the time without gaps
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return F.resize_image(image, [height, width], _mode(interpolation), antialias=True)


@lru_cache
def _mode(interpolation: str) -> InterpolationMode:
    modes = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
    if interpolation not in modes:
        raise ValueError(f"interpolation {interpolation!r} is unknown: use {' or '.join(modes)}")
    return modes[interpolation]


@lru_cache
def _affine(
    mean: Statistics, std: Statistics, bytes: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(pixel / 255 - mean) / std as one scale and one shift, each [3, 1, 1]."""
    deviation = torch.tensor(std, dtype=torch.float64)
    scale = 1 / (deviation * (255 if bytes else 1))
    shift = torch.tensor(mean, dtype=torch.float64) / deviation
    return scale.float().view(3, 1, 1).to(device), shift.float().view(3, 1, 1).to(device)


def _three(name: str, values: Sequence[float]) -> Statistics:
    if len(values) != 3:
        raise ValueError(
            f"{name} {values} has {len(values)} numbers: give one each for red, green and blue"
        )
    return float(values[0]), float(values[1]), float(values[2])
