"""Collectives that also work alone: without an initialised process group each is the identity.

None of them carries a gradient, and each returns a new tensor. All ranks must call them in the same order with tensors
of the same shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Index of this process, 0 when alone."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if _joined() else 1


@torch.no_grad()
def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over all ranks, the same on each; any shape."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if _joined():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank; what the others pass gives only shape and device."""
    values = tensor.detach().clone(memory_format=torch.contiguous_format)
    if _joined():
        dist.broadcast(values, src=0)
    return values


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """[n, ...] of each rank -> [world_size * n, ...], in rank order."""
    own = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not _joined():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def barrier() -> None:
    """Wait until every rank is here."""
    if _joined():
        dist.barrier()


@contextmanager
def leader_first() -> Iterator[None]:
    """Rank 0 goes through the block alone, then the others, who find on disk what it wrote."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
