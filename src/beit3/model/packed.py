"""Linear layers on CPU with their weights laid out for a number of rows that recurs (float32 inference).

A plain product lays the weights out anew in every call, which for the 197 rows of one image costs as much as a third of
it. Here the layout is kept once the same number of rows came twice in a row, besides the weights: the result is equal up
to rounding, memory grows by the weights that are packed. Parameters and their names stay as they are, and blocks may be
compiled around them.
"""

from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.multiway import SharedLinear

MOST_ROWS = 4096
"""Beyond it a plain product reaches the processor's rate too."""


class PackedLinear(nn.Linear):
    """A linear layer whose layout belongs to the rows seen last. `pack` makes layers to it."""

    last = rows = 0
    layout: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return (
            _compiled_product(states, self.weight, self.bias)
            if torch.compiler.is_compiling()
            else self.product(states)
        )

    def product(self, states: Tensor) -> Tensor:
        """The same outside of a compiled program."""
        rows = states.numel() // states.shape[-1]
        if torch.is_grad_enabled() or not 0 < rows <= MOST_ROWS:
            return F.linear(states, self.weight, self.bias)
        if rows == self.last != self.rows:
            self.rows, self.layout = (
                rows,
                torch.ops.mkl._mkl_reorder_linear_weight(self.weight.detach(), rows),
            )
        self.last = rows
        if rows != self.rows:
            return F.linear(states, self.weight, self.bias)
        return torch.ops.mkl._mkl_linear(states, self.layout, self.weight, self.bias, rows)


class PackedShared(PackedLinear, SharedLinear):
    """The same for the one layer of all parts."""

    forward = SharedLinear.forward  # type: ignore[assignment]
    project = PackedLinear.forward  # type: ignore[assignment]


def pack(network: nn.Module) -> None:
    """Let every linear layer of `network` keep its weights' layout. ValueError where this torch has no MKL, or off the CPU."""
    if not torch.backends.mkl.is_available():
        raise ValueError(
            "packed weights need a torch with MKL (x86 processors): leave `packed` out"
        )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found = f"{module.weight.dtype} on {module.weight.device.type}"
            if found != "torch.float32 on cpu":
                raise ValueError(
                    f"packed weights are for float32 on CPU, and {name} is {found}: leave `packed` out"
                )
            module.__class__ = PackedShared if isinstance(module, SharedLinear) else PackedLinear
            _LAYERS[module.weight.data_ptr()] = module  # type: ignore[assignment]


_LAYERS: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
"""By the address of their weights: programs know tensors alone."""


@torch.library.custom_op("beit3::packed_product", mutates_args=())
def _compiled_product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiled program calls without looking inside. A layer whose weights have moved computes plainly."""
    layer = _LAYERS.get(weight.data_ptr())
    return F.linear(states, weight, bias) if layer is None else layer.product(states)


@_compiled_product.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])
