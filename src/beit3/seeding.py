"""Random generators that depend on what they are for, never on the order or the process that draws."""

import hashlib

import numpy as np
import torch


def make_rng(seed: int, epoch: int, key: str | int) -> np.random.Generator:
    """The generator of one record in one epoch: the same on every machine, process and run."""
    digest = hashlib.blake2b(f"{seed}\n{epoch}\n{key}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def make_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
