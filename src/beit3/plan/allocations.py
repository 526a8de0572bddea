"""Counts the memory and the floating point operations of a step that is traced on fake tensors."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from beit3.plan.stand_ins import FakeExecutor, NumpyStandIns


class AllocationTracker(TorchDispatchMode):
    """Counts storages while they live, and floating point operations.

    A storage counts from the operation that makes it until it is freed, so the peak holds what
    autograd keeps, what activation checkpointing recomputes and what passes in between. All sizes
    are in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.executor = FakeExecutor()
        self.live_storages: dict[int, Any] = {}
        self.live_bytes = self.input_bytes = self.gradient_bytes = 0
        self.activation_peak = 0
        """Largest sum of everything but inputs, excluded storages and finished gradients."""
        self.peak = 0
        """The same with the gradients that were finished by then."""
        self.flops = 0
        self.largest_tensor = (0, "")
        """Bytes, and shape and type."""
        self._numpy_stand_ins = NumpyStandIns()

    def __enter__(self) -> "AllocationTracker":
        self._numpy_stand_ins.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live_storages.clear()  # storages that are freed from here on are not counted any more
        super().__exit__(*error)
        self._numpy_stand_ins.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # a shortcut, because two of three calls ask for it
        result = self.executor.run(func, args, dict(kwargs or {}))
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops:
            self.flops += count_flops(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count_storage(leaf)
        return result

    def start(self) -> None:
        """Takes what is allocated now as the inputs, and counts peaks from here."""
        self.input_bytes, self.largest_tensor = self.live_bytes, (0, "")
        self.activation_peak = self.peak = 0

    def exclude(self, tensor: Tensor) -> None:
        """Never counts the storage of a weight, though views of it are made."""
        storage = tensor.untyped_storage()
        self.live_storages[id(storage)] = storage

    def release_gradient(self, parameter: Tensor) -> None:
        """Counts a parameter's finished gradient apart from activations, and drops it."""
        assert parameter.grad is not None
        self.gradient_bytes += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None

    def _count_storage(self, tensor: Tensor) -> None:
        """Counts a storage that is new, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.live_storages:
            return

        def on_free(_: Any) -> None:
            del self.live_storages[key]
            self.live_bytes -= size

        self.live_storages[key] = weakref.ref(storage, on_free)
        self.live_bytes += size
        activation_bytes = self.live_bytes - self.input_bytes
        self.activation_peak = max(self.activation_peak, activation_bytes)
        self.peak = max(self.peak, activation_bytes + self.gradient_bytes)
        if size > self.largest_tensor[0]:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.largest_tensor = size, f"{list(tensor.shape)} {dtype}"
