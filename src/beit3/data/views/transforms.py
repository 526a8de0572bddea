"""Random crops, flips and color changes of training images, and the two views of pretraining.

Images are uint8 [3, H, W] RGB in and out; normalization waits until a batch is on its device
(`Preprocessing.normalize`). All randomness comes from the numpy generator that is passed in.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from beit3.data.views.preprocessing import resize

Box = tuple[int, int, int, int]
"""A box inside an image: top, left, height, width in pixels."""

LUMA = (0.299, 0.587, 0.114)
"""Rec. 601: the gray image with which changes of contrast and saturation blend."""

COLOR_CHANGES = ("brightness", "contrast", "saturation")

CROP_TRIES = 10
"""How often a crop is drawn again that does not fit into the image."""


def make_two_views(
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
    """Makes the two views of masked data modeling from one random crop.

    Colors are changed first, then one crop is resized twice.

    Args:
        image: uint8 [3, H, W].
        rng: Random generator.
        image_size: Side S of the network's view in pixels.
        token_size: Side T of the visual tokenizer's view in pixels.
        scale: Range of the crop's area as a fraction of the image's.
        ratio: Range of the crop's width / height.
        hflip: Probability of a horizontal flip.
        color_jitter: Brightness, contrast and saturation are multiplied by a factor between
            1 - color_jitter and 1 + color_jitter, in random order.

    Returns:
        The network's view, uint8 [3, S, S], and the tokenizer's, uint8 [3, T, T]. It is the same
        tensor if the sizes are equal.
    """
    changes = _sample_color_changes(rng, color_jitter) if color_jitter else []
    box = _sample_box(image, rng, scale, ratio)
    crop = _change_colors(image, changes, box) if changes else _crop(image, box)
    crop = _flip_at_random(crop, rng, hflip)
    view = resize(crop, image_size, image_size)
    if token_size == image_size:
        return view, view
    return view, resize(crop, token_size, token_size)


def random_resized_crop(
    image: Tensor,
    rng: np.random.Generator,
    *,
    image_size: int,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> Tensor:
    """Crops a random box, flips it horizontally with probability `hflip` and resizes it.

    Args:
        image: uint8 [3, H, W].
        rng: Random generator.
        image_size: Side S of the result in pixels.
        scale: Range of the crop's area as a fraction of the image's.
        ratio: Range of the crop's width / height.
        hflip: Probability of a horizontal flip.

    Returns:
        uint8 [3, S, S].
    """
    crop = _crop(image, _sample_box(image, rng, scale, ratio))
    return resize(_flip_at_random(crop, rng, hflip), image_size, image_size)


def crop_and_flip(
    image: Tensor,
    rng: np.random.Generator,
    *,
    image_size: int,
    crop: tuple[float, float],
    flip: float,
) -> Tensor:
    """Augments an image for fine-tuning: a random resized crop, or a flip alone.

    `crop` is the range of the crop's area as a fraction of the image's. From 1 on the image is not
    cropped, and is not resized either. `flip` is the probability of a horizontal flip.
    """
    if crop[0] < 1:
        return random_resized_crop(image, rng, image_size=image_size, scale=crop, hflip=flip)
    return _flip_at_random(image, rng, flip)


# Crops and flips ------------------------------------------------------------------------------


def _sample_box(
    image: Tensor, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draws a box with an area of `scale` and a width / height of `ratio`, log-uniformly.

    Returns the largest centered box if none fits.
    """
    height, width = image.shape[-2:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # With the whole area asked for, only a ratio drawn to the pixel could fit: do not try.
    for _ in range(CROP_TRIES if scale[0] < 1 else 0):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.random() * (height - box_height + 1))
            left = int(rng.random() * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _crop(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def _flip_at_random(image: Tensor, rng: np.random.Generator, rate: float) -> Tensor:
    return image.flip(-1) if rate and rng.random() < rate else image


# Colors ---------------------------------------------------------------------------------------


def _sample_color_changes(rng: np.random.Generator, strength: float) -> list[tuple[str, float]]:
    """Draws the order of the color changes, and a factor within 1 +- `strength` for each."""
    names = [COLOR_CHANGES[index] for index in rng.permutation(3).tolist()]
    low = max(0.0, 1 - strength)
    return [(name, low + (1 + strength - low) * rng.random()) for name in names]


def _change_colors(image: Tensor, changes: Sequence[tuple[str, float]], box: Box) -> Tensor:
    """Changes the colors of an image and returns a box of it, uint8 [3, h, w].

    Colors stay interleaved, as decoders give them.
    """
    pixels = image.permute(1, 2, 0)  # [H, W, 3]
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # 0 to 255
    luma, (top, left, height, width) = torch.tensor(LUMA), box
    for name, factor in changes:
        if name == "contrast":
            # Blends with the mean gray of the whole image; later changes need the box alone.
            gray = pixels.mean(0).mean(0) @ luma
            pixels = pixels[top : top + height, left : left + width].contiguous()
            torch.add((1 - factor) * gray, pixels, alpha=factor, out=pixels)
        elif name == "saturation":
            # Blends with the gray image.
            pixels = pixels @ (factor * torch.eye(3) + (1 - factor) * luma[:, None])
        else:
            pixels.mul_(factor)
        if factor > 1:  # smaller factors stay between two colors
            pixels.clamp_(0, 255)
    # numpy converts three times as fast as torch.
    return torch.from_numpy(pixels.round_().numpy().astype(np.uint8)).permute(2, 0, 1)
