"""8-bit integers for inference on CPU: the same network, two to four times faster.

Every linear layer of the Transformer blocks keeps its weights as int8, one scale per output
channel; its inputs are rounded
to int8 as they come, one scale per token, so that a prediction does not depend on what else is in
the batch. Embeddings,
norms, softmax, GELU and heads stay in float32. torchao does the arithmetic and torch.compile fuses
the rounding into what
comes before it: uncompiled, rounding costs what the products gain. Weights on disk stay as they
are.
"""

import torch

from beit3.task import Task, task_name
from beit3.training.parallel import find_blocks, wrap_blocks

INSTRUCTIONS = ("avx512_vnni", "avx_vnni")
"""Either multiplies bytes and adds them up in 32 bits. Without them int8 is no faster, and oneDNN's
sums may overflow."""


def quantize(task: Task) -> Task:
    """The task itself, in evaluation mode, its blocks in int8 and compiled. Seconds now, and once
    more per kind of input.

    It can no longer be trained, saved or moved. Raises ValueError, before anything is changed,
    where its weights are not on
    a processor that multiplies bytes, where torchao is not installed, where torch finds no C++
    compiler, or for a task
    without blocks.
    """
    check_support(next(task.parameters()).device)
    blocks = find_blocks(task)
    if not blocks:
        raise ValueError(
            f"{task_name(type(task))} has no Transformer blocks to put into int8: leave int8 out"
        )
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    task.eval().requires_grad_(False)
    for block in (
        blocks
    ):  # torchao's settings of the compiler are for GPUs, and would hold for the whole process
        quantize_(block, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    wrap_blocks(task, compiled=True)
    return task


def check_support(device: torch.device) -> None:
    """ValueError where `quantize` cannot work on this device of this machine."""
    if device.type != "cpu":
        raise ValueError(
            f"int8 is for a processor, and the device here is {device.type}: leave int8 out, or "
            "hide the accelerator"
        )
    if not any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS):
        raise ValueError(
            "this processor has no int8 instructions (VNNI), so int8 would not be faster: leave "
            "int8 out"
        )
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise ValueError(
            "int8 needs torchao: pip install 'beit3[quant]', or leave int8 out"
        ) from None
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except (
        Exception
    ) as error:  # torch raises what its compiler's parts raise, and no class covers them
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "int8 needs a C++ compiler and Python's headers (g++, python3-dev), or leave int8 "
            f"out: {reason}"
        ) from None
