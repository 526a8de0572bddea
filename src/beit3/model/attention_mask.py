"""Who may attend to whom. Masks are boolean, True = may attend, shaped [N, K] or [B, 1, N, K] (queries, keys).

Booleans rather than large negative numbers: the release adds -1e8, which half precision turns into -inf.
"""

import torch
from torch import Tensor


def image_to_text(num_image: int, num_text: int, *, device: torch.device | None = None) -> Tensor:
    """Captioning's mask [N, N], N = num_image + num_text: images see images only, texts see images and earlier text.

    Paper section 3.1 (image captioning), after UniLM's sequence-to-sequence mask.
    """
    may = torch.ones(
        num_image + num_text, num_image + num_text, dtype=torch.bool, device=device
    ).tril()
    may[:num_image, :num_image] = True
    return may


def visible_keys(num_image: int, text_padding: Tensor) -> Tensor:
    """[B, 1, 1, num_image + L] from text_padding [B, L] (True = padding): image tokens are never padding."""
    return torch.nn.functional.pad(~text_padding, (num_image, 0), value=True)[:, None, None, :]


def joint(attention_mask: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """Both restrictions at once; None where there is none."""
    if attention_mask is None or keys is None:
        return keys if attention_mask is None else attention_mask
    return attention_mask & keys
