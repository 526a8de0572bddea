"""Builds tasks from weights: from our directories and from released files, as their own task or
another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.files import compute_sha256
from beit3.model.beit3 import BEiT3
from beit3.recipe import TaskConfig
from beit3.task import FrozenFile, Task, load_task, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.adapt import adapt_config, add_names
from beit3.weights.matching import (
    LoadReport,
    abbreviate,
    describe_copies,
    explain_absence,
    explain_unused,
    get_weights,
    load_and_initialize,
    match_tensors,
)
from beit3.weights.names import find_path
from beit3.weights.release_format import (
    HEAD_SIZES,
    check_released_tokenizer,
    has_text_embedding,
    identify_checkpoint,
    infer_task_config,
    translate,
)
from beit3.weights.state_dicts import read_state_dict
from beit3.weights.store import (
    MODEL_FILE,
    TOKENIZER_FILE,
    StoredConfig,
    find_weights,
    read_config,
    read_tensors,
)

# Our directories ---------------------------------------------------------------------------------


def load_weights(
    directory: str | Path, *, text_model: str | Path | None = None, config: TaskConfig | None = None
) -> Task:
    """Returns the task that `save_weights` wrote, on the CPU.

    Args:
        directory: The weights directory.
        text_model: SentencePiece file, where the directory came without one.
        config: Used in place of the stored config.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape, or the text tokenizer or a
            frozen part is not the one that the weights were trained with.
    """
    directory = Path(directory)
    stored = read_config(directory)
    tokenizer = _load_tokenizer(directory, stored, text_model)
    config = _find_frozen_files(config or stored.config, stored.frozen)
    try:
        task = load_task(stored.task)(config, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    for name, file in task.frozen_files.items():
        if name in stored.frozen and stored.frozen[name].sha256 != file.sha256:
            raise ValueError(
                f"{name} {file.path} is not the file that these weights were trained with: "
                "put that back"
            )
    tensors = read_tensors(directory)
    _check_tensors(task, tensors, directory)
    task.load_state_dict(tensors, strict=False)
    return task


def load_weights_as(
    directory: str | Path,
    task: str,
    *,
    text_model: str | Path | None = None,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
) -> tuple[Task, LoadReport]:
    """Builds another task around the weights of a directory, on the CPU.

    Network, preprocessing, text length and tokenizer are those of the weights. Heads are matched
    by name, so those of retrieval serve imagenet, which then classifies into any `classes`.
    Parameters that the weights do not hold are initialized with seed 0 and reported.

    Args:
        directory: The weights directory.
        task: Name of the task to build.
        text_model: SentencePiece file, where the directory came without one.
        answers: Names of a VQA head's outputs.
        classes: Class names of imagenet.
        prompt: A sentence with `{}` where a class name goes.

    Raises:
        ValueError: The networks are of different kinds, or tensors or names do not fit.
    """
    stored, task_class = read_config(directory), load_task(task)
    # Any: the config classes of tasks share no type that declares all their fields.
    stored_config: Any = stored.config
    if type(stored_config.model) is not type(task_class.Config().model):
        raise ValueError(
            f"{directory} holds weights of {stored.task}, whose network cannot become {task}: "
            "give other weights"
        )
    tensors = read_tensors(directory)
    by_names = "image_projection.weight" in tensors
    config = adapt_config(task_class, stored_config.model, stored_config.image, by_names=by_names)
    config = replace(config, text_length=stored_config.text_length)
    config = add_names(
        config, task_class, answers=answers, classes=classes, prompt=prompt, fixed={}
    )
    built = task_class(config, tokenizer=_load_tokenizer(Path(directory), stored, text_model))
    try:
        ignored = explain_unused(built, tensors)
        values, fresh = match_tensors(built, tensors, exact=True)
    except ValueError as error:
        raise ValueError(
            f"{directory} holds weights of {stored.task}, which cannot become {task}: {error}"
        ) from None
    load_and_initialize(built, values, fresh)
    source = f"{directory} ({stored.task})"
    notes = describe_copies(built, values, tensors)
    return built, LoadReport(source, tuple(values), ignored, fresh, notes)


def _check_tensors(task: Task, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Raises ValueError unless the tensors are exactly those of the task, in names and shapes."""
    weights, path = get_weights(task), directory / MODEL_FILE
    unknown = [name for name in tensors if name not in weights]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors are unknown: {abbreviate(unknown)}")
    missing = [name for name in weights if name not in tensors]
    if missing:
        remedy = ""
        # `beit3 convert` leaves out what its file did not hold; fine-tuning fills it in.
        if all(explain_absence(name, image_only=True) for name in missing):
            kind = task_name(type(task))
            remedy = f"; train them with beit3 train {kind} --init {directory}"
        raise ValueError(
            f"{path}: {len(missing)} tensors are missing: {abbreviate(missing)}{remedy}"
        )
    for name, tensor in tensors.items():
        shape, needed = list(tensor.shape), list(weights[name].shape)
        if shape != needed:
            raise ValueError(f"{path}: {name} has shape {shape}, the config needs {needed}")


def _find_frozen_files(config: TaskConfig, frozen: Mapping[str, FrozenFile]) -> TaskConfig:
    """Returns `config` with the absolute path of frozen parts whose relative path leads nowhere."""
    changes: dict[str, Any] = {
        name: file.path
        for name, file in frozen.items()
        if not Path(getattr(config, name)).exists() and Path(file.path).exists()
    }
    return replace(config, **changes) if changes else config


def _load_tokenizer(
    directory: Path, stored: StoredConfig, text_model: str | Path | None
) -> TextTokenizer | None:
    """Returns the text tokenizer of weights, or None where there is no file.

    Raises ValueError for one that the weights were not trained with.
    """
    file = directory / TOKENIZER_FILE if text_model is None else Path(text_model)
    if text_model is None and not file.is_file():
        return None
    tokenizer = TextTokenizer(file)
    if stored.tokenizer not in (None, tokenizer.digest):
        raise ValueError(
            f"{file} is a tokenizer that does not fit the weights: "
            "give the one they were trained with"
        )
    if stored.tokenizer is None:  # a released file that was converted without a tokenizer
        try:
            check_released_tokenizer(tokenizer, stored.config)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    return tokenizer


# Released files ----------------------------------------------------------------------------------


def load_released(
    state: Mapping[str, Tensor],
    task: str | type[Task] | None = None,
    *,
    num_heads: int | None = None,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
    tokenizer: TextTokenizer | None = None,
    notes: Sequence[str] = (),
) -> tuple[Task, LoadReport]:
    """Builds a task from a released checkpoint.

    Sizes follow the checkpoint's shapes, and images are prepared as its own task prepares them.
    Parameters that it does not hold are initialized with seed 0 and reported.

    Args:
        state: The checkpoint, under released names.
        task: The task to build; by default the keys decide.
        num_heads: Number of attention heads; by default one per 64 channels.
        answers: Names of a VQA head's outputs.
        classes: Class names of imagenet. It takes retrieval checkpoints too and then classifies
            by names.
        prompt: A sentence with `{}` where a class name goes.
        tokenizer: The text tokenizer.
        notes: Lines about the file for the report.

    Raises:
        ValueError: Keys are missing or unknown, shapes disagree, or the number of names is not the
            number of the head's outputs.
    """
    checkpoint = identify_checkpoint(state)
    task_class = task if isinstance(task, type) else load_task(task or checkpoint)
    config = add_names(
        infer_task_config(state, task_class, num_heads),
        task_class,
        answers=answers,
        classes=classes,
        prompt=prompt,
        fixed={field: len(state[key]) for field, key in HEAD_SIZES.items() if key in state},
    )
    built = task_class(config, tokenizer=tokenizer)
    if has_text_embedding(state):
        check_released_tokenizer(tokenizer, built.config)
    tensors, ignored, label = translate(state, built)
    values, fresh = match_tensors(built, tensors, exact=True, label=label)
    load_and_initialize(built, values, fresh)
    notes = (*notes, *describe_copies(built, values, tensors))
    source = f"a released {checkpoint} file"
    return built, LoadReport(source, tuple(values), ignored, fresh, notes)


# Frozen parts of a task --------------------------------------------------------------------------


def load_frozen(path: str, kind: str) -> tuple[Task, FrozenFile]:
    """Loads a frozen part, such as the visual tokenizer of pretraining.

    Args:
        path: A weights directory, a run or a released file.
        kind: Name of the task that it must be.

    Returns:
        The task in evaluation mode without gradients, and the file with its digest.
    """
    with torch.device("cpu"):  # the task around it may be built on the meta device
        file = find_path(path)
        if file.is_dir():
            directory = find_weights(file)
            file, task = directory / MODEL_FILE, load_weights(directory)
        else:
            task, _ = load_released(read_state_dict(file), kind)
    if task_name(type(task)) != kind:
        raise ValueError(f"{path} holds weights of {task_name(type(task))}, {kind} is needed here")
    frozen_file = FrozenFile(str(find_path(path).resolve()), compute_sha256(file))
    return task.eval().requires_grad_(False), frozen_file


def load_backbone(path: str) -> BEiT3:
    """Returns the BEiT-3 backbone of a weights directory, run or released file, whatever its task.

    Raises ValueError where it holds none.
    """
    if not path:
        raise ValueError("no weights given: name a directory of weights or a released file")
    weights_path = find_path(path)
    if weights_path.is_dir():
        task = load_weights(find_weights(weights_path))
    else:
        task, _ = load_released(read_state_dict(weights_path))
    if not isinstance(task.backbone, BEiT3):
        raise ValueError(f"{path} holds a {task_name(type(task))}, a BEiT-3 is needed here")
    return task.backbone
