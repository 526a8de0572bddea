"""From a task's class to its network on this process: built on meta, wrapped from outside, sharded, then filled.

The order is activation checkpointing, compilation, sharding (FSDP2). Initial values are drawn per parameter from
(seed, name) and each rank keeps its shard, so weights do not depend on the number of processes. Frozen parts are
replicated. A process alone has nothing to shard: it holds plain tensors and skips FSDP (docs/decisions.md says what
that saves).
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recomputed

from beit3.ops.collectives import all_reduce, world_size
from beit3.recipe import RunConfig, TaskConfig
from beit3.segmentation.prior import synchronised
from beit3.task import Task, task_name
from beit3.tokenizer.text import TextTokenizer

RECOMPILATIONS = 64
"""Programs of one block's code: blocks with and without stochastic depth or fusion, each for images, texts and pairs. Beyond
torch's own limit of 8 it would go on uncompiled, with a warning that is easily missed."""

_ATEN = torch.ops.aten
PRODUCTS = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
)
"""What selective checkpointing keeps: nearly all of a block's time, and about half of what it would keep."""


def build(
    task_class: type[Task],
    config: TaskConfig,
    tokenizer: TextTokenizer | None,
    run: RunConfig,
    device: torch.device,
) -> Task:
    """The task in training mode as `run` wants it, without memory for its weights yet: `materialise` gives that."""
    with torch.device("meta"):
        task = task_class(config, tokenizer=tokenizer)
    synchronised(task, device).to(dtype(run))
    wrap_blocks(task, recompute=run.checkpointing, compiled=run.compile)
    if world_size() > 1:
        shard(task, run, device)
    return task.train()


def dtype(run: RunConfig) -> torch.dtype:
    """What weights, optimizer and gradients are kept in: float32, or float64 where a check asks for it."""
    return torch.float64 if run.precision == "float64" else torch.float32


def bfloat16(run: RunConfig, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16: on accelerators unless the run says otherwise."""
    return run.precision == "bfloat16" or (run.precision == "auto" and device.type != "cpu")


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """Decides the precision of each operation, alone and sharded alike: norms, softmax and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16(run, device))


def blocks_of(task: Task) -> list[nn.Module]:
    """The Transformer blocks that train, of backbone, encoder, decoder: every list called `blocks`."""
    lists = [
        (name, module)
        for name, module in task.named_modules()
        if name.endswith("blocks") and isinstance(module, nn.ModuleList)
    ]
    return [
        block for name, blocks in lists if name.split(".")[0] not in task.frozen for block in blocks
    ]


def wrap_blocks(
    task: Task, *, recompute: Literal["none", "selective", "full"] = "none", compiled: bool = False
) -> None:
    """Activation checkpointing, then compilation, of each block, from outside; names do not change."""
    blocks = blocks_of(task)
    if (recompute != "none" or compiled) and not blocks:
        raise ValueError(
            f"{task_name(type(task))} has no blocks to recompute or compile: leave run.checkpointing and run.compile off"
        )
    if compiled:
        torch._dynamo.config.recompile_limit = max(
            RECOMPILATIONS, torch._dynamo.config.recompile_limit
        )
    options = (
        {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
        if recompute == "selective"
        else {}
    )
    for block in blocks:
        if recompute != "none":
            block.forward = partial(recomputed, block.forward, use_reentrant=False, **options)  # type: ignore[method-assign]
        if compiled:
            block.compile()


def keep_products(
    context: Any, operation: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """The policy of selective checkpointing."""
    return (
        CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
    )


def shard(task: Task, run: RunConfig, device: torch.device) -> None:
    """One FSDP group per block, one for the rest; gradients are summed, because losses are parts of the step's means.

    Blocks are gathered in bfloat16 where autocast would cast them anyway (not on CPU, where it leaves norms alone);
    inputs keep their precision, so that the residual stream is float32 as on one process. The rest is gathered as it is
    kept: a codebook's projections and norms are computed in float32.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    half = torch.bfloat16 if bfloat16(run, device) and device.type != "cpu" else None
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=dtype(run), cast_forward_inputs=False
    )
    for block in blocks_of(task):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    frozen = {
        parameter
        for name, parameter in task.named_parameters()
        if name.split(".")[0] in task.frozen
    }
    fully_shard(task, mesh=mesh, ignored_params=frozen)
    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for name in ("outputs", "predict"):
        register_fsdp_forward_method(task, name)


def materialise(task: Task, device: torch.device, seed: int) -> None:
    """Memory on `device` and initial values for everything built on meta; what is real already (frozen parts) moves."""

    def real(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    task._apply(real)
    task.init_weights(seed)


def sync_gradients(task: Task, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over processes; before the last micro-batch they only add up."""
    if isinstance(task, FSDPModule):
        task.set_requires_gradient_sync(wanted)
        task.set_is_last_backward(wanted)


def reshard(task: Task) -> None:
    """Give back what an evaluation left gathered."""
    if isinstance(task, FSDPModule):
        cast(FSDPModule, task).reshard()


@torch.no_grad()
def share_statistics(task: Task) -> None:
    """Running statistics of batch norms are each process's own where these are not synchronised: all take their mean."""
    if world_size() == 1:
        return
    for module in task.modules():
        for buffer in module.buffers(recurse=False) if isinstance(module, _BatchNorm) else ():
            if buffer.is_floating_point():
                buffer.copy_(all_reduce(buffer) / world_size())
