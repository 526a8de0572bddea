"""Estimates what a recipe takes on a number of devices: memory per device, the micro-batch that
fits, FLOPs per step.

The estimate follows the training loop (training/parallel.py, training/step.py): weights, their
gradients and the optimizer's moments are sharded, blocks are gathered one by one, the rest stays
gathered during a step. The gradients of all micro-batches but the last accumulate unsharded on
every process. All sizes are in bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from beit3.data.loader import sample_micro_batches
from beit3.model.config import ModelConfig
from beit3.plan.devices import GIB, Device
from beit3.plan.dummy_inputs import build_meta_task, fill_class_names, make_example
from beit3.plan.trace import Trace, trace_step
from beit3.recipe import Recipe
from beit3.task import Example, Task
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.training.optim import count_moments, make_parameter_groups
from beit3.training.parallel import find_blocks, get_parameter_dtype, uses_bfloat16

GATHERED_BLOCKS = 3
"""Blocks that are unsharded at once: the one at work, the next on its way, and the buffer that it
arrives in."""
CUDA_CONTEXT = 1 * GIB
"""Of CUDA and its libraries on each GPU."""
NCCL_BUFFERS = 1 * GIB
"""Where there are several processes."""
MAX_TRACED_DEPTH = 6
"""Networks up to this depth are traced as they are, deeper ones at two smaller depths."""
FRAGMENTATION = 0.05
"""Fraction of the tensors that the gaps of a GPU's allocator add; assumed, for no GPU was at hand
to measure it."""
PREFETCHED_BATCHES = 4
"""Batches that each loader process holds ready (data/loader.py)."""
LINEAR_FIELDS = ("activations", "peak", "batch", "flops")
"""Fields of a trace that grow linearly with the number of examples and of blocks."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    frozen: float
    gathered: float
    activations: float
    batches: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a task's parameters: `*used` counts those that get a gradient."""

    trained: int
    used: int
    block: int
    """Of the largest block."""
    block_used: int
    rest: int
    """Trained parameters outside of blocks."""
    rest_used: int
    frozen: int
    moments: int
    """Numbers that the optimizer keeps for the used parameters."""


class Estimate:
    """One recipe of one task on `processes` devices, with its own setting of
    `run.checkpointing`."""

    def __init__(self, task_class: type[Task], recipe: Recipe, device: Device, processes: int):
        """Raises ValueError for batches that do not divide over the processes."""
        self.task_class, self.device, self.processes = task_class, device, processes
        self.recipe = replace(recipe, task=fill_class_names(recipe.task, processes))
        self.sources = [name for name in task_class.sources if recipe.data.batch.get(name)]
        if not self.sources:
            raise ValueError(
                f"data.batch names none of the sources {', '.join(task_class.sources)}: "
                "give each a number of records"
            )
        self.split_batch(1)
        self.traces: dict[tuple[str, int, int], Trace] = {}
        self.examples: dict[str, Example] = {}

    # Micro-batches -----------------------------------------------------------------------------

    def split_batch(self, micro_batch: int) -> dict[str, list[int]]:
        """Returns the sizes of a process's micro-batches of one step by source; 0 = all its records
        at once."""
        micro_batches = sample_micro_batches(
            0,
            self.recipe.data.batch,
            self.sources,
            micro_batch=micro_batch,
            rank=0,
            world=self.processes,
        )
        sizes: dict[str, list[int]] = {name: [] for name in self.sources}
        for positions in micro_batches:
            source = positions[0][0]
            sizes[source].append(len(positions))
        return sizes

    @property
    def max_micro_batch(self) -> int:
        """Records of the largest source in a process's part of a step."""
        return max(self.recipe.data.batch[name] for name in self.sources) // self.processes

    @property
    def recipe_micro_batch(self) -> int:
        """The recipe's micro-batch of the largest source."""
        return min(self.recipe.run.micro_batch or self.max_micro_batch, self.max_micro_batch)

    def list_micro_batches(self) -> list[int]:
        """Returns the divisors of `max_micro_batch`, largest first; only itself where a forward
        pass updates buffers."""
        largest = self.max_micro_batch
        if self.task_class.updates_buffers:
            return [largest]
        return [size for size in range(largest, 0, -1) if largest % size == 0]

    def find_largest_micro_batch(self) -> int:
        """Returns the largest micro-batch that fits into the device's memory; 0 where not even one
        record does."""
        limit = self.device.memory * GIB
        for size in self.list_micro_batches():
            if self.estimate_memory(size).total <= limit:
                return size
        return 0

    # The network -------------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return self.device.name == "cpu"

    @property
    def in_bfloat16(self) -> bool:
        """Whether matrix products are in bfloat16."""
        device = torch.device("cpu" if self.on_cpu else "cuda")
        return uses_bfloat16(self.recipe.run, device)

    @cached_property
    def task(self) -> Task:
        """The task on the meta device."""
        return build_meta_task(self.task_class, self.recipe.task, self.recipe.run)

    @cached_property
    def sizes(self) -> ParameterCounts:
        trained = dict(self.task.trainable_parameters())
        unused_prefixes = tuple(self.task.unused_parameters)
        used_ids = {
            id(parameter)
            for name, parameter in trained.items()
            if not name.startswith(unused_prefixes)
        }
        num_moments = sum(
            count_moments(group) * parameter.numel()
            for group in make_parameter_groups(self.task, self.recipe.optim)
            for parameter in group["params"]
            if id(parameter) in used_ids
        )
        num_trained = sum(parameter.numel() for parameter in trained.values())
        num_used = sum(p.numel() for p in trained.values() if id(p) in used_ids)
        in_blocks, used_in_blocks = [], []
        for block in find_blocks(self.task):
            parameters = list(block.parameters())
            in_blocks.append(sum(p.numel() for p in parameters))
            used_in_blocks.append(sum(p.numel() for p in parameters if id(p) in used_ids))
        return ParameterCounts(
            trained=num_trained,
            used=num_used,
            block=max(in_blocks, default=0),
            block_used=max(used_in_blocks, default=0),
            rest=num_trained - sum(in_blocks),
            rest_used=num_used - sum(used_in_blocks),
            frozen=sum(parameter.numel() for parameter in self.task.parameters()) - num_trained,
            moments=num_moments,
        )

    # Traces ------------------------------------------------------------------------------------

    def make_example(self, source: str) -> Example:
        """Returns a dummy example of this source, made once: one full of objects takes a second."""
        if source not in self.examples:
            self.examples[source] = make_example(self.task, source)
        return self.examples[source]

    def trace_micro_batch(self, source: str, count: int) -> Trace:
        """Returns the trace of `count` records.

        The recipe's micro-batch and one of half its size are traced, other sizes follow from these.
        """
        per_process = self.recipe.data.batch[source] // self.processes
        usual = min(self.recipe.run.micro_batch or per_process, per_process)
        second = max(1, usual // 2) if usual > 1 else 2
        if count in (usual, second):
            return self.trace_network(source, count)
        return interpolate(
            count,
            (usual, self.trace_network(source, usual)),
            (second, self.trace_network(source, second)),
        )

    def trace_network(self, source: str, count: int) -> Trace:
        """Returns the trace of the network at its full depth.

        Blocks of one kind take the same, so a deep network follows from traces at two small depths.
        """
        config = self.recipe.task
        has_depth = isinstance(config.model, ModelConfig | VisualTokenizerConfig)
        if not has_depth or config.model.depth <= MAX_TRACED_DEPTH:
            return self.trace_at_depth(source, count, 0)
        low, high = config.base_depth, config.base_depth + 1
        return interpolate(
            config.model.depth,
            (low, self.trace_at_depth(source, count, low)),
            (high, self.trace_at_depth(source, count, high)),
        )

    def trace_at_depth(self, source: str, count: int, depth: int) -> Trace:
        """Returns the trace of a network with `depth` blocks, made once; depth 0 = the network's
        own."""
        key = source, count, depth
        if key not in self.traces:
            self.traces[key] = self._trace(source, count, depth)
        return self.traces[key]

    def _trace(self, source: str, count: int, depth: int) -> Trace:
        config = self.recipe.task
        if depth:
            config = replace(config, model=replace(config.model, depth=depth))
        task = build_meta_task(self.task_class, config, self.recipe.run)
        in_bfloat16: set[int] = set()
        if self.processes > 1 and self.in_bfloat16 and not self.on_cpu:
            for block in find_blocks(task):
                in_bfloat16.update(map(id, block.parameters()))
        per_process = self.recipe.data.batch[source] // self.processes
        return trace_step(
            task,
            self.make_example(source),
            count,
            torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16),
            accelerator=not self.on_cpu,
            caches_features=self.task_class.compares_examples and count < per_process,
            bfloat16_parameters=in_bfloat16,
        )

    # Estimates ---------------------------------------------------------------------------------

    def estimate_memory(self, micro_batch: int) -> Memory:
        """Estimates the memory of a device at the peak of a step with this micro-batch."""
        counts, itemsize = self.sizes, get_parameter_dtype(self.recipe.run).itemsize
        sizes = self.split_batch(micro_batch)
        traces = {name: self.trace_micro_batch(name, max(sizes[name])) for name in self.sources}
        activations = max(trace.activations for trace in traces.values())
        batches = sum(
            trace.batch * (len(sizes[name]) if self.on_cpu else 1) for name, trace in traces.items()
        )
        if sum(map(len, sizes.values())) > 1:  # gradients of earlier micro-batches are complete
            gradients: float = counts.used * itemsize
        elif self.processes == 1:
            gradients = max(trace.peak for trace in traces.values()) - activations
        else:
            gradients = (counts.used / self.processes + counts.rest_used) * itemsize
        memory = Memory(
            weights=counts.trained * itemsize / self.processes,
            gradients=gradients,
            optimizer=counts.moments * itemsize / self.processes,
            frozen=counts.frozen * itemsize,
            gathered=self._estimate_gathered(itemsize),
            activations=activations,
            batches=batches,
            reserve=0,
        )
        return replace(memory, reserve=self._estimate_reserve(memory.total))

    def _estimate_gathered(self, itemsize: int) -> int:
        """Estimates the parameters that are unsharded at once, and the gradients of one block."""
        if self.processes == 1:
            return 0
        counts = self.sizes
        block_itemsize = 2 if self.in_bfloat16 and not self.on_cpu else itemsize
        blocks = counts.block * GATHERED_BLOCKS * block_itemsize
        block_gradients = counts.block_used * (block_itemsize + itemsize)
        return counts.rest * itemsize + blocks + block_gradients

    def _estimate_reserve(self, tensors: float) -> float:
        """Estimates what a GPU needs beside its tensors."""
        if self.on_cpu:
            return 0
        return CUDA_CONTEXT + (NCCL_BUFFERS if self.processes > 1 else 0) + FRAGMENTATION * tensors

    def count_flops(self, micro_batch: int) -> float:
        """Returns the FLOPs of a step on one process as they are run, recomputation included."""
        return sum(
            self.trace_micro_batch(name, size).flops
            for name, sizes in self.split_batch(micro_batch).items()
            for size in sizes
        )

    def estimate_loader_memory(self, micro_batch: int) -> float:
        """Estimates the host memory of the batches in a process's loader."""
        largest = max(
            self.trace_micro_batch(name, max(sizes)).batch
            for name, sizes in self.split_batch(micro_batch).items()
        )
        return largest * (1 + PREFETCHED_BATCHES * self.recipe.data.workers)

    def count_inputs(self) -> dict[str, dict[str, int]]:
        """Returns the number of images and of text positions in one record of each source."""
        counts = {}
        for name in self.sources:
            example = self.make_example(name)
            if "image" in example:
                images = example["image"].shape[:-3].numel()
            else:
                images = int("token_image" in example)
            tokens = example["text"].numel() if "text" in example else 0
            counts[name] = {"images": images, "tokens": tokens}
        return counts


def interpolate(x: float, start: tuple[float, Trace], end: tuple[float, Trace]) -> Trace:
    """Returns the trace at `x` on the straight line through two (x, trace)."""
    (x_start, trace_start), (x_end, trace_end) = start, end
    fraction = (x - x_start) / (x_end - x_start)
    values = {}
    for name in LINEAR_FIELDS:
        low, high = getattr(trace_start, name), getattr(trace_end, name)
        values[name] = low + fraction * (high - low)
    return replace(trace_start, **values)
