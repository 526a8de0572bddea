"""What a recipe takes on so many devices: memory of one of them, the micro-batch that fits, operations of a step.

The loop's own choices are followed (training/parallel.py, training/step.py): weights, their gradients and AdamW's two moments are
sharded, blocks are gathered one by one, the rest stays gathered during a step; gradients of all micro-batches but the last
add up whole on every process. Figures are bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from beit3.data.loader import step_places
from beit3.plan.devices import GIB, Device
from beit3.plan.dummy_inputs import built, example, named
from beit3.plan.trace import Trace, trace
from beit3.recipe import Recipe, TaskConfig
from beit3.task import Example, Task
from beit3.training.parallel import bfloat16, blocks_of, dtype

GATHERED_BLOCKS = 3
"""Blocks that are whole at once: the one at work, the next on its way, and the buffer that it arrives in."""
CONTEXT = 1 * GIB
"""Of CUDA and its libraries on each GPU."""
NCCL = 1 * GIB
"""Of its buffers, where there are several processes."""
WHOLE = 6
"""Networks up to this depth are traced whole, deeper ones at two smaller depths."""
FRAGMENTED = 0.05
"""Share of the tensors that the allocator's gaps add; a GPU's, for none was at hand to measure it."""


PREFETCH = 4
"""Batches that each loader process holds ready (data/loader.py)."""
NUMBERS = ("kept", "peak", "batch", "flops")
"""Fields of a trace that grow by the same with every record and every block."""


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
class Sizes:
    """Parameters of a task, in numbers: all that train, its largest block, those beside blocks; `*used`: those with a gradient."""

    trained: int
    used: int
    block: int
    block_used: int
    rest: int
    rest_used: int
    frozen: int


class Estimate:
    """One recipe of one task on `processes` devices, with or without recomputed activations."""

    def __init__(self, kind: type[Task], recipe: Recipe, device: Device, processes: int):
        """ValueError for batches that do not divide over the processes."""
        self.kind, self.device, self.processes = kind, device, processes
        self.recipe = replace(recipe, task=named(recipe.task, processes))
        self.sources = [name for name in kind.sources if recipe.data.batch.get(name)]
        if not self.sources:
            raise ValueError(
                f"data.batch names none of the sources {', '.join(kind.sources)}: give each a number of records"
            )
        self.pieces(1)
        self.traces: dict[tuple[str, int, int], Trace] = {}
        self.examples: dict[str, Example] = {}

    # What a step is --------------------------------------------------------------------------------------------------

    def pieces(self, micro_batch: int) -> dict[str, list[int]]:
        """The micro-batches of a process, by source; `micro_batch` 0 = its whole share."""
        batch = self.recipe.data.batch
        places = step_places(
            0, batch, self.sources, micro_batch=micro_batch, rank=0, world=self.processes
        )
        found: dict[str, list[int]] = {name: [] for name in self.sources}
        for piece in places:
            found[piece[0][0]].append(len(piece))
        return found

    @property
    def share(self) -> int:
        """Records of the largest source on one process."""
        return max(self.recipe.data.batch[name] for name in self.sources) // self.processes

    def micro_batches(self) -> list[int]:
        """Divisors of the share, largest first; the whole share alone where a forward pass moves buffers."""
        if self.kind.updates_buffers:
            return [self.share]
        return [size for size in range(self.share, 0, -1) if self.share % size == 0]

    # What it takes ---------------------------------------------------------------------------------------------------

    @property
    def on_processor(self) -> bool:
        return self.device.name == "cpu"

    @property
    def half(self) -> bool:
        """Whether matrix products are in bfloat16."""
        return bfloat16(self.recipe.run, torch.device("cpu" if self.on_processor else "cuda"))

    @cached_property
    def task(self) -> Task:
        """All of it, on meta."""
        return built(self.kind, self.recipe.task, self.recipe.run)

    @cached_property
    def sizes(self) -> Sizes:
        task = self.task
        parameters = {name: parameter.numel() for name, parameter in task.trainable()}
        learning = {
            id(parameter)
            for name, parameter in task.trainable()
            if not name.startswith(tuple(task.unused_parameters))
        }
        blocks = [
            sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(task)
        ]
        blocks_used = [
            sum(p.numel() for p in block.parameters() if id(p) in learning)
            for block in blocks_of(task)
        ]
        trained, used = (
            sum(parameters.values()),
            sum(p.numel() for _, p in task.trainable() if id(p) in learning),
        )
        return Sizes(
            trained=trained,
            used=used,
            block=max(blocks, default=0),
            block_used=max(blocks_used, default=0),
            rest=trained - sum(blocks),
            rest_used=used - sum(blocks_used),
            frozen=sum(parameter.numel() for parameter in task.parameters()) - trained,
        )

    def example(self, source: str) -> Example:
        """A stand-in of this source, made once: drawing a picture full of objects takes a second."""
        if source not in self.examples:
            self.examples[source] = example(self.task, source)
        return self.examples[source]

    def measure(self, source: str, count: int) -> Trace:
        """A micro-batch of `count` records. One of the recipe's size is traced, others follow from it and one of half the size."""
        share = self.recipe.data.batch[source] // self.processes
        usual = min(self.recipe.run.micro_batch or share, share)
        other = max(1, usual // 2) if usual > 1 else 2
        if count in (usual, other):
            return self.deep(source, count)
        return line(count, (usual, self.deep(source, usual)), (other, self.deep(source, other)))

    def deep(self, source: str, count: int) -> Trace:
        """Blocks of one kind take the same, so a deep network is traced at two small depths."""
        model, low = self.recipe.task.model, shallow(self.recipe.task)
        if getattr(model, "depth", 0) <= WHOLE:
            return self.traced(source, count, 0)
        return line(
            model.depth,
            (low, self.traced(source, count, low)),
            (low + 1, self.traced(source, count, low + 1)),
        )

    def traced(self, source: str, count: int, depth: int) -> Trace:
        """The trace itself, made once; depth 0 = the network's own."""
        key = source, count, depth
        if key not in self.traces:
            config = self.recipe.task
            config = replace(config, model=replace(config.model, depth=depth)) if depth else config
            task = built(self.kind, config, self.recipe.run)
            blocks = (
                blocks_of(task)
                if self.processes > 1 and self.half and not self.on_processor
                else []
            )
            self.traces[key] = trace(
                task,
                self.example(source),
                count,
                torch.autocast("cpu", torch.bfloat16, enabled=self.half),
                accelerator=not self.on_processor,
                cached=self.kind.compares_examples
                and count < self.recipe.data.batch[source] // self.processes,
                half={id(parameter) for block in blocks for parameter in block.parameters()},
            )
        return self.traces[key]

    def memory(self, micro_batch: int) -> Memory:
        """At the peak of a step with this micro-batch."""
        sizes, whole, count = self.sizes, dtype(self.recipe.run).itemsize, self.processes
        pieces = self.pieces(micro_batch)
        traces = {name: self.measure(name, max(found)) for name, found in pieces.items()}
        kept = max(each.kept for each in traces.values())
        several = sum(map(len, pieces.values())) > 1
        if several:
            gradients: float = sizes.used * whole
        elif count == 1:
            gradients = max(each.peak for each in traces.values()) - kept
        else:
            gradients = (sizes.used / count + sizes.rest_used) * whole
        half = 2 if self.half and not self.on_processor else whole
        blocks = sizes.block * GATHERED_BLOCKS * half + sizes.block_used * (half + whole)
        gathered = sizes.rest * whole + blocks if count > 1 else 0
        tensors = Memory(
            weights=sizes.trained * whole / count,
            gradients=gradients,
            optimizer=2 * sizes.used * whole / count,
            frozen=sizes.frozen * whole,
            gathered=gathered,
            activations=kept,
            batches=sum(
                traces[name].batch * (len(found) if self.on_processor else 1)
                for name, found in pieces.items()
            ),
            reserve=0,
        )
        return replace(tensors, reserve=self.reserve(tensors.total))

    def reserve(self, tensors: float) -> float:
        """What a GPU needs beside its tensors."""
        if self.on_processor:
            return 0
        return CONTEXT + (NCCL if self.processes > 1 else 0) + FRAGMENTED * tensors

    def largest(self) -> int:
        """The largest micro-batch that fits, by halves; 0 where not even one record does."""
        limit = self.device.memory * GIB
        return next((size for size in self.micro_batches() if self.memory(size).total <= limit), 0)

    def flops(self, micro_batch: int) -> float:
        """Operations of a step on one process, as they are run: with what is computed twice."""
        return sum(
            self.measure(name, size).flops
            for name, sizes in self.pieces(micro_batch).items()
            for size in sizes
        )

    def waiting(self, micro_batch: int) -> float:
        """Bytes of batches in a process's loader, in the memory of the machine."""
        largest = max(
            self.measure(name, max(sizes)).batch for name, sizes in self.pieces(micro_batch).items()
        )
        return largest * (1 + PREFETCH * self.recipe.data.workers)

    def reads(self) -> dict[str, dict[str, int]]:
        """Images and places for text in one record of each source."""
        found = {}
        for name in self.sources:
            made = self.example(name)
            images = (
                made["image"].shape[:-3].numel() if "image" in made else int("token_image" in made)
            )
            found[name] = {
                "images": images,
                "tokens": made["text"].numel() if "text" in made else 0,
            }
        return found


def shallow(config: TaskConfig) -> int:
    """A depth at which a network has all its layers that there are a fixed number of; one more is of the usual kind.

    Blocks that see the whole picture amid windows, groups that an adapter talks with; else layers of fusion, which no trunk has.
    """
    groups = (
        getattr(config, "num_global", 0),
        getattr(getattr(config, "adapter", None), "num_interactions", 0),
    )
    return max(2, *groups) if any(groups) else 2 + getattr(config.model, "fusion_layers", 0)


def line(at: float, one: tuple[float, Trace], other: tuple[float, Trace]) -> Trace:
    """What lies on the straight line through two traces at places of their own."""
    share = (at - one[0]) / (other[0] - one[0])
    fields = {
        name: getattr(one[1], name) + share * (getattr(other[1], name) - getattr(one[1], name))
        for name in NUMBERS
    }
    return replace(one[1], **fields)
