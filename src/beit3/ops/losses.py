"""Losses that several tasks use. Only `contrastive_loss` communicates between processes."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.ops.collectives import all_gather_with_gradient, rank
from beit3.ops.precision import promote_to_float32

MAX_LOGITS = 1 << 26
"""Logits of a vocabulary that exist at a time: 268 MB in float32, 1,048 predictions of 64,010
tokens."""

INIT_LOGIT_SCALE = math.log(1 / 0.07)
"""Initial value of the learned logarithm of the similarities' scale (release): a temperature of
0.07."""


def label_smoothed_kl_div(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Returns the KL divergence [n] of each prediction from its smoothed target.

    The target distribution gives 1 - smoothing to its class and smoothing / (V - 1) to every other
    (release, captioning). So the loss of a perfect prediction is 0, and without smoothing it is the
    cross-entropy.

    Args:
        logits: [n, V].
        target: [n] int64.
        smoothing: Probability that is spread over all other classes.
    """
    log_probs = F.log_softmax(logits, -1)
    target_log_probs = log_probs.gather(-1, target[:, None])[:, 0]
    if not smoothing:
        return -target_log_probs
    other_prob = smoothing / (logits.shape[-1] - 1)
    other_log_probs = log_probs.sum(-1) - target_log_probs
    cross_entropy = -(1 - smoothing) * target_log_probs - other_prob * other_log_probs
    return (
        cross_entropy + (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(other_prob)
    )


def token_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the cross-entropy [n] of each prediction: logits [n, V], target [n] int64."""
    return F.cross_entropy(logits, target, reduction="none")


def chunked_vocabulary_loss(
    states: Tensor,
    target: Tensor,
    head: nn.Linear,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Computes the losses of predictions over a vocabulary in chunks of at most `max_logits`
    logits.

    With more than one chunk, the logits are recomputed in the backward pass, so that they never
    exist all together. That costs a third more of the head's time.

    Args:
        states: [n, D].
        target: [n] int64.
        head: Computes logits [m, V] of states [m, D].
        loss: Computes losses [m] of logits [m, V] and targets [m].
        max_logits: Number of logits in one chunk.

    Returns:
        Losses [n], and whether each prediction is correct, [n] bool.
    """

    def compute_chunk(states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = promote_to_float32(head(states))
        return loss(logits, target), logits.argmax(-1) == target

    chunk_size = max(1, max_logits // head.out_features)
    if len(states) <= chunk_size:
        return compute_chunk(states, target)
    losses, is_correct = [], []
    for chunk in zip(states.split(chunk_size), target.split(chunk_size), strict=True):
        chunk_losses, chunk_is_correct = checkpoint(
            compute_chunk, *chunk, use_reentrant=False, preserve_rng_state=False
        )
        losses.append(chunk_losses)
        is_correct.append(chunk_is_correct)
    return torch.cat(losses), torch.cat(is_correct)


def drop_worst(losses: Tensor, fraction: float) -> Tensor:
    """Returns the sum of losses [n], with each of the worst `fraction` replaced by the mean of the
    others (release, captioning)."""
    kept = losses.sort().values[: int(len(losses) * (1 - fraction))]
    return kept.mean() * len(losses) if len(kept) else losses.sum()


def compute_similarities(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Returns the scaled products [n, m] of unit features [n, D] and [m, D].

    They have the features' precision, under autocast too.
    """
    with torch.autocast(left.device.type, enabled=False):
        return scale.to(left.dtype) * left @ right.T


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Computes InfoNCE over the images and texts of all processes.

    This process's rows are compared with the gathered columns of all processes, whose gradients
    flow back to them.

    Args:
        image: Unit features of the images, [B, D].
        text: Unit features of the texts, [B, D]; rows of equal index are pairs.
        scale: Factor of the similarities, a scalar.

    Returns:
        The loss summed over this process's pairs, the mean of both directions; and the number of
        these pairs that rank first in both directions.
    """
    images, texts = all_gather_with_gradient(image), all_gather_with_gradient(text)
    text_logits = compute_similarities(image, texts, scale)  # [B, world_size * B]
    image_logits = compute_similarities(text, images, scale)
    labels = torch.arange(len(image), device=image.device) + rank() * len(image)
    text_loss = F.cross_entropy(text_logits, labels, reduction="sum")
    image_loss = F.cross_entropy(image_logits, labels, reduction="sum")
    is_first = (text_logits.argmax(1) == labels) & (image_logits.argmax(1) == labels)
    return (text_loss + image_loss) / 2, is_first.sum()
