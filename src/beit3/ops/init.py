"""Initial values that depend on a parameter's name and a seed alone, never on the order or the
process that draws them."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def trunc_normal(tensor: Tensor, generator: torch.Generator | None, *, std: float = 0.02) -> None:
    """Normal of `std`, cut at one standard deviation as BEiT's pretraining does, in place.

    By the inverse of its distribution: torch's own draws a whole tensor anew until every value
    fits, a minute for a table
    of 64,010 words.
    """
    share = math.erf(0.5**0.5)  # of a normal that lies within one deviation
    values = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(
        -share, share, generator=generator
    )
    tensor.copy_(values.erfinv_().mul_(std * 2**0.5).clamp_(-std, std))
