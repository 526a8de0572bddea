"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) with smoothed targets, one draw per batch: ImageNet fine-tuning.

Images [B, 3, S, S] and targets [B, C] in and out; the partner of an image is its mirror place in the batch, as in timm.
"""

import math

import numpy as np
import torch
from torch import Tensor


def mix(
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator | None,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    rate: float = 1.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Mixed images [B, 3, S, S] float, and targets [B, C] in the shares of their pixels; no argument is written into.

    `targets`: probabilities, one-hot or soft. `mixup`, `cutmix`: parameter of either's Beta distribution, 0 turns it off;
    `rate`: share of batches that are mixed; `switch`: share of CutMix where both are on. One number is drawn from
    `generator` (None: torch's global one), whatever comes of it. A batch of one changes by its smoothing alone.
    """
    # torchvision's MixUp and CutMix draw from the global generator alone, pair neighbours and smooth nothing.
    rng = _numpy_generator(generator)
    targets = targets * (1 - smoothing) + smoothing / targets.shape[-1]
    if rng.random() >= rate or not (mixup or cutmix):
        return images, targets
    cut = rng.random() < switch if mixup and cutmix else bool(cutmix)
    own = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
    if not cut:
        return torch.lerp(images.flip(0), images, own), torch.lerp(targets.flip(0), targets, own)
    height, width = images.shape[-2:]
    rows, columns = cut_box(
        own, (int(rng.integers(height)), int(rng.integers(width))), (height, width)
    )
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns].flip(0)
    own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, torch.lerp(targets.flip(0), targets, own)


def cut_box(own: float, centre: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the partner: a share 1 - `own` of `size` (H, W) about `centre` (y, x), less what juts out."""
    halves = [int(side * math.sqrt(1 - own)) // 2 for side in size]
    rows, columns = (
        slice(max(c - h, 0), min(c + h, side))
        for c, h, side in zip(centre, halves, size, strict=True)
    )
    return rows, columns


def _numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """Seeded by one draw: torch's Beta takes no generator."""
    device = generator.device if generator is not None else "cpu"
    return np.random.default_rng(
        int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    )
