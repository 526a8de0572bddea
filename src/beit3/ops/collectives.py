"""Collectives that also work alone: without an initialised process group each is the identity.

Only `all_gather_with_gradient` carries a gradient, and each returns a new tensor. All ranks must
call them in the same
order with tensors of the same shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """`all_gather`, through which every rank's loss reaches the rows of this one: their gradients
    are summed."""
    return _Gather.apply(tensor) if _joined() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        context.rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)[rank() * context.rows :][: context.rows]


def all_gather_objects(value: Any) -> list[Any]:
    """One small picklable value of each rank, in rank order, on every rank."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks hold shards; every rank must ask. Others come back as they
    are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def keep_shard(parameter: Tensor, values: Tensor) -> None:
    """Copy into `parameter` what this rank holds of `values`, which is whole and the same on every
    rank; no communication."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(
            values.to(parameter.device, parameter.dtype), mesh, placements, src_data_rank=None
        )
    parameter.copy_(values)


def barrier() -> None:
    """Wait until every rank is here."""
    if _joined():
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes through the block alone, then the others, who find on disk what it wrote."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
