"""Draws hard negatives: wrong partners that the network finds similar."""

import torch
from torch import Tensor


@torch.no_grad()
def draw_negatives(logits: Tensor, is_match: Tensor, count: int) -> Tensor:
    """Draws wrong columns for every row, without replacement, each in proportion to exp(logit).

    The `count` largest of logit + Gumbel noise are such a draw (Kool et al. 2019,
    arXiv:1903.06059). The noise is of torch's own random state.

    Args:
        logits: [B, C] similarities, as large as the contrastive loss takes them.
        is_match: [B, C] bool, True where a column belongs to the row.
        count: Columns per row, at most C.

    Returns:
        Column indices [B, count] int64. A row with fewer wrong columns gets right ones as well.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).masked_fill(is_match, -torch.inf).topk(count, dim=1).indices
