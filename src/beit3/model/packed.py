"""Linear layers on a processor with their weights laid out for a number of rows that recurs (float32 inference).

A plain product lays the weights out anew in every call, which for the 197 rows of one image costs as much as a third of
it. Here the layout is kept once the same number of rows came twice in a row, besides the weights: the result is equal up
to rounding, memory grows by the weights that are packed. Parameters and their names stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.multiway import SharedLinear

MOST_ROWS = 4096
"""Beyond it a plain product reaches the processor's rate too."""


def pack(network: nn.Module) -> None:
    """Let every linear layer of `network` keep its weights' layout. ValueError where this torch has no MKL, or off the processor."""
    if not torch.backends.mkl.is_available():
        raise ValueError("packed weights need a torch with MKL (x86 processors): leave `packed` out")
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found = f"{module.weight.dtype} on {module.weight.device.type}"
            if found != "torch.float32 on cpu":
                raise ValueError(f"packed weights are for float32 on a processor, and {name} is {found}: leave `packed` out")
            product = Product(module)
            if isinstance(module, SharedLinear):
                module.project = product  # type: ignore[method-assign, assignment]
            else:
                module.forward = product  # type: ignore[method-assign, assignment]


class Product:
    """The product of one layer; its layout belongs to the rows seen last."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self.last = self.rows = 0
        self.layout: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = self.layer.weight, self.layer.bias
        rows = states.numel() // states.shape[-1]
        if torch.is_grad_enabled() or not 0 < rows <= MOST_ROWS:
            return F.linear(states, weight, bias)
        if rows == self.last != self.rows:
            self.rows, self.layout = rows, torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
        self.last = rows
        if rows != self.rows:
            return F.linear(states, weight, bias)
        return torch.ops.mkl._mkl_linear(states, self.layout, weight, bias, rows)
