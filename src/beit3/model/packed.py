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
        self.packed: tuple[int, Tensor] | None = None
        """Number of rows and the weights that are laid out for it. One value, which is replaced as
        a whole: another thread may do so at any time."""
        self.last_rows = 0
        self._register()

    @property
    def packed_rows(self) -> int:
        """Number of rows that the packed weights are for; 0: there are none yet."""
        return 0 if self.packed is None else self.packed[0]

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
        packed = self.packed
        if rows == self.last_rows and (packed is None or packed[0] != rows):
            weight = torch.ops.mkl._mkl_reorder_linear_weight(self.weight.detach(), rows)
            packed = self.packed = (rows, weight)
        self.last_rows = rows
        if packed is None or packed[0] != rows:
            return F.linear(states, self.weight, self.bias)
        return torch.ops.mkl._mkl_linear(states, packed[1], self.weight, self.bias, rows)

    def _register(self) -> None:
        """Gives the layer a handle by which compiled programs find it."""
        self.handle = next(_handles)
        _layers[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a layer of its own: its weights may change without the original's."""
        super().__setstate__(state)
        self.packed, self.last_rows = None, 0
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


# Half precision -----------------------------------------------------------------------------------


class HalfLinear(nn.Module):
    """A linear layer in half precision that on CPU keeps bfloat16 weights in oneDNN's layout.

    That layout serves any number of rows. A plain product reads twice the bytes for a few rows,
    because it lays the weights out anew in every call.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        """Takes over the parameters of `linear`, rounded to `dtype`."""
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        self.packed_weight: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Maps states [..., in] of any floating-point dtype -> [..., out] in half precision."""
        states = states.to(self.weight.dtype)
        if torch.compiler.is_compiling() or not can_pack_half(self.weight) or not states.numel():
            return F.linear(states, self.weight, self.bias)
        if self.packed_weight is None:
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(
            states, self.packed_weight, self.bias, "none", [], ""
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies lay their weights out themselves."""
        return self.__dict__ | {"packed_weight": None}


class HalfSharedLinear(HalfLinear):
    """The half-precision form of a linear layer for the parts of all experts."""

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:  # type: ignore[override]
        return tuple(super(HalfSharedLinear, self).forward(part) for part in parts)


def can_pack_half(weight: Tensor) -> bool:
    """Returns whether oneDNN takes a weight in its own layout: bfloat16 on a CPU that has it."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class HalfHead(nn.Linear):
    """A head over a vocabulary whose weights are read as float16 where rows are few, on x86 CPUs.

    Inputs, sums and logits stay in float32, and each weight is rounded to 11 bits. A word of a
    caption reads half the bytes then. Other calls use the float32 weights.
    """

    MAX_ROWS = 32
    """With more rows the float32 product is as fast."""

    def __init__(self, linear: nn.Linear):
        """Takes over the parameters of `linear`."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.packed_weight: torch.ScriptObject | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Maps states [..., in] -> logits [..., out]."""
        rows = states.numel() // states.shape[-1]
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or not 0 < rows <= self.MAX_ROWS
            or states.device.type != "cpu"
            or "fbgemm" not in torch.backends.quantized.supported_engines
        ):
            return super().forward(states)
        if self.packed_weight is None:
            self.packed_weight = torch.ops.quantized.linear_prepack_fp16(
                self.weight.detach(), self.bias
            )
        return torch.ops.quantized.linear_dynamic_fp16(states.float(), self.packed_weight)

    def __getstate__(self) -> dict[str, Any]:
        """Copies lay their weights out themselves."""
        return self.__dict__ | {"packed_weight": None}


def halve(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Changes every linear layer and layer norm of `network` to `dtype`; returns the network."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.LayerNorm):
            module.to(dtype)
        if not isinstance(module, nn.Linear):
            continue
        is_shared = isinstance(module, SharedLinear)
        half = HalfSharedLinear(module, dtype) if is_shared else HalfLinear(module, dtype)
        half.train(module.training)
        if not name:
            return half
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, half)
    return network
