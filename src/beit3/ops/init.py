"""Random initial values that depend on a generator alone."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def trunc_normal(tensor: Tensor, generator: torch.Generator | None, *, std: float = 0.02) -> None:
    """Fills a tensor in place with a normal distribution, truncated at one standard deviation as in
    BEiT's pretraining.

    It inverts the distribution function. torch's own function draws a whole tensor again until
    every value is inside, which takes a minute for a table of 64,010 tokens.
    """
    inner_probability = math.erf(0.5**0.5)  # of a normal value within one deviation
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    values.uniform_(-inner_probability, inner_probability, generator=generator)
    tensor.copy_(values.erfinv_().mul_(std * 2**0.5).clamp_(-std, std))
