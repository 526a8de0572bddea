"""Number formats for inference: which one a machine computes fastest, and changing a task to it.

In half precision (bfloat16, float16) attention and experts of the Transformer blocks keep their
weights and compute in 16 bits. Embeddings, the sums along the blocks, the norms of these sums and
the heads stay in float32, so that logits and unit vectors have its resolution. int8 is in
quantize.py. Weights on disk do not change.
"""

import statistics
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from beit3.config import suggest
from beit3.model.layers import Block
from beit3.model.layout import Parts
from beit3.model.packed import HalfHead, HalfLinear, PackedLinear, halve, pack
from beit3.quantize import quantize
from beit3.task import Task, task_name
from beit3.tasks.captioning import Captioning
from beit3.training.parallel import find_blocks

Precision = Literal["float32", "bfloat16", "float16", "int8", "auto"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

MIN_GAIN = 1.1
"""Times by which bfloat16 must be faster to be chosen: less is noise."""
MEASURE_SECONDS = 0.5
MIN_ROUNDS, MAX_ROUNDS = 3, 15
MAX_ROWS = 256
"""Tokens of an image that are multiplied; the ratio does not change beyond."""
CAPTION_STEPS = 16
"""Words of a caption, as they are weighed against its image."""
CACHE_BYTES = 64 * 2**20
"""Bytes of float32 weights that a measured step of a caption reads, too many for a CPU's cache."""


# Choosing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionChoice:
    """A format, and what was measured for it."""

    name: str
    """float32, bfloat16 or float16."""
    gain: float | None = None
    """Time of float32 divided by that of bfloat16; None: not measured."""

    def __str__(self) -> str:
        if self.gain is None:
            return self.name
        return f"{self.name} (measured here: bfloat16 is {self.gain:.2f} times as fast as float32)"


def choose_precision(task: Task, measure: bool = True) -> str:
    """Returns the name of the format that "auto" stands for; see `compare_precisions`."""
    return compare_precisions(task, measure=measure).name


def compare_precisions(
    task: Task, *, measure: bool = True, packed: bool = False
) -> PrecisionChoice:
    """Chooses a format for the device that the task is on.

    Accelerators get bfloat16, or float16 where they have no bfloat16. On a CPU a few of the task's
    own layers are computed in float32 and in bfloat16 for about half a second: on the tokens of an
    image, and for captions also on those of a step of beam search. int8 is never chosen, because it
    rounds more and compiles for long.

    Args:
        task: The task in float32; it is not changed.
        measure: Whether to measure on a CPU; without it a CPU gets float32.
        packed: Whether float32 would run with packed weights.
    """
    device = next(task.parameters()).device
    if device.type != "cpu":
        return PrecisionChoice("bfloat16" if has_bfloat16(device) else "float16")
    if not (measure and find_half_blocks(task)):
        return PrecisionChoice("float32")
    gain = measure_gain(task, packed=packed)
    return PrecisionChoice("bfloat16" if gain > MIN_GAIN else "float32", gain)


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether an accelerator computes in bfloat16 without emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


@torch.inference_mode()
def measure_gain(task: Task, *, packed: bool = False) -> float:
    """Returns the time of float32 divided by that of bfloat16: a median of interleaved rounds."""
    experts = [next(block.ffn.children()) for block in find_half_blocks(task)]
    bytes_per_expert = sum(parameter.nbytes for parameter in experts[0].parameters())
    experts = experts[: 1 + CACHE_BYTES // bytes_per_expert]
    plain = [pack(deepcopy(expert)) for expert in experts] if packed else experts
    half = [halve(deepcopy(expert), torch.bfloat16) for expert in experts]

    model = task.config.model
    image = torch.randn(1, min(1 + model.num_patches, MAX_ROWS), model.dim)
    step = None
    if isinstance(task, Captioning):
        step = torch.randn(1, 2 * task.config.decoding.num_beams, model.dim)
    for _ in range(2):  # weights are laid out the second time at the latest
        time_experts(plain, image, step)
        time_experts(half, image, step)
    gains: list[float] = []
    started = time.perf_counter()
    while len(gains) < MIN_ROUNDS or (
        len(gains) < MAX_ROUNDS and time.perf_counter() - started < MEASURE_SECONDS
    ):
        gains.append(time_experts(plain, image, step) / time_experts(half, image, step))
    return statistics.median(gains)


def time_experts(experts: list[nn.Module], image: Tensor, step: Tensor | None) -> float:
    """Returns the seconds that an expert takes for an image, and for a caption's steps if any."""
    started = time.perf_counter()
    experts[0](image)
    seconds = time.perf_counter() - started
    if step is not None:
        started = time.perf_counter()
        for expert in experts:
            expert(step)
        seconds += CAPTION_STEPS * (time.perf_counter() - started) / len(experts)
    return seconds


# Changing -----------------------------------------------------------------------------------------


def apply_precision(task: Task, name: str) -> Task:
    """Changes a task in float32 to another format, in place, where it is.

    Afterwards the task can no longer be trained or saved; see `quantize` for int8.

    Args:
        task: The task, on its device.
        name: float32, bfloat16, float16, int8, or auto for the one that `choose_precision` names.

    Returns:
        The same task in evaluation mode.

    Raises:
        ValueError: There is no such format, the task is in another one than float32 already, it has
            no Transformer blocks, or int8 does not work here. Nothing was changed then.
    """
    check_precision(name)
    if name == "auto":
        name = choose_precision(task)
    if name == "float32":
        return task.eval()
    if name == "int8":
        return quantize(task)
    blocks = find_half_blocks(task)
    if not blocks:
        raise ValueError(
            f"{task_name(type(task))} has no Transformer blocks to compute in {name}: give float32"
        )
    layers = list(blocks[0].attention.modules())
    if any(isinstance(layer, HalfLinear | PackedLinear) for layer in layers):
        raise ValueError("weights are packed or in half precision already: load them in float32")
    task.eval().requires_grad_(False)
    for block in blocks:
        for branch in (block.attention, block.ffn):
            halve(branch, HALF_DTYPES[name])
            branch.register_forward_pre_hook(cast_parts)
    if isinstance(task, Captioning):
        task.text_head = HalfHead(task.text_head)
    return task


def check_precision(name: str) -> None:
    """Raises ValueError if there is no such format."""
    if name not in PRECISIONS:
        hint = suggest(name, PRECISIONS)
        raise ValueError(f"no precision {name!r}{hint}: there are {', '.join(PRECISIONS)}")


def find_half_blocks(task: Task) -> list[Block]:
    """Returns the blocks that can compute in half precision: those of the backbone or trunk."""
    return [block for block in find_blocks(task) if isinstance(block, Block)]


def cast_parts(branch: nn.Module, arguments: tuple[Parts, Any]) -> tuple[Any, ...]:
    """Rounds the parts [B, n, D] of a sequence to the format of the branch that takes them."""
    parts, *others = arguments
    dtype = next(branch.parameters()).dtype
    return (tuple(part.to(dtype) for part in parts), *others)
