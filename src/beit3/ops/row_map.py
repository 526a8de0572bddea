"""Applies a network to many rows: in batches, and with the work divided among all processes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from beit3.ops.collectives import all_gather_with_gradient, rank, world_size


def map_rows(function: Callable[..., Tensor], *inputs: Tensor, batch_size: int) -> Tensor:
    """Returns `function(*inputs)`, computed by all processes together.

    Each process computes an equal part of the rows and receives the others with their gradient. A
    process with more than one batch recomputes its batches in the backward pass instead of keeping
    their activations.

    Args:
        function: Maps tensors of n rows to n rows, each row by itself.
        inputs: Tensors [N, ...], the same in every process.
        batch_size: Rows that `function` takes at once.
    """
    num_rows = len(inputs[0])
    num_own = -(-num_rows // world_size())
    # Repeating the last row makes the parts equal.
    own_rows = (torch.arange(num_own) + rank() * num_own).clamp(max=num_rows - 1)
    recompute = num_own > batch_size and torch.is_grad_enabled()
    outputs = []
    for rows in own_rows.split(batch_size):
        batch = [tensor[rows.to(tensor.device)] for tensor in inputs]
        if recompute:
            outputs.append(checkpoint(function, *batch, use_reentrant=False))
        else:
            outputs.append(function(*batch))
    return all_gather_with_gradient(torch.cat(outputs))[:num_rows]
