"""Sizes of a graph that is exported for any size: formulas instead of numbers."""

from collections.abc import Iterable

import torch


def is_symbolic(sizes: Iterable[int]) -> bool:
    """Returns whether a size is a formula of `torch.export`.

    A condition on a formula would fix the size in the exported graph, so code that decides by a
    size asks this first.
    """
    return any(isinstance(size, torch.SymInt) for size in sizes)
