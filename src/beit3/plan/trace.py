"""A micro-batch without memory: what its forward and backward pass would allocate, and what they would compute.

Tensors are torch's fake ones, shapes and types without values; the task, autograd and autocast are the real ones. A storage
counts from the operation that makes it until it is freed, so the peak holds what autograd keeps, what activation
checkpointing makes again and what passes in between. Only what a batch holds beside pictures is real, because shapes follow
from it: how many positions are hidden, which anchors meet an object. What follows from the network's own numbers is the most
that it can be: NMS drops no box. Attention counts as a fused kernel, which never keeps its matrix.
"""

import warnings
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from beit3.task import Batch, Example, Task
from beit3.training.step import weigh

aten = torch.ops.aten

INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations whose second argument is a list of indices, masks among them."""


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch, in bytes beyond weights, optimizer and the batch itself."""

    kept: float
    """At the peak, gradients of parameters left out: activations and what passes."""
    peak: float
    """At the peak, with the gradients that have come so far where there were none before."""
    batch: float
    flops: float
    """Of matrix products and convolutions; a multiplication and an addition count as two."""
    largest: tuple[int, str]
    """Bytes, shape and type of the largest tensor."""


def trace(
    task: Task,
    example: Example,
    count: int,
    precision: torch.autocast,
    *,
    accelerator: bool,
    cached: bool = False,
    half: Container[int] = (),
) -> Trace:
    """`count` times `example` through `task`, which was built on meta and is of no use afterwards.

    accelerator: norms as its autocast has them. cached: as one of several micro-batches of a loss that compares examples
    (training/step.py). half: ids of the parameters that are gathered in bfloat16.
    """
    counted = Allocations()
    dtype = next(task.parameters()).dtype
    without_memory(task, counted, half)
    for _, parameter in task.trainable():
        parameter.register_post_accumulate_grad_hook(counted.set_aside)
    with counted, norms_in_float32(accelerator), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torchvision's, of how it tells that NMS has no size without values
        batch = task.collate(
            [
                {name: counted.valueless(value, dtype) for name, value in example.items()}
                for _ in range(count)
            ]
        )
        counted.start()
        with precision:
            loss = of_features(task, batch) if cached else task(batch | {"step": 0, "steps": 1})
        weigh(task, loss, task.targets(batch))[0].backward()
    return Trace(counted.kept, counted.peak, counted.inputs, counted.flops, counted.largest)


def of_features(task: Task, batch: Batch) -> Any:
    """What the second pass of gradient caching returns, after the first; the features stand for their own gradients."""
    with torch.no_grad():
        features = task.outputs(batch)
    return task(batch | {"feature_gradients": features})


class Allocations(TorchDispatchMode):
    """Counts storages while they live, and floating point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.alive: dict[int, Any] = {}
        self.bytes = self.inputs = self.gradients = self.kept = self.peak = self.flops = 0
        self.largest = (0, "")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # two calls of three ask for it
        found = self.run(func, args, dict(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.note(each)
        return found

    def __exit__(self, *error: Any) -> None:
        self.alive.clear()  # nothing is called any more when a storage goes
        super().__exit__(*error)

    def start(self) -> None:
        """What is there now are the inputs; peaks are counted from here."""
        self.inputs, self.kept, self.peak, self.largest = self.bytes, 0, 0, (0, "")

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One operation: on fake tensors if it meets or makes any, else (integers, masks) as it is."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        fakes = [each for each in tensors if isinstance(each, FakeTensor)]
        if not fakes and (tensors or not self.makes_floats(func, args, kwargs)):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.zeros(
                (), dtype=fakes[0].dtype
            ).item()  # a check of values, which finds nothing
        if func in INDEXED:
            args = (args[0], [place for each in args[1] for place in places(each)], *args[2:])
        if len(fakes) < len(tensors):
            args, kwargs = tree_map(self.plain, (args, kwargs))
        try:
            with self.fake:
                return func(*args, **kwargs)
        except DynamicOutputShapeException:  # as if every place were chosen, every code the first
            return self.plain(func(*tree_map(ones, args), **tree_map(ones, kwargs)))

    def makes_floats(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on no tensor at all (zeros, arange) makes one of floats."""
        with self.fake:
            made = func(*args, **kwargs)
        return isinstance(made, Tensor) and made.is_floating_point()

    def plain(self, value: Any) -> Any:
        """A real tensor as a fake one; everything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        with self.fake:
            return torch.empty(value.shape, dtype=value.dtype)

    def valueless(self, value: Any, dtype: torch.dtype) -> Any:
        """Pictures as fake bytes, or fake floats of `dtype`; everything else, labels and boxes among it, as it is."""
        if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[-3] != 3:
            return value
        with self.fake:
            return torch.empty(
                value.shape, dtype=dtype if value.is_floating_point() else value.dtype
            )

    def leave_out(self, tensor: Tensor) -> None:
        """Never count the storage of a weight, though views of it are made."""
        storage = tensor.untyped_storage()
        self.alive[id(storage)] = storage

    def note(self, tensor: Tensor) -> None:
        """Count a storage that is new, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def freed(_: Any) -> None:
            del self.alive[key]
            self.bytes -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.kept = max(self.kept, self.bytes - self.inputs)
        self.peak = max(self.peak, self.bytes - self.inputs + self.gradients)
        if size > self.largest[0]:
            self.largest = size, f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    def set_aside(self, parameter: Tensor) -> None:
        """A gradient is whole: it is counted apart from here on."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None


def ones(value: Any) -> Any:
    """A fake tensor as a real one; everything else as it is."""
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, FakeTensor) else value


def places(index: Any) -> list[Any]:
    """A real mask as the positions that it chooses, a tensor each dimension; any other index as it is."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero(as_tuple=True))


def without_memory(task: Task, counted: Allocations, half: Container[int]) -> None:
    """Give a task fake parameters and buffers; its integers and masks become real, 1 and set."""
    gathered = {name for name, parameter in task.named_parameters() if id(parameter) in half}
    task._apply(lambda tensor: fake_or_ones(tensor, counted))
    for name, parameter in task.named_parameters():
        if name in gathered:
            parameter.data = parameter.data.bfloat16()
    for tensor in (*task.parameters(), *task.buffers()):
        counted.leave_out(tensor)


def fake_or_ones(tensor: Tensor, counted: Allocations) -> Tensor:
    if not tensor.is_floating_point():
        return torch.ones(
            tensor.shape, dtype=tensor.dtype, device="cpu"
        )  # as amid a run: a codebook has started
    with counted.fake:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextmanager
def norms_in_float32(wanted: bool) -> Iterator[None]:
    """Autocast as accelerators have it; a processor's, which counts here, leaves norms in bfloat16."""
    plain = F.layer_norm

    def norm(states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return plain(
            states.float() if torch.is_autocast_enabled("cpu") else states, *arguments, **options
        )

    if wanted:
        F.layer_norm = norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.layer_norm = plain
