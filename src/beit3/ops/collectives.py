"""Collectives that also work without a process group, where each is the identity.

Each returns a new tensor, and only `all_gather_with_gradient` carries a gradient. All ranks must
call them in the same order with tensors of the same shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


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


def compute_on_rank_zero(compute: Callable[[], Value]) -> Value:
    """Returns on every rank the small picklable value that `compute` returns on rank 0.

    If rank 0 raises an exception, so does every other rank: a ValueError with the same message, or
    else a RuntimeError that names the exception. No rank waits for a value that never comes.
    """
    value: Value | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = compute()
        except Exception as caught:
            error = caught
    error_class: type[Exception] | None = None
    message = ""
    if isinstance(error, ValueError):
        error_class, message = ValueError, str(error)
    elif error is not None:
        error_class = RuntimeError
        message = f"rank 0 failed with {type(error).__name__}: {error}"
    value, error_class, message = all_gather_objects((value, error_class, message))[0]
    if error is not None:
        raise error
    if error_class is not None:
        raise error_class(message)
    return cast(Value, value)


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
