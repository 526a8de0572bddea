"""8-bit integers for inference on CPU: the same network, two to four times faster.

Every linear layer of the Transformer blocks keeps its weights as int8, with one scale per output
channel. Its inputs are rounded to int8 as they come, with one scale per token, so that a prediction
does not depend on the rest of the batch. Embeddings, norms, softmax, GELU and heads stay in
float32. torchao does the arithmetic, and torch.compile fuses the rounding into the operations
before it: without compilation, rounding costs as much as the products gain. Weights on disk do not
change.
"""

import torch

from beit3.task import Task, task_name
from beit3.training.parallel import find_blocks, wrap_blocks

INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni")
"""Either multiplies bytes and adds them up in 32 bits. Without them int8 is no faster, and oneDNN's
sums may overflow."""


def quantize(task: Task) -> Task:
    """Quantizes and compiles the blocks of a task in place; returns the task, in evaluation mode.

    It takes seconds, and once more for each kind of input. Afterwards the task can no longer be
    trained, saved or moved.

    Raises:
        ValueError: The weights are not on a CPU with int8 instructions, torchao is not installed,
            torch finds no C++ compiler, or the task has no blocks. Nothing was changed then.
    """
    check_support(next(task.parameters()).device)
    blocks = find_blocks(task)
    if not blocks:
        raise ValueError(
            f"{task_name(type(task))} has no Transformer blocks to quantize: leave int8 out"
        )
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    task.eval().requires_grad_(False)
    # torchao's settings of the compiler are for GPUs, and would hold for the whole process.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    for block in blocks:
        quantize_(block, config)
    wrap_blocks(task, compiled=True)
    return task


def check_support(device: torch.device) -> None:
    """Raises ValueError where `quantize` does not work on this device or machine."""
    if device.type != "cpu":
        raise ValueError(
            f"int8 runs on CPU, and the device is {device.type}: leave int8 out, or hide the GPU"
        )
    if not any(torch.cpu.get_capabilities().get(name) for name in INT8_INSTRUCTIONS):
        raise ValueError(
            "this CPU has no int8 instructions (VNNI), so int8 would not be faster: leave int8 out"
        )
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise ValueError(
            "int8 needs torchao: pip install 'beit3[quant]', or leave int8 out"
        ) from None
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except Exception as error:  # the compiler's parts raise errors of many classes
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "int8 needs a C++ compiler and Python's headers (g++, python3-dev), or leave int8 "
            f"out: {reason}"
        ) from None
