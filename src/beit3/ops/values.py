"""Tensors that have a shape and a type but no values, with which `beit3 plan` traces a step that is never computed."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def known(tensor: Tensor) -> Tensor:
    """The tensor itself. For one without values stand-ins that have some: floats rise evenly from 0 to below 1, integers are 0.

    For what decides how much there is to compute: which boxes are positive, which map they are pooled from.
    """
    if not isinstance(tensor, FakeTensor):
        return tensor
    count = tensor.numel()
    return (
        (torch.arange(count, device=tensor.device) / max(1, count))
        .to(tensor.dtype)
        .view(tensor.shape)
    )
