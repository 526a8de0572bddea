"""Inputs of a graph by the sizes of its axes: one example to trace, others to check it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from beit3.export.modes import ATTENDED, BATCH, CACHED, COLUMNS, LENGTH, ROWS, Axis, Input, Mode
from beit3.model.config import ModelConfig
from beit3.seeding import make_generator
from beit3.task import Task

FIRST_ID = 4
"""Smaller ids are special tokens."""

Sizes = Mapping[str, int]
"""Name of an axis -> its size."""


def choose_sizes(task: Task) -> tuple[Sizes, list[Sizes]]:
    """Returns the sizes to trace with, and those of the checks.

    The checks have two batch sizes, one of them 1, two lengths of text, and two sizes of images:
    the one of the config and a rectangle.
    """
    model = task.config.model
    side = task.config.image.image_size // model.patch_size
    limit = model.max_text_length if isinstance(model, ModelConfig) else 64
    traced = {BATCH: 2, LENGTH: min(5, limit), ROWS: side // 2 + 2, COLUMNS: side // 2 + 3}
    traced[CACHED] = 7
    own = {BATCH: 1, LENGTH: 2, ROWS: side, COLUMNS: side, CACHED: 3}
    other = {BATCH: 3, LENGTH: min(11, limit), ROWS: side // 2 + 1, COLUMNS: side + 1, CACHED: 13}
    return _add_attended(traced), [_add_attended(own), _add_attended(other)]


def _add_attended(sizes: Sizes) -> Sizes:
    """Adds the number of tokens that a step attends to."""
    return {**sizes, ATTENDED: sizes[CACHED] + sizes[LENGTH]}


def make_examples(task: Task, mode: Mode, sizes: Sizes) -> dict[str, Tensor]:
    """Makes random inputs of a mode; equal sizes give equal inputs."""
    generator = make_generator(0, f"{mode.name} {sorted(sizes.items())}")
    return {
        name: _make_example(task, name, input, sizes, generator)
        for name, input in mode.inputs.items()
    }


def _make_example(
    task: Task, name: str, input: Input, sizes: Sizes, generator: torch.Generator
) -> Tensor:
    """Makes one input."""
    shape = [
        sizes[axis.name] * axis.factor if isinstance(axis, Axis) else axis for axis in input.axes
    ]
    if name == "text":
        return torch.randint(FIRST_ID, task.config.model.vocab_size, shape, generator=generator)
    if name == "position_ids":
        return torch.arange(shape[0])
    if name == "text_padding":  # the first text is whole, the others shorter and shorter
        num_tokens = shape[1] - torch.arange(shape[0]) % max(1, shape[1] - 1)
        return torch.arange(shape[1]) >= num_tokens[:, None]
    if name == "attention_mask":  # the cached tokens, and those before and at the token itself
        num_cached = sizes[CACHED]
        return torch.ones(shape, dtype=torch.bool).tril(num_cached)
    return torch.randn(shape, generator=generator)
