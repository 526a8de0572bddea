"""Losses that more than one line makes. Each says what it sums over; no collectives except where named."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.ops.collectives import all_gather_with_gradient, rank

LOGIT_SCALE = math.log(1 / 0.07)
"""Where the learnt logarithm of the scale of similarities starts (release): a temperature of 0.07."""


def smoothed_divergence(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """KL divergence of each prediction from its smoothed target: logits [n, V], target [n] int64 -> [n].

    The target gives 1 - smoothing to its class and smoothing / (V - 1) to every other (release, captioning), so that the
    loss of a perfect prediction is 0 and without smoothing it is the cross-entropy.
    """
    log_probs = F.log_softmax(logits, -1)
    gold = log_probs.gather(-1, target[:, None])[:, 0]
    if not smoothing:
        return -gold
    share = smoothing / (logits.shape[-1] - 1)
    cross_entropy = -(1 - smoothing) * gold - share * (log_probs.sum(-1) - gold)
    return cross_entropy + (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(share)


def without_worst(losses: Tensor, share: float) -> Tensor:
    """The sum of `losses` [n] as if each of the worst `share` of them were the mean of the others (release, captioning)."""
    kept = losses.sort().values[: int(len(losses) * (1 - share))]
    return kept.mean() * len(losses) if len(kept) else losses.sum()


def similarities(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Scaled products [n, m] of unit features [n, D] and [m, D], as precise as they are: under autocast too."""
    with torch.autocast(one.device.type, enabled=False):
        return scale.to(one.dtype) * one @ other.T


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE over the images and texts of all processes: unit features [B, D] each, row i of both a pair.

    Returns the loss summed over this process's pairs (the mean of both directions), and how many of them are first in
    both directions. Rows here are compared with the columns of everyone, gathered with their gradient.
    """
    images, texts = all_gather_with_gradient(image), all_gather_with_gradient(text)
    to_text, to_image = similarities(image, texts, scale), similarities(text, images, scale)  # [B, world * B]
    labels = torch.arange(len(image), device=image.device) + rank() * len(image)
    loss = (F.cross_entropy(to_text, labels, reduction="sum") + F.cross_entropy(to_image, labels, reduction="sum")) / 2
    right = (to_text.argmax(1) == labels) & (to_image.argmax(1) == labels)
    return loss, right.sum()
