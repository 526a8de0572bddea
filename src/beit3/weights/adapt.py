"""Configs of tasks around a network that exists: what its weights fix, what the task wants, and the names that a person gives."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from beit3.data.views.transforms import Preprocessing
from beit3.model.config import ModelConfig
from beit3.task import Task, task_name

COUNTS = {"answers": "num_answers", "classes": "num_classes"}
"""Config fields of names -> those that say how many there are."""


def adapted(kind: type[Task], model: ModelConfig, image: Preprocessing, *, by_names: bool) -> Any:
    """The config of `kind` for the network `model` and the pictures that its weights know.

    by_names: the weights hold a projection per modality, so that a task that can classify by names does. Texts are as
    long as the task reads them, within the network's table. A backbone is built as the network is; a task as it must
    be, and the final norm that the weights then lack starts fresh.
    """
    config: Any = kind.Config()
    known = fields_of(config)
    by_names = by_names and isinstance(getattr(config, "head", None), str)
    if "fit" in (
        config.image.resize,
        image.resize,
    ):  # detection's pictures keep their aspect, nobody else's do
        image = replace(image, resize=config.image.resize)
    final_norm = (
        model.final_norm if task_name(kind) == "backbone" else by_names or config.model.final_norm
    )
    lengths = {
        name: min(getattr(config, name), model.max_text_length)
        for name in known
        if name.endswith("text_length")
    }
    head = {"head": "names"} if by_names else {}
    return replace(
        config, model=replace(model, final_norm=final_norm), image=image, **lengths, **head
    )


def with_names(
    config: Any,
    kind: type[Task],
    *,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
    fixed: Mapping[str, int],
) -> Any:
    """`config` with the names of answers or classes, and their number. `fixed`: how many outputs a head has, by config field.

    ValueError for names of another number, for a task without such names, and for a prompt without a place for them.
    """
    given = {"answers": tuple(answers), "classes": tuple(classes), "prompt": prompt}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value}
    for name in changes:
        if name not in fields_of(config):
            raise ValueError(f"{name} given, but {task_name(kind)} has none: leave {name} out")
    if prompt and "{}" not in prompt:
        raise ValueError(
            f"prompt {prompt!r} has no {{}}, which a name takes the place of: write it as 'a photo of a {{}}'"
        )
    for name, count in COUNTS.items():
        if name in changes:
            outputs = fixed.get(count, len(changes[name]))
            if outputs != len(changes[name]):
                raise ValueError(
                    f"{len(changes[name])} {name} given, the file's head has {outputs} outputs: give its own list"
                )
            changes[count] = outputs
    return replace(config, **changes)


def fields_of(config: Any) -> set[str]:
    """Names of a config's fields."""
    return {field.name for field in fields(config)}
