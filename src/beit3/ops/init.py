"""Initial values that depend on a parameter's name and a seed alone, never on the order or the process that draws them."""

import hashlib

import torch
from torch import Tensor, nn


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def trunc_normal(tensor: Tensor, generator: torch.Generator, *, std: float = 0.02, cut: float = 1.0) -> None:
    """Normal of `std`, cut at +-`cut` standard deviations, in place. BEiT's pretraining cuts at one."""
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    nn.init.trunc_normal_(values, std=std, a=-cut * std, b=cut * std, generator=generator)
    tensor.copy_(values)
