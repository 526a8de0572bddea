"""Attention masks: which tokens may attend to which.

Masks are boolean, True = may attend, shaped [N, K] or [B, 1, N, K] (queries, keys). Booleans rather
than large negative numbers: the release adds -1e8, which half precision turns into -inf.
"""

import torch
from torch import Tensor


def make_image_to_text_mask(
    num_image: int, num_text: int, *, device: torch.device | None = None
) -> Tensor:
    """Returns captioning's mask [N, N] with N = num_image + num_text tokens.

    Image tokens attend to image tokens only, text tokens to the image and to earlier text (paper
    section 3.1, image captioning; after UniLM's sequence-to-sequence mask).
    """
    total = num_image + num_text
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:num_image, :num_image] = True
    return mask


def combine_masks(attention_mask: Tensor | None, visible_keys: Tensor | None) -> Tensor | None:
    """Returns the mask that respects both restrictions, or None where there is none."""
    if attention_mask is None:
        return visible_keys
    return attention_mask if visible_keys is None else attention_mask & visible_keys
