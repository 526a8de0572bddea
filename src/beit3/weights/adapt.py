"""Configs of tasks around existing weights: what the weights fix, and the names a user gives."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import ModelConfig
from beit3.task import Task, task_name

COUNT_FIELDS = {"answers": "num_answers", "classes": "num_classes"}
"""Config field with the names of a head's outputs -> config field with their number."""


def adapt_config(
    task_class: type[Task], model: ModelConfig, image: Preprocessing, *, by_names: bool
) -> Any:
    """Returns the config of a task for an existing network.

    Texts are as long as the task reads them, within the network's position table. A bare backbone
    is built exactly as the network is. A task keeps its own choice of final norm; where the
    weights lack that norm, it starts fresh.

    Args:
        task_class: The task.
        model: Config of the network.
        image: The preprocessing that the weights were trained with.
        by_names: Whether the weights hold a projection per modality, so that a task that can
            classify by names does.
    """
    config: Any = task_class.Config()
    field_names = get_field_names(config)
    by_names = by_names and config.supports_names_head
    if "fit" in (config.image.resize, image.resize):
        # Only detection keeps the aspect ratio of its images.
        image = replace(image, resize=config.image.resize)
    if task_name(task_class) == "backbone":
        final_norm = model.final_norm
    else:
        final_norm = by_names or config.model.final_norm
    changes: dict[str, Any] = {
        name: min(getattr(config, name), model.max_text_length)
        for name in field_names
        if name.endswith("text_length")
    }
    if by_names:
        changes["head"] = "names"
    return replace(config, model=replace(model, final_norm=final_norm), image=image, **changes)


def add_names(
    config: Any,
    task_class: type[Task],
    *,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
    fixed: Mapping[str, int],
) -> Any:
    """Returns `config` with the names of a head's outputs, and their number.

    Args:
        config: The task's config.
        task_class: The task.
        answers: Names of a VQA head's outputs; empty = leave them as they are.
        classes: Names of a classification head's outputs; empty = leave them as they are.
        prompt: A sentence with `{}` where a class name goes; empty = leave it as it is.
        fixed: Config field of `COUNT_FIELDS` -> number of outputs that the weights' head has.

    Raises:
        ValueError: The number of names is not the head's, the task has no such names, or the
            prompt has no `{}`.
    """
    names_by_field = {"answers": tuple(answers), "classes": tuple(classes), "prompt": prompt}
    changes: dict[str, Any] = {name: value for name, value in names_by_field.items() if value}
    for name in changes:
        if name not in get_field_names(config):
            raise ValueError(
                f"{name} given, but {task_name(task_class)} has none: leave {name} out"
            )
    if prompt and "{}" not in prompt:
        raise ValueError(
            f"prompt {prompt!r} has no {{}}, which a name replaces: write it as 'a photo of a {{}}'"
        )
    for name, count_field in COUNT_FIELDS.items():
        if name not in changes:
            continue
        num_names = len(changes[name])
        num_outputs = fixed.get(count_field, num_names)
        if num_outputs != num_names:
            raise ValueError(
                f"{num_names} {name} given, the file's head has {num_outputs} outputs: "
                "give its own list"
            )
        changes[count_field] = num_outputs
    return replace(config, **changes)


def get_field_names(config: Any) -> set[str]:
    """Returns the names of a config's fields."""
    return {field.name for field in fields(config)}
