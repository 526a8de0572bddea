"""Tensors from a file into a task: what fits, what is left over, what starts fresh, and a report of all three.

Shapes: dict[str, Tensor] under our parameter names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from beit3.data.views.transforms import Preprocessing
from beit3.model.config import POSITION_OFFSET
from beit3.ops.collectives import keep_shard, rank, whole
from beit3.ops.positions import resample_patches, resample_positions
from beit3.seeding import make_generator
from beit3.task import Task, task_name

IMAGE_POSITIONS = "backbone.image_embedding.positions"
PATCHES = "backbone.image_embedding.patch.weight"
FINAL_NORM = "backbone.norm."
KEEP = POSITION_OFFSET + 1
"""Rows of the image table that belong to no patch."""


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file and of every parameter of a task."""

    source: str
    """What was read, in words."""
    loaded: tuple[str, ...]
    """Our names of the parameters that came from the file."""
    ignored: Mapping[str, str]
    """Names in the file that the task has no use for -> why."""
    fresh: Mapping[str, str]
    """Our names of the parameters that the file could not give -> why."""
    notes: tuple[str, ...] = ()
    """What else the reader should know, each a line."""

    def lines(self) -> list[str]:
        """The report for a person: one line per reason."""
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        for verb, entries in (("ignored", self.ignored), ("fresh", self.fresh)):
            for reason in dict.fromkeys(entries.values()):
                names = [name for name, why in entries.items() if why == reason]
                lines.append(f"{len(names)} {verb} ({reason}): {first_few(names)}")
        return [*lines, *self.notes]


def stored(task: Task) -> dict[str, Tensor]:
    """The tensors that belong to the weights of a task: all but those of its frozen children."""
    return {
        name: tensor
        for name, tensor in task.state_dict().items()
        if name.split(".")[0] not in task.frozen
    }


def gathered(task: Task) -> dict[str, Tensor]:
    """`stored`, whole and on the CPU of rank 0, empty elsewhere; every rank must ask where weights are sharded."""
    values = {}
    for name, tensor in stored(task).items():
        complete = whole(tensor)
        if rank() == 0:
            values[name] = complete.cpu()
    return values


def assign(task: Task, values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the task's by name; a rank keeps its shard."""
    here = stored(task)
    for name, value in values.items():
        keep_shard(here[name], value)


@torch.no_grad()
def complete(task: Task, values: Mapping[str, Tensor], fresh: Iterable[str]) -> None:
    """Load `values` by name into a task on one process; what is `fresh` gets the initial values of seed 0."""
    parameters = dict(task.named_parameters())
    for name in fresh:
        if name in parameters:  # statistics are as they were built, of no image yet
            task.init_parameter(name, parameters[name], make_generator(0, name))
    task.load_state_dict(values, strict=False)


def match(
    task: Task, tensors: Mapping[str, Tensor], *, exact: bool, label: Callable[[str], str] = str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(values by name for `load_state_dict`, reasons by name of what stays fresh); the task is not changed.

    The image position table is resampled to the task's image size, and the patches where the task's config asks for it.
    Of the backbone all that is not for images (in files that hold the image side alone) and the final norm may be absent.
    With `exact` a head of another shape is an error, else it stays fresh. `label` says how the file calls a parameter.
    Raises ValueError naming tensors and shapes.
    """
    wanted = stored(task)
    images_alone = not any(beyond_images(name) and name in tensors for name in wanted)
    values: dict[str, Tensor] = {}
    fresh: dict[str, str] = {}
    missing = []
    for name, here in wanted.items():
        if name not in tensors:
            reason = may_lack(name, images_alone=images_alone)
            if reason:
                fresh[name] = reason
            else:
                missing.append(label(name))
            continue
        value = fitted(task, name, tensors[name], label(name))
        if value.shape == here.shape:
            values[name] = value
        elif exact or name.startswith("backbone."):
            kind = task_name(type(task))
            remedy = (
                "; --task.resize_patch True resamples it"
                if name == PATCHES and hasattr(task.config, "resize_patch")
                else ""
            )
            raise ValueError(
                f"{label(name)} has shape {list(value.shape)}, this {kind} needs {list(here.shape)}{remedy}"
            )
        else:
            fresh[name] = f"shape {list(value.shape)} in the file, {list(here.shape)} here"
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing: {first_few(missing)}")
    return values, fresh


def prepared_differently(there: Preprocessing, here: Preprocessing) -> tuple[str, ...]:
    """A line for `Report.notes` where weights know their pictures in another way than a task gives them; sizes are resampled."""
    names = [
        name
        for name in ("mean", "std", "resize", "interpolation")
        if getattr(there, name) != getattr(here, name)
    ]
    listed = "; ".join(
        f"{name} is {getattr(there, name)}, here {getattr(here, name)}" for name in names
    )
    return (
        (f"pictures are prepared in another way than these weights know: {listed}",)
        if names
        else ()
    )


def beyond_images(name: str) -> bool:
    """Whether a parameter of the backbone serves texts or pairs."""
    return name.startswith("backbone.") and any(
        part in name for part in (".text_embedding.", ".text.", ".fusion.")
    )


def may_lack(name: str, *, images_alone: bool) -> str:
    """Why a file may lack this parameter, one of the image side with `images_alone`; empty where it may not."""
    if not name.startswith("backbone."):
        return "a head that the file does not hold"
    if images_alone and beyond_images(name):
        return "the file holds the image side alone"
    return "the file's task has no final norm" if name.startswith(FINAL_NORM) else ""


def first_few(names: Iterable[str], count: int = 4) -> str:
    """The first names and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )


def fitted(task: Task, name: str, value: Tensor, label: str) -> Tensor:
    """A file's tensor as the task's network needs it: positions on its grid, patches of its size where `resize_patch` says so."""
    if name == IMAGE_POSITIONS:
        return fit_positions(value, task.config.model.grid, label)
    if name == PATCHES and value.ndim == 4 and getattr(task.config, "resize_patch", False):
        return resample_patches(value, task.config.model.patch_size)
    return value


def fit_positions(table: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """An image position table [3 + P, D] of a square grid for another grid; ValueError, with its `name`, for other tables."""
    side = isqrt(max(0, len(table) - KEEP))
    if side * side != len(table) - KEEP:
        raise ValueError(f"{name} has {len(table)} rows: {KEEP} and a square grid are expected")
    return resample_positions(table, (side, side), grid, keep=KEEP)
