"""Texts of unequal length without their padding: outside of attention the network computes for real tokens alone.

The last part of a sequence is then held flat, the real tokens of all samples behind one another as [1, T, D], and laid out
as [B, n, D] for attention only. On an accelerator padding stays: shapes would depend on values there, which waits for the
device at every call and undoes CUDA graphs.
"""

from typing import NamedTuple, Self

import torch.nn.functional as F
from torch import Tensor

from beit3.model.multiway import Parts


class Ragged(NamedTuple):
    """Where the T real tokens of B samples of at most n stand."""

    places: Tensor
    """[1, T] int64: of each real token in the B * n."""
    sources: Tensor
    """[B, n] int64: the inverse. Padding takes the first real token, which nobody sees."""

    @classmethod
    def of(cls, padding: Tensor) -> Self | None:
        """From padding [B, n] bool, True = padding; None where nothing would be left out, or nothing left."""
        if padding.device.type != "cpu" or not padding.any() or padding.all():
            return None
        real = ~padding.flatten()
        return cls(real.nonzero().T.contiguous(), ((real.cumsum(0) - 1) * real).view(padding.shape))

    def flat(self, parts: Parts) -> Parts:
        """The last part [B, n, W] -> [1, T, W]."""
        return (*parts[:-1], rows(parts[-1].flatten(0, 1), self.places))

    def padded(self, parts: Parts) -> Parts:
        """The inverse; padding holds anything."""
        return (*parts[:-1], rows(parts[-1][0], self.sources))

    def per_token(self, per_sample: Tensor) -> Tensor:
        """[B, 1, 1] -> [1, T, 1]."""
        return rows(per_sample[:, 0], self.places // self.sources.shape[1])


def rows(states: Tensor, places: Tensor) -> Tensor:
    """States [K, W] at places [...] -> [..., W]: as a look-up, whose gradient costs less than that of an index."""
    return F.embedding(places, states)
