"""Collectives that also work without a process group, where each is the identity.

Each returns a new tensor, and only `all_gather_with_gradient` carries a gradient. All ranks must
call them in the same order with tensors of the same shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def rank() -> int:
    """Returns the index of this process, 0 without a process group."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes, 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


@torch.no_grad()
def all_reduce(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor of any shape over all ranks, on every rank."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if _is_distributed():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def broadcast(tensor: Tensor) -> Tensor:
    """Returns rank 0's values on every rank; the other ranks' tensors give only shape and
    device."""
    values = tensor.detach().clone(memory_format=torch.contiguous_format)
    if _is_distributed():
        dist.broadcast(values, src=0)
    return values


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors [n, ...] of all ranks in rank order: [world_size * n, ...]."""
    own = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not _is_distributed():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Gathers as `all_gather`; the gradients of all ranks' losses are summed into the own rows."""
    return _Gather.apply(tensor) if _is_distributed() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        context.num_rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)[rank() * context.num_rows :][: context.num_rows]


def all_gather_objects(value: Any) -> list[Any]:
    """Returns one small picklable value of each rank, in rank order, on every rank."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def gather_full(tensor: Tensor) -> Tensor:
    """Returns the full tensor of which ranks hold shards; any other tensor as it is.

    Every rank must call it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_to_shard(parameter: Tensor, values: Tensor) -> None:
    """Copies into `parameter` the part of `values` that this rank holds, without communication.

    `values` are the full tensor, the same on every rank.
    """
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(
            values.to(parameter.device, parameter.dtype), mesh, placements, src_data_rank=None
        )
    parameter.copy_(values)


def barrier() -> None:
    """Waits until every rank has called it."""
    if _is_distributed():
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Lets rank 0 run the block alone, then the others, which can read the files that it wrote."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
