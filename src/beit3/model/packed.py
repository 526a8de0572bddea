"""Linear layers on CPU that keep their weights in the layout of the product (float32 inference).

A plain product lays the weights out anew in every call, which for the 197 tokens of one image costs
up to a third of it. A `PackedLinear` keeps the layout once the same number of rows came twice in a
row. Results are equal up to rounding; memory grows by the packed weights. Parameters keep their
names, and blocks may be compiled around packed layers.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.layout import Parts
from beit3.model.multiway import SharedLinear

MAX_ROWS = 4096
"""With more rows a plain product reaches the CPU's rate too."""


class PackedLinear(nn.Module):
    """A linear layer whose packed weights belong to the number of rows that it saw last."""

    def __init__(self, linear: nn.Linear):
        """Takes over the parameters of `linear`."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed_weight: Tensor | None = None
        self.packed_rows = 0
        """Rows that `packed_weight` is for; 0: there is none yet."""
        self.last_rows = 0
        self._register()

    def forward(self, states: Tensor) -> Tensor:
        """Maps states [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            return _multiply_in_program(states, self.weight, self.bias, self.handle)
        return self.multiply(states)

    def multiply(self, states: Tensor) -> Tensor:
        """Computes `forward` outside of a compiled program."""
        rows = states.numel() // states.shape[-1]
        if torch.is_grad_enabled() or not 0 < rows <= MAX_ROWS:
            return F.linear(states, self.weight, self.bias)
        if rows == self.last_rows != self.packed_rows:
            self.packed_weight = torch.ops.mkl._mkl_reorder_linear_weight(
                self.weight.detach(), rows
            )
            self.packed_rows = rows
        self.last_rows = rows
        if rows != self.packed_rows:
            return F.linear(states, self.weight, self.bias)
        return torch.ops.mkl._mkl_linear(states, self.packed_weight, self.weight, self.bias, rows)

    def _register(self) -> None:
        """Gives the layer a handle by which compiled programs find it."""
        self.handle = next(_handles)
        _layers[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a layer of its own: its weights may change without the original's."""
        super().__setstate__(state)
        self.packed_weight, self.packed_rows, self.last_rows = None, 0, 0
        self._register()


class PackedSharedLinear(PackedLinear):
    """The packed form of a linear layer for the parts of all experts."""

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:  # type: ignore[override]
        return tuple(super(PackedSharedLinear, self).forward(part) for part in parts)


def pack(network: nn.Module) -> nn.Module:
    """Replaces every linear layer of `network` by a packed one and returns the network.

    Raises:
        ValueError: torch without MKL, or weights that are not float32 on CPU.
    """
    if not torch.backends.mkl.is_available():
        raise ValueError("packed weights need a torch with MKL (x86 CPUs): leave `packed` out")
    linears = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        kind = f"{linear.weight.dtype} on {linear.weight.device.type}"
        if kind != "torch.float32 on cpu":
            raise ValueError(
                f"packed weights are for float32 on CPU, and {name} is {kind}: leave `packed` out"
            )
    for name, linear in linears.items():
        is_shared = isinstance(linear, SharedLinear)
        packed = PackedSharedLinear(linear) if is_shared else PackedLinear(linear)
        packed.train(linear.training)
        if not name:
            return packed
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, packed)
    return network


_handles = itertools.count()
_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
"""Layers by handle. A compiled program's operators take tensors and numbers, never modules."""


@torch.library.custom_op("beit3::packed_linear", mutates_args=())
def _multiply_in_program(
    states: Tensor, weight: Tensor, bias: Tensor | None, handle: int
) -> Tensor:
    """Multiplies as the layer does; a compiled program calls this without looking inside."""
    return _layers[handle].multiply(states)


@_multiply_in_program.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor | None, handle: int) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])
