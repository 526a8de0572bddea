"""From a task's class to its network on this process.

The network is built on the meta device, its blocks are wrapped from outside (activation
checkpointing, then compilation), it is sharded (FSDP2), and only then gets memory and initial
values. Initial values are drawn per parameter from (seed, name) and each rank keeps its shard, so
weights do not depend on the number of processes. Frozen parts are replicated. A single process has
nothing to shard: it holds plain tensors and skips FSDP (docs/decisions.md says what that saves).
"""

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from beit3.ops.batch_norm import sync_batch_norms
from beit3.ops.collectives import world_size
from beit3.recipe import RunConfig, TaskConfig
from beit3.task import Task, task_name
from beit3.tokenizer.text import TextTokenizer

RECOMPILE_LIMIT = 64
"""Programs compiled from one block's code: blocks with and without stochastic depth or fusion, each
for images, texts and pairs. Beyond torch's own limit of 8 it would continue uncompiled, with a
warning that is easily missed."""

_ATEN = torch.ops.aten
SAVED_OPERATIONS = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
)
"""Operations whose results selective checkpointing keeps: they take nearly all of a block's time,
and their results are about half of what the block would keep."""


def build_task(
    task_class: type[Task],
    config: TaskConfig,
    tokenizer: TextTokenizer | None,
    run: RunConfig,
    device: torch.device,
) -> Task:
    """Builds the task in training mode on the meta device, wrapped and sharded as `run` says.

    Its weights have no memory yet: `materialize` allocates and initializes them.
    """
    with torch.device("meta"):
        task = task_class(config, tokenizer=tokenizer)
    sync_batch_norms(task, device).to(get_parameter_dtype(run))
    wrap_blocks(task, recompute=run.checkpointing, compiled=run.compile)
    if world_size() > 1:
        shard(task, run, device)
    return task.train()


# Precision ----------------------------------------------------------------------------------------


def get_parameter_dtype(run: RunConfig) -> torch.dtype:
    """Returns the dtype of weights, gradients and optimizer state: float32, or float64 for
    checks."""
    return torch.float64 if run.precision == "float64" else torch.float32


def uses_bfloat16(run: RunConfig, device: torch.device) -> bool:
    """Returns whether matrix products are in bfloat16: on accelerators unless `run` says not."""
    return run.precision == "bfloat16" or (run.precision == "auto" and device.type != "cpu")


def make_autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """Returns the context that decides the precision of each operation, sharded or not.

    Norms, softmax and losses stay in float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(run, device))


# Blocks -------------------------------------------------------------------------------------------


def find_blocks(task: Task) -> list[nn.Module]:
    """Returns the trainable Transformer blocks: the members of every module list called
    `blocks`."""
    blocks: list[nn.Module] = []
    for name, module in task.named_modules():
        is_list_of_blocks = name.endswith("blocks") and isinstance(module, nn.ModuleList)
        if is_list_of_blocks and name.split(".")[0] not in task.frozen:
            blocks += module.children()
    return blocks


def wrap_blocks(
    task: Task, *, recompute: Literal["none", "selective", "full"] = "none", compiled: bool = False
) -> None:
    """Applies activation checkpointing, then compilation, to each block from outside.

    The names of parameters do not change.

    Args:
        task: The task, whose blocks are changed in place.
        recompute: What the backward pass computes again: nothing, cheap operations, or the block.
        compiled: Whether each block becomes a program of torch.compile.
    """
    blocks = find_blocks(task)
    if (recompute != "none" or compiled) and not blocks:
        raise ValueError(
            f"{task_name(type(task))} has no blocks to recompute or compile: leave "
            "run.checkpointing and run.compile off"
        )
    if compiled:
        dynamo_config = torch._dynamo.config
        dynamo_config.recompile_limit = max(RECOMPILE_LIMIT, dynamo_config.recompile_limit)
    options: dict[str, Any] = {}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_matmuls)
    for block in blocks:
        if recompute != "none":
            forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
            block.forward = forward  # type: ignore[method-assign]
        if compiled:
            block.compile()


def save_matmuls(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: keep matrix products and attention, recompute the rest."""
    if operation in SAVED_OPERATIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# Sharding -----------------------------------------------------------------------------------------


def shard(task: Task, run: RunConfig, device: torch.device) -> None:
    """Shards the task with FSDP2: one group per block and one for the rest.

    Gradients are summed over processes, because losses are parts of the step's means. Blocks are
    gathered in bfloat16 where autocast would cast them anyway (not on CPU, where it leaves norms
    alone); inputs keep their precision, so that the residual stream is float32 as on one process.
    The rest is gathered in the dtype of its parameters: a codebook's projections and norms are
    computed in float32.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    gather_bfloat16 = uses_bfloat16(run, device) and device.type != "cpu"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if gather_bfloat16 else None,
        reduce_dtype=get_parameter_dtype(run),
        cast_forward_inputs=False,
    )
    for block in find_blocks(task):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    frozen_parameters = {
        parameter
        for name, parameter in task.named_parameters()
        if name.split(".")[0] in task.frozen
    }
    fully_shard(task, mesh=mesh, ignored_params=frozen_parameters)
    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("outputs", "predict", "compute_shared_features"):
        register_fsdp_forward_method(task, method)


def materialize(task: Task, device: torch.device, seed: int) -> None:
    """Allocates all meta tensors of the task on `device` and draws initial values.

    Tensors that have values already (frozen parts) are moved.
    """

    def allocate(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device)
        return tensor.to(device)

    task._apply(allocate)
    task.init_weights(seed)


def set_gradient_sync(task: Task, enabled: bool) -> None:
    """Sets whether the next backward pass sums gradients over processes.

    That is needed for the last micro-batch of a step; before it gradients only accumulate.
    """
    if isinstance(task, FSDPModule):
        task.set_requires_gradient_sync(enabled)
        task.set_is_last_backward(enabled)


def reshard(task: Task) -> None:
    """Frees the gathered parameters that an evaluation leaves behind."""
    if isinstance(task, FSDPModule):
        cast(FSDPModule, task).reshard()
