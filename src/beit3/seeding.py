"""Random generators that depend on their purpose, never on the order of calls or the process.

Nothing random has to be saved in a checkpoint: the same arguments give the same numbers again.
"""

import hashlib

import numpy as np
import torch


def make_rng(seed: int, epoch: int, key: str | int) -> np.random.Generator:
    """Returns the numpy generator of one record (`key`) in one epoch.

    It is the same on every machine, in every process and in every run.
    """
    digest = hashlib.blake2b(f"{seed}\n{epoch}\n{key}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def make_generator(seed: int, name: str) -> torch.Generator:
    """Returns the torch generator, on CPU, that belongs to (seed, name), as of one parameter."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
