"""How many bits a computation keeps."""

import torch
from torch import Tensor


def promote_to_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is: losses, norms and codes are never computed
    in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
