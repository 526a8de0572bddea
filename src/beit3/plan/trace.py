"""Traces a micro-batch without memory: what its forward and backward pass would allocate and
compute.

The task, autograd and autocast are the real ones, the tensors fake (`plan/stand_ins.py` says which
values stand in). Attention counts as a fused kernel, which never keeps its matrix.
"""

import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.plan.allocations import AllocationTracker
from beit3.plan.stand_ins import FakeExecutor
from beit3.task import Batch, Example, Task
from beit3.training.step import combine_losses


@dataclass(frozen=True)
class Trace:
    """One micro-batch, in bytes beyond weights, optimizer and the batch itself."""

    activations: float
    """At the peak, without the gradients of parameters: activations and temporary tensors."""
    peak: float
    """At the peak, with the gradients that are finished by then, where there were none before."""
    batch: float
    flops: float
    """Of matrix products and convolutions; a multiplication and an addition count as two."""
    largest_tensor: tuple[int, str]
    """Bytes, and shape and type."""


def trace_step(
    task: Task,
    example: Example,
    count: int,
    precision: torch.autocast,
    *,
    accelerator: bool,
    caches_features: bool = False,
    bfloat16_parameters: Container[int] = (),
) -> Trace:
    """Traces `count` copies of `example` through `task`.

    Args:
        task: Built on the meta device; of no use afterwards.
        example: One example of the task, as its `example` method returns it.
        count: Number of examples in the micro-batch.
        precision: The autocast context of the forward pass.
        accelerator: Whether norms run in float32 under autocast, as they do on an accelerator.
        caches_features: Whether this is one of several micro-batches of a loss that compares
            examples (training/step.py).
        bfloat16_parameters: Ids of the parameters that are gathered in bfloat16.
    """
    tracker = AllocationTracker()
    dtype = next(task.parameters()).dtype
    use_fake_parameters(task, tracker, bfloat16_parameters)
    for _, parameter in task.trainable_parameters():
        parameter.register_post_accumulate_grad_hook(tracker.release_gradient)
    with tracker, layer_norms_in_float32(accelerator), warnings.catch_warnings():
        # torchvision warns about how it learns that the output of NMS has no size without values.
        warnings.simplefilter("ignore", FutureWarning)
        batch = make_batch(task, example, count, tracker.executor, dtype)
        tracker.start()
        with precision:
            if caches_features:
                result = forward_with_cached_features(task, batch)
            else:
                result = task(batch | {"step": 0, "steps": 1})
        combine_losses(task, result, task.targets(batch))[0].backward()
    return Trace(
        activations=tracker.activation_peak,
        peak=tracker.peak,
        batch=tracker.input_bytes,
        flops=tracker.flops,
        largest_tensor=tracker.largest_tensor,
    )


def make_batch(
    task: Task, example: Example, count: int, executor: FakeExecutor, dtype: torch.dtype
) -> Batch:
    """Returns a batch of `count` copies of an example whose images have no values."""
    examples = [
        {name: executor.drop_image_values(value, dtype) for name, value in example.items()}
        for _ in range(count)
    ]
    return task.collate(examples)


def forward_with_cached_features(task: Task, batch: Batch) -> Any:
    """Runs both passes of gradient caching; the features stand for their own gradients."""
    with torch.no_grad():
        features = task.outputs(batch)
    return task(batch | {"feature_gradients": features})


def use_fake_parameters(
    task: Task, tracker: AllocationTracker, bfloat16_parameters: Container[int]
) -> None:
    """Gives a task fake parameters and buffers; its integers and masks become real, 1 and set."""
    bfloat16_names = {
        name for name, parameter in task.named_parameters() if id(parameter) in bfloat16_parameters
    }

    def replace_tensor(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tracker.executor.empty(tensor.shape, tensor.dtype)
        # As in the middle of a run: the codebook's `started` flag is set.
        return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")

    task._apply(replace_tensor)
    for name, parameter in task.named_parameters():
        if name in bfloat16_names:
            parameter.data = parameter.data.bfloat16()
    for tensor in (*task.parameters(), *task.buffers()):
        tracker.exclude(tensor)


@contextmanager
def layer_norms_in_float32(enabled: bool) -> Iterator[None]:
    """Imitates the autocast of accelerators, which runs layer norms in float32; on CPU they stay in
    bfloat16."""
    layer_norm = F.layer_norm

    def layer_norm_in_float32(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            states = states.float()
        return layer_norm(states, *args, **kwargs)

    if enabled:
        F.layer_norm = layer_norm_in_float32  # type: ignore[assignment]
    try:
        yield
    finally:
        F.layer_norm = layer_norm
