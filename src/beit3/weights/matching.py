"""Matches the tensors of a file to the parameters of a task.

Tensors of the file are loaded or ignored, parameters of the task are loaded or fresh, each with
the reason. Dictionaries of tensors are under our parameter names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import FUSION, IMAGE, POSITION_OFFSET, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.ops.collectives import copy_to_shard, gather_full, rank
from beit3.ops.positions import resample_patches, resample_positions
from beit3.seeding import make_generator
from beit3.task import Task, task_name

IMAGE_POSITIONS = "backbone.image_embedding.positions"
PATCHES = "backbone.image_embedding.patch.weight"
FINAL_NORM = "backbone.norm."
NUM_EXTRA_ROWS = POSITION_OFFSET + 1
"""Rows of the image position table that belong to no patch."""

EXPERT_PATH = re.compile(
    r"backbone\.(?:(?P<modality>\w+)_embedding"
    r"|(?:blocks\.\d+\.(?:norm1|norm2|ffn|attention\.\w+)|norm)"
    r"\.(?!weight$|bias$)(?P<expert>\w+))\."
)
"""Names of the backbone's parameters that serve one modality, or fused sequences, alone."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file and of every parameter of a task."""

    source: str
    """Describes what was read."""
    loaded: tuple[str, ...]
    """Our names of the parameters that came from the file."""
    ignored: Mapping[str, str]
    """Names in the file that the task has no use for -> the reason."""
    fresh: Mapping[str, str]
    """Our names of the parameters that the file could not give -> the reason."""
    notes: tuple[str, ...] = ()
    """Other lines for the user."""

    def lines(self) -> list[str]:
        """Returns the report as text, one line per reason."""
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        for verb, reasons in (("ignored", self.ignored), ("fresh", self.fresh)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name in reasons if reasons[name] == reason]
                lines.append(f"{len(names)} {verb} ({reason}): {abbreviate(names)}")
        return [*lines, *self.notes]


# The weights of a task ---------------------------------------------------------------------------


def get_weights(task: Task) -> dict[str, Tensor]:
    """Returns the state dict of a task without its frozen children, which are not stored."""
    return {
        name: tensor
        for name, tensor in task.state_dict().items()
        if name.split(".")[0] not in task.frozen
    }


def gather_weights(task: Task) -> dict[str, Tensor]:
    """Returns `get_weights` unsharded on the CPU of rank 0, and an empty dictionary elsewhere.

    Every rank must call it where weights are sharded.
    """
    weights = {}
    for name, tensor in get_weights(task).items():
        unsharded = gather_full(tensor)
        if rank() == 0:
            weights[name] = unsharded.cpu()
    return weights


def assign_weights(task: Task, values: Mapping[str, Tensor]) -> None:
    """Copies unsharded tensors into a task by name; each rank keeps its shard."""
    weights = get_weights(task)
    for name, value in values.items():
        copy_to_shard(weights[name], value)


@torch.no_grad()
def load_and_initialize(task: Task, values: Mapping[str, Tensor], fresh: Iterable[str]) -> None:
    """Loads `values` by name into an unsharded task and initializes `fresh` with seed 0.

    Buffers among `fresh` stay as they were built.
    """
    parameters = dict(task.named_parameters())
    for name in fresh:
        if name in parameters:
            task.init_parameter(name, parameters[name], make_generator(0, name))
    task.load_state_dict(values, strict=False)


# Matching ----------------------------------------------------------------------------------------


def match_tensors(
    task: Task, tensors: Mapping[str, Tensor], *, exact: bool, label: Callable[[str], str] = str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Fits a file's tensors to a task, which is not changed.

    The image position table is resampled to the task's image size, and the patch embedding where
    the task's config asks for it. Of the backbone, a file may lack the final norm, all that is not
    for images if it holds the image side alone, and a modality that it does not know: that stays
    fresh, or copies the expert that the modality's `init_from` names.

    Args:
        task: The task.
        tensors: The file's tensors under our names.
        exact: Refuse a head of another shape. By default it stays fresh.
        label: Returns what the file calls one of our parameters, for error messages.

    Returns:
        The values to load by name, and the reason for each parameter that does not come from the
        file: it stays fresh, or is among the values as a copy.

    Raises:
        ValueError: Tensors are missing, or have another shape.
    """
    weights = get_weights(task)
    image_only = not any(find_expert(name) not in ("", IMAGE) for name in tensors)
    new_modalities = find_new_modalities(task, tensors)
    values: dict[str, Tensor] = {}
    fresh: dict[str, str] = {}
    missing = []
    for name, current in weights.items():
        if name not in tensors:
            reason = explain_absence(name, image_only=image_only, new_modalities=new_modalities)
            source = find_copied_expert(task, name, new_modalities)
            if source in tensors and tensors[source].shape == current.shape:
                values[name] = tensors[source].clone()
            elif reason:
                fresh[name] = reason
            else:
                missing.append(label(name))
            continue
        if current.is_floating_point() and not tensors[name].is_floating_point():
            raise ValueError(
                f"{label(name)} is of type {tensors[name].dtype}, as quantized weights are: "
                "give the weights before quantization"
            )
        value = fit_tensor(task, name, tensors[name], label(name))
        shape, needed = list(value.shape), list(current.shape)
        if shape == needed:
            values[name] = value
        elif exact or name.startswith("backbone."):
            remedy = ""
            if name == PATCHES and task.config.resize_patch is not None:
                remedy = "; --task.resize_patch True resamples it"
            raise ValueError(
                f"{label(name)} has shape {shape}, this {task_name(type(task))} needs {needed}"
                f"{remedy}"
            )
        else:
            fresh[name] = f"shape {shape} in the file, {needed} here"
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing: {abbreviate(missing)}")
    return values, fresh


def explain_unused(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns why tensors under our names are left out of a task that has none of that name.

    Raises ValueError for tensors of a backbone that the task's backbone does not have.
    """
    weights, kind = get_weights(task), task_name(type(task))
    reasons, unknown = {}, []
    for name in tensors:
        if name in weights:
            continue
        if name.startswith(FINAL_NORM):
            reasons[name] = f"the final norm: {kind} reads the states before it"
        elif isinstance(task.backbone, ImageTrunk) and serves_text(name):
            reasons[name] = f"{kind} takes images alone"
        elif not name.startswith("backbone."):
            reasons[name] = f"a head that {kind} does not have"
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"this {kind} does not have {len(unknown)} tensors: {abbreviate(unknown)}")
    return reasons


def find_expert(name: str) -> str:
    """Returns the modality, or `fusion`, that a parameter of the backbone serves alone, else ''."""
    match = EXPERT_PATH.match(name)
    return (match["modality"] or match["expert"]) if match else ""


def serves_text(name: str) -> bool:
    """Returns whether a parameter of the backbone serves more or other inputs than images."""
    return find_expert(name) not in ("", IMAGE)


def find_new_modalities(task: Task, tensors: Mapping[str, Tensor]) -> set[str]:
    """Returns the modalities of a task that a file with tensors of others holds nothing of."""
    model = task.config.model
    if not isinstance(model, ModelConfig):
        return set()
    stored = {find_expert(name) for name in tensors} - {"", FUSION}
    return set(model.modality_names) - stored if stored else set()


def find_copied_expert(task: Task, name: str, new_modalities: Set[str]) -> str:
    """Returns the name of the parameter that one of a new modality copies; '' where it has none."""
    expert = find_expert(name)
    if expert not in new_modalities or f".{expert}." not in name:
        return ""
    init_from = {m.name: m.init_from for m in task.config.model.modalities}[expert]
    return name.replace(f".{expert}.", f".{init_from}.") if init_from else ""


def describe_copies(
    task: Task, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Returns a line for `LoadReport.notes` for each expert among the values that is a copy."""
    copies = [name for name in values if name not in tensors]
    notes = []
    for modality in task.config.model.modalities if copies else ():
        names = [name for name in copies if find_expert(name) == modality.name]
        if names:
            notes.append(
                f"{len(names)} copied ({modality.name} from {modality.init_from}): "
                f"{abbreviate(names)}"
            )
    return tuple(notes)


def explain_absence(name: str, *, image_only: bool, new_modalities: Set[str] = frozenset()) -> str:
    """Returns why a file may lack a parameter, or an empty string where it may not.

    Args:
        name: Our name of the parameter.
        image_only: The file holds the image side alone.
        new_modalities: Modalities of the task that the file holds nothing of.
    """
    if not name.startswith("backbone."):
        return "a head that the file does not hold"
    if image_only and serves_text(name):
        return "the file holds the image side alone"
    if find_expert(name) in new_modalities:
        return f"the file has no {find_expert(name)}"
    return "the file's task has no final norm" if name.startswith(FINAL_NORM) else ""


def compare_preprocessing(stored: Preprocessing, current: Preprocessing) -> tuple[str, ...]:
    """Returns a line for `LoadReport.notes` where weights and task prepare images differently.

    Sizes are not compared, because position tables are resampled.
    """
    differences = [
        f"{name} is {getattr(stored, name)}, here {getattr(current, name)}"
        for name in ("mean", "std", "resize", "interpolation")
        if getattr(stored, name) != getattr(current, name)
    ]
    if not differences:
        return ()
    return (
        "images are prepared differently than for these weights' training: "
        + "; ".join(differences),
    )


def fit_tensor(task: Task, name: str, value: Tensor, label: str) -> Tensor:
    """Returns a file's tensor resampled to the task's grid of patches or patch size, if need be."""
    if name == IMAGE_POSITIONS:
        return fit_positions(value, task.config.model.grid, label)
    if name == PATCHES and value.ndim == 4 and task.config.resize_patch:
        return resample_patches(value, task.config.model.patch_size)
    return value


def fit_positions(table: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Resamples an image position table [3 + P, D] from its square grid to another grid.

    Raises ValueError with the table's `name` where the grid is not square.
    """
    num_patches = max(0, len(table) - NUM_EXTRA_ROWS)
    side = isqrt(num_patches)
    if side * side != len(table) - NUM_EXTRA_ROWS:
        raise ValueError(
            f"{name} has {len(table)} rows: {NUM_EXTRA_ROWS} and a square grid are expected"
        )
    return resample_positions(table, (side, side), grid, keep=NUM_EXTRA_ROWS)


def abbreviate(names: Iterable[str], count: int = 4) -> str:
    """Returns the first `count` names and how many more there are."""
    names = list(names)
    listed = ", ".join(names[:count])
    return f"{listed} and {len(names) - count} more" if len(names) > count else listed
