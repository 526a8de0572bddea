"""Precision of computations."""

import torch
from torch import Tensor


def promote_to_float32(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32, or unchanged if it is float64.

    Losses, norms and codes are never computed in half precision.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
