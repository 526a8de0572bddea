"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) with smoothed targets, for ImageNet.

Images are mixed in pairs with the reversed batch, as in timm: the first with the last, and so on.
"""

import math

import numpy as np
import torch
from torch import Tensor


def mix_batch(
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
    """Mixes the images of a batch and their targets. A batch of one is only smoothed.

    Args:
        images: Float [B, 3, S, S]; not written into.
        targets: Probabilities [B, C], one-hot or soft; not written into.
        generator: Torch generator, of which one number is drawn in every case; None means
            torch's global one.
        mixup: Parameter of Mixup's Beta distribution; 0 turns Mixup off.
        cutmix: Parameter of CutMix's Beta distribution; 0 turns CutMix off.
        rate: Fraction of the batches that are mixed.
        switch: Fraction of them that CutMix mixes, where both are on.
        smoothing: Probability that is spread over all classes.

    Returns:
        Images [B, 3, S, S], and targets [B, C] weighted by the fractions of their pixels.
    """
    # torchvision's MixUp and CutMix draw from the global generator, pair neighbors, do not smooth.
    rng = _make_numpy_rng(generator)
    targets = targets * (1 - smoothing) + smoothing / targets.shape[-1]
    if rng.random() >= rate or not (mixup or cutmix):
        return images, targets
    use_cutmix = rng.random() < switch if mixup and cutmix else bool(cutmix)
    alpha = cutmix if use_cutmix else mixup
    weight = rng.beta(alpha, alpha)  # of an image itself; its partner has 1 - weight
    if not use_cutmix:
        mixed = torch.lerp(images.flip(0), images, weight)
        return mixed, torch.lerp(targets.flip(0), targets, weight)
    height, width = images.shape[-2:]
    center = int(rng.integers(height)), int(rng.integers(width))
    rows, columns = compute_cut_box(weight, center, (height, width))
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns].flip(0)
    weight = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, torch.lerp(targets.flip(0), targets, weight)


def compute_cut_box(
    weight: float, center: tuple[int, int], size: tuple[int, int]
) -> tuple[slice, slice]:
    """Returns rows and columns of the box that CutMix takes from the partner.

    The box has the fraction 1 - `weight` of an image of `size` (H, W), less what reaches beyond
    it. `center` is (y, x).
    """
    half_height, half_width = (int(side * math.sqrt(1 - weight)) // 2 for side in size)
    rows = slice(max(center[0] - half_height, 0), min(center[0] + half_height, size[0]))
    columns = slice(max(center[1] - half_width, 0), min(center[1] + half_width, size[1]))
    return rows, columns


def _make_numpy_rng(generator: torch.Generator | None) -> np.random.Generator:
    """Seeds a numpy generator by one number of `generator`: torch's Beta takes no generator."""
    device = generator.device if generator is not None else "cpu"
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return np.random.default_rng(seed)
