"""The last steps of every image before the network: resizing and normalization.

In evaluation these are the only steps. In training, augmentation comes before them.
Images stay uint8 until a batch is on its device: bytes are a quarter of the floats to stack, hand
over between processes and move. Resizing is antialiased, as Pillow's always is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

ChannelValues = tuple[float, float, float]
"""One value each for red, green and blue."""

VL_MEAN_STD: tuple[ChannelValues, ChannelValues] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation that vision-language tasks normalize with."""

IMAGENET_MEAN_STD: tuple[ChannelValues, ChannelValues] = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)
"""Mean and standard deviation of ImageNet's pixels."""

MAX_ASPECT = 16
"""A center crop is taken of at most so many times the shorter side: resized whole, an image of
12,000 x 1 pixels would take 5 GB."""

INTERPOLATION_MODES = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input, after augmentation where there is any.

    It is saved with the weights as `dataclasses.asdict(preprocessing)`.
    """

    image_size: int = 224
    """Side of the square in pixels; with "fit" the longer side."""
    mean: ChannelValues = VL_MEAN_STD[0]
    """Mean of each channel, for pixels between 0 and 1."""
    std: ChannelValues = VL_MEAN_STD[1]
    """Standard deviation of each channel."""
    resize: Literal["squash", "crop", "fit"] = "squash"
    """As the release does it: "squash" resizes to a square without keeping the aspect ratio
    (vision-language tasks), "crop" resizes the shorter side and crops the center (ImageNet).
    "fit" resizes the longer side and keeps the aspect ratio (detection)."""
    interpolation: str = "bicubic"
    """Either "bicubic" or "bilinear"."""
    crop_pct: float = 1.0
    """With "crop": size of the crop as a fraction of the resized shorter side."""

    def __post_init__(self) -> None:
        # JSON gives lists; tuples keep equality and hashing.
        object.__setattr__(self, "mean", _check_channels("mean", self.mean))
        object.__setattr__(self, "std", _check_channels("std", self.std))
        if self.image_size < 1:
            raise ValueError(
                f"image_size {self.image_size} is not a size: give the side in pixels, at least 1"
            )
        if self.resize not in ("squash", "crop", "fit"):
            raise ValueError(f"resize {self.resize!r} is unknown: use squash, crop or fit")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"crop_pct {self.crop_pct} is outside (0, 1]: "
                "use 1.0 to keep the whole shorter side"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive in every channel")
        if self.interpolation not in INTERPOLATION_MODES:
            raise ValueError(
                f"interpolation {self.interpolation!r} is unknown: "
                f"use {' or '.join(INTERPOLATION_MODES)}"
            )

    def __call__(self, image: Tensor) -> Tensor:
        """Resizes and normalizes an image: uint8 [3, H, W] -> float [3, S, S]."""
        return self.normalize(self.preprocess(image))

    def preprocess(self, image: Tensor) -> Tensor:
        """Resizes an image without normalizing it.

        Args:
            image: uint8 [3, H, W].

        Returns:
            uint8 [3, S, S] with S = image_size; with "fit" [3, h, w] of at most S pixels a side.
        """
        size = self.image_size
        height, width = image.shape[-2:]
        if self.resize == "squash":
            return resize(image, size, size, self.interpolation)
        if self.resize == "fit":
            return resize(image, *fit_longer_side(height, width, size), self.interpolation)
        image = cut_to_aspect(image, MAX_ASPECT)
        height, width = image.shape[-2:]
        shorter = math.floor(size / self.crop_pct)
        if height <= width:
            new_height, new_width = shorter, shorter * width // height
        else:
            new_height, new_width = shorter * height // width, shorter
        image = resize(image, new_height, new_width, self.interpolation)
        top, left = round((new_height - size) / 2), round((new_width - size) / 2)
        return image[..., top : top + size, left : left + size]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Subtracts the mean of each channel and divides by its standard deviation.

        Args:
            pixels: [..., 3, H, W], uint8 or float between 0 and 1.

        Returns:
            A new float tensor of the same shape.
        """
        is_uint8 = pixels.dtype == torch.uint8
        scale, shift = _make_scale_and_shift(self.mean, self.std, is_uint8, pixels.device)
        # Converted first: a product of bytes and floats takes a third longer on CPU.
        floats = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return floats.mul_(scale).sub_(shift)


def cut_to_aspect(image: Tensor, limit: int) -> Tensor:
    """Cuts the ends off an image [3, H, W] that is more than `limit` times as long as wide."""
    height, width = image.shape[-2:]
    rows, columns = min(height, limit * width), min(width, limit * height)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[..., top : top + rows, left : left + columns]


def fit_longer_side(height: int, width: int, size: float) -> tuple[int, int]:
    """Scales (height, width) so that the longer side is `size`; rounded, each at least 1."""
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resizes an image, uint8 [3, H, W] -> [3, height, width]; returns it unchanged if it fits."""
    if image.shape[-2:] == (height, width):
        return image
    if image.stride(0) == 1:
        # Interleaved colors, as decoders give them, take a third less time without gaps.
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mode = INTERPOLATION_MODES[interpolation]
    return F.resize_image(image, [height, width], mode, antialias=True)


def clear_padding(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Sets the padding of normalized images to zero, the mean color.

    Args:
        pixels: [B, 3, H, W].
        sizes: Height and width of each image without its padding, int [B, 2].
    """
    rows, columns = (torch.arange(count, device=pixels.device) for count in pixels.shape[2:])
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]  # [B, H, W]
    return pixels * inside[:, None]


@lru_cache
def _make_scale_and_shift(
    mean: ChannelValues, std: ChannelValues, is_uint8: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Writes (pixel / 255 - mean) / std as one scale and one shift, each [3, 1, 1]."""
    deviation = torch.tensor(std, dtype=torch.float64)
    scale = 1 / (deviation * (255 if is_uint8 else 1))
    shift = torch.tensor(mean, dtype=torch.float64) / deviation
    return scale.float().view(3, 1, 1).to(device), shift.float().view(3, 1, 1).to(device)


def _check_channels(name: str, values: Sequence[float]) -> ChannelValues:
    """Returns three values as a tuple of floats."""
    if len(values) != 3:
        raise ValueError(
            f"{name} {values} has {len(values)} numbers: give one each for red, green and blue"
        )
    return float(values[0]), float(values[1]), float(values[2])
