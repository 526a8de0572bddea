"""Losses that more than one line makes. Each says what it sums over; no collectives except where
named."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.ops.collectives import all_gather_with_gradient, rank
from beit3.ops.precision import promote_to_float32

MAX_LOGITS = 1 << 26
"""Of a vocabulary at a time: 268 MB in float32, 1,048 predictions of 64,010 words."""

INIT_LOGIT_SCALE = math.log(1 / 0.07)
"""Where the learnt logarithm of the scale of similarities starts (release): a temperature of
0.07."""


def label_smoothed_kl_div(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """KL divergence of each prediction from its smoothed target: logits [n, V], target [n] int64 ->
    [n].

    The target gives 1 - smoothing to its class and smoothing / (V - 1) to every other (release,
    captioning), so that the
    loss of a perfect prediction is 0 and without smoothing it is the cross-entropy.
    """
    log_probs = F.log_softmax(logits, -1)
    gold = log_probs.gather(-1, target[:, None])[:, 0]
    if not smoothing:
        return -gold
    share = smoothing / (logits.shape[-1] - 1)
    cross_entropy = -(1 - smoothing) * gold - share * (log_probs.sum(-1) - gold)
    return cross_entropy + (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(share)


def token_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of each prediction: logits [n, V], target [n] int64 -> [n]."""
    return F.cross_entropy(logits, target, reduction="none")


def chunked_vocabulary_loss(
    states: Tensor,
    target: Tensor,
    head: nn.Linear,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    most: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Losses [n] of predictions and whether each is right, [n] bool, from states [n, D] and target
    [n] int64.

    `head` makes the logits [m, V] and `loss` their losses [m], for as many as make `most` logits,
    and again in the backward
    pass: all logits never exist together. That costs a third more of the head, where there are more
    than one piece.
    """

    def piece(states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = promote_to_float32(head(states))
        return loss(logits, target), logits.argmax(-1) == target

    size = max(1, most // head.out_features)
    if len(states) <= size:
        return piece(states, target)
    pieces = zip(states.split(size), target.split(size), strict=True)
    found = [
        checkpoint(piece, *each, use_reentrant=False, preserve_rng_state=False) for each in pieces
    ]
    losses, right = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(right)


def drop_worst(losses: Tensor, share: float) -> Tensor:
    """The sum of `losses` [n] as if each of the worst `share` of them were the mean of the others
    (release, captioning)."""
    kept = losses.sort().values[: int(len(losses) * (1 - share))]
    return kept.mean() * len(losses) if len(kept) else losses.sum()


def compute_similarities(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Scaled products [n, m] of unit features [n, D] and [m, D], as precise as they are: under
    autocast too."""
    with torch.autocast(one.device.type, enabled=False):
        return scale.to(one.dtype) * one @ other.T


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE over the images and texts of all processes: unit features [B, D] each, row i of both
    a pair.

    Returns the loss summed over this process's pairs (the mean of both directions), and how many of
    them are first in
    both directions. Rows here are compared with the columns of everyone, gathered with their
    gradient.
    """
    images, texts = all_gather_with_gradient(image), all_gather_with_gradient(text)
    to_text, to_image = (
        compute_similarities(image, texts, scale),
        compute_similarities(text, images, scale),
    )  # [B, world * B]
    labels = torch.arange(len(image), device=image.device) + rank() * len(image)
    loss = (
        F.cross_entropy(to_text, labels, reduction="sum")
        + F.cross_entropy(to_image, labels, reduction="sum")
    ) / 2
    right = (to_text.argmax(1) == labels) & (to_image.argmax(1) == labels)
    return loss, right.sum()
