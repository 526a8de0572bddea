"""Starts fine-tuning from weights: copies what fits into a task, and names the recipe for them."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3.task import Task, task_name
from beit3.weights.matching import (
    LoadReport,
    assign_weights,
    compare_preprocessing,
    describe_copies,
    explain_unused,
    match_tensors,
)
from beit3.weights.names import find_path
from beit3.weights.release_format import (
    check_released_tokenizer,
    find_preprocessing,
    has_text_embedding,
    identify_checkpoint,
    infer_model_config,
    translate,
)
from beit3.weights.state_dicts import read_checkpoint, read_state_dict
from beit3.weights.store import TOKENIZER_FILE, find_weights, read_config, read_tensors

NETWORK_FIELDS = (
    "dim",
    "depth",
    "num_heads",
    "ffn_dim",
    "patch_size",
    "vocab_size",
    "text_positions",
    "shared_attention",
    "shared_norms",
    "sub_ln",
    "fusion_layers",
    "decoder_depth",
    "code_dim",
    "encoder_network",
    "num_codes",
    "teacher_dim",
)
"""Fields of BEiT-3's and the visual tokenizer's configs that their weights depend on."""

RECIPE_FIELDS = ("dim", "depth", "patch_size", "shared_attention", "fusion_layers")
"""Fields in which a recipe's network must agree with weights to be taken for them."""


def initialize_from(task: Task, path: str | Path) -> LoadReport:
    """Copies the tensors that fit from a weights directory, run or released file into a task.

    The backbone must fit, with image positions resampled to the task's image size. Head parameters
    are taken where name and shape agree. What the file lacks keeps its present values.

    Raises ValueError with the differences of the networks and the tensors that do not fit, and
    where the text tokenizers differ.
    """
    try:
        path = find_path(path)
        if path.is_dir():
            return _initialize_from_directory(task, find_weights(path))
        return _initialize_from_file(task, path)
    except ValueError as error:
        raise ValueError(f"cannot start from {path}: {error}") from None


def find_recipe(task_class: type[Task], init: str | Path) -> str:
    """Returns the recipe of a task that suits the weights to start from.

    That is the first recipe for a network of their size, or `demo` where there is none, where the
    weights cannot be read, or where `init` is empty.
    """
    if not init:
        return "demo"
    try:
        path = find_path(init)
        if path.is_dir():
            model: Any = read_config(find_weights(path)).config.model
        else:
            model = infer_model_config(read_state_dict(path))
    except ValueError:  # the run that starts from them reports the reason
        return "demo"
    for name, recipe in task_class.recipes.items():
        if type(recipe.task.model) is type(model) and all(
            getattr(recipe.task.model, field, None) == getattr(model, field, None)
            for field in RECIPE_FIELDS
        ):
            return name
    return "demo"


def _initialize_from_directory(task: Task, directory: Path) -> LoadReport:
    stored, name = read_config(directory), task_name(type(task))
    stored_model, model = stored.config.model, task.config.model
    if type(stored_model) is not type(model):
        raise ValueError(
            f"it holds a {stored.task}, whose network is of another kind than that of {name}: "
            "give other weights"
        )
    if task.has_tokenizer and stored.tokenizer not in (None, task.tokenizer.digest):
        raise ValueError(
            "the text tokenizer is not the one that these weights were trained with: "
            f"use {directory / TOKENIZER_FILE}"
        )
    if task.has_tokenizer and stored.tokenizer is None:
        check_released_tokenizer(task.tokenizer, stored.config)
    tensors = read_tensors(directory)
    try:
        ignored = explain_unused(task, tensors)
        values, fresh = match_tensors(task, tensors, exact=False)
    except ValueError as error:
        raise ValueError(_describe_differences(stored_model, model, str(error))) from None
    if stored_model.num_heads != model.num_heads:  # no shape tells it
        raise ValueError(
            _describe_differences(stored_model, model, "their tensors have the same shapes")
        )
    assign_weights(task, values)
    notes = describe_copies(task, values, tensors)
    notes += compare_preprocessing(stored.config.image, task.config.image)
    return LoadReport(f"{directory} ({stored.task})", tuple(values), ignored, fresh, notes)


def _initialize_from_file(task: Task, path: Path) -> LoadReport:
    file = read_checkpoint(path)
    state = file.tensors
    checkpoint = identify_checkpoint(state)
    if task.has_tokenizer and has_text_embedding(state):
        check_released_tokenizer(task.tokenizer, task.config)
    try:
        tensors, ignored, label = translate(state, task)
        values, fresh = match_tensors(task, tensors, exact=False, label=label)
    except ValueError as error:
        reason = str(error)
        with suppress(ValueError):  # shapes that imply no network: the first error is enough
            stored_model, model = infer_model_config(state), task.config.model
            if stored_model.dim == model.dim:
                # No shape tells the number of heads, so this network's is taken.
                stored_model = replace(stored_model, num_heads=model.num_heads)
            reason = _describe_differences(stored_model, model, reason)
        raise ValueError(reason) from None
    assign_weights(task, values)
    preprocessing = find_preprocessing(state)
    notes = (*file.notes, *describe_copies(task, values, tensors))
    if preprocessing:
        notes += compare_preprocessing(preprocessing, task.config.image)
    source = f"{path} (a released {checkpoint} file)"
    return LoadReport(source, tuple(values), ignored, fresh, notes)


def _describe_differences(stored_model: Any, model: Any, reason: str) -> str:
    """Returns `reason`, preceded by the config fields in which two networks differ.

    The message also names the command-line options that would build the file's network.
    """
    differences = {
        field: (getattr(stored_model, field, None), getattr(model, field, None))
        for field in NETWORK_FIELDS
        if getattr(stored_model, field, None) != getattr(model, field, None)
    }
    if not differences:
        return reason
    listed = "; ".join(
        f"{field} is {value}, here {own_value}" for field, (value, own_value) in differences.items()
    )
    options = " ".join(f"--task.model.{field} {value}" for field, (value, _) in differences.items())
    return f"another network ({listed}): take a recipe of its size, or give {options}; {reason}"
