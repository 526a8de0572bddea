"""Loads weights of any kind into a predictor."""

from pathlib import Path
from typing import Any

import torch

from beit3.export.runtime import is_exported, load_exported
from beit3.precision import Precision
from beit3.predict.names import Names, read_answers, read_classes
from beit3.predict.predictor import Predictor
from beit3.task import Task
from beit3.task import load_task as load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.weights import loading, state_dicts, store
from beit3.weights.adapt import add_names
from beit3.weights.matching import LoadReport, get_weights
from beit3.weights.names import find_path, find_pretrained
from beit3.weights.released import find_text_model


def load(
    path: str | Path,
    *,
    task: str | None = None,
    num_heads: int | None = None,
    text_model: str | Path | None = None,
    answers: Names = None,
    classes: Names = None,
    prompt: str = "",
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    int8: bool = False,
    packed: bool = False,
    compiled: bool = False,
) -> Predictor:
    """Loads weights of any kind, ready to use.

    Args:
        path: A weights directory, a run directory with `best` or `last` in it, a released file or
            an export; or a name: of weights that ship (`world/vqa`), of a released file that was
            downloaded, or `hf:owner/name` (docs/weights.md).
        task: Name of the task to build, by default the one of the weights. Parts that the weights
            do not have are at their initial values then, and the predictor refuses to use them.
        num_heads: Number of attention heads, where 64 units per head is wrong.
        text_model: SentencePiece file for released weights.
        answers: Names of the VQA head's outputs.
        classes: Names of ImageNet's classes; for weights of retrieval any names.
        prompt: Sentence in which {} stands for a class name, for weights of retrieval.
        device: Where to compute, such as "cuda"; `Predictor.to` moves the network later.
        precision: The number format to compute in: float32, bfloat16, float16, int8, or auto,
            which takes what is fast on the device without changing results visibly.
        int8: The short form of precision="int8", two to four times faster on CPUs that have
            instructions for it.
        packed: Lays weights out for batches of recurring size: a third faster on single images
            and captions, for up to twice the memory of the weights.
        compiled: Compiles each block, which pays for many batches of one size and takes half a
            minute at the start. docs/speed.md compares them all.

    Raises:
        ValueError: The weights cannot be loaded in this way; the message is one line.
    """
    path = find_path(path)
    if int8 and precision not in ("float32", "int8"):
        raise ValueError(f"int8 and precision {precision} exclude each other: leave one out")
    if is_exported(path):
        options: dict[str, object] = {"task": task, "num_heads": num_heads, "int8": int8}
        options |= {"text_model": text_model, "answers": answers, "classes": classes}
        options |= {"prompt": prompt, "packed": packed, "compiled": compiled}
        options["precision"] = "" if precision in ("float32", "auto") else precision
        options["device"] = "" if _check_device(device).type == "cpu" else device
        return Predictor(*load_exported(path, options=options))
    if path.is_dir():
        path = store.find_weights(path)
    load_path = _load_directory if path.is_dir() else _load_file
    built, report = load_path(
        path, task, num_heads, text_model, read_answers(answers), read_classes(classes), prompt
    )
    predictor = Predictor(
        built.to(_check_device(device)),
        report,
        precision="int8" if int8 else precision,
        packed=packed,
        compiled=compiled,
    )
    predictor.source = path
    return predictor


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    task: str | None = None,
    text_model: str | Path | None = None,
    classes: Names = None,
    prompt: str = "",
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Predictor:
    """Loads weights from a folder or from a repository of the Hugging Face hub.

    Args:
        name: What `load` takes, or a repository as owner/name. A path of that form that does not
            exist is asked for on the hub.
        revision: A branch, tag or commit of the repository.
        token: Access token; by default the one that `hf auth login` stored.
        cache_dir: The hub's cache; by default its own.
        local_files_only: Take what the cache holds and do not use the network.
        task, text_model, classes, prompt, device, precision: As for `load`.

    Raises:
        ValueError: There are no such weights, or they cannot be fetched or loaded.
    """
    folder = find_pretrained(
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load(
        folder,
        task=task,
        text_model=text_model,
        classes=classes,
        prompt=prompt,
        device=device,
        precision=precision,
    )


def _check_device(device: torch.device | str) -> torch.device:
    """Returns the device. Raises ValueError for one that torch does not know or cannot use."""
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {device} cannot be used: {reason}") from None
    return checked


def _load_file(
    path: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    answers: tuple[str, ...],
    classes: tuple[str, ...],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Loads a released file, as its own task or another."""
    text_model = text_model or find_text_model(path)
    tokenizer = None if text_model is None else TextTokenizer(text_model)
    file = state_dicts.read_checkpoint(path)
    try:
        return loading.load_released(
            file.tensors,
            task,
            num_heads=num_heads,
            answers=answers,
            classes=classes,
            prompt=prompt,
            tokenizer=tokenizer,
            notes=file.notes,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_directory(
    directory: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    answers: tuple[str, ...],
    classes: tuple[str, ...],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Loads a weights directory, as its own task or another."""
    description = store.read_config(directory)
    config: Any = description.config
    if num_heads not in (None, config.model.num_heads):
        raise ValueError(
            f"num_heads {num_heads} given, {directory} holds weights of {config.model.num_heads} "
            "heads: leave num_heads out"
        )
    if task not in (None, description.task):
        return loading.load_weights_as(
            directory, task, text_model=text_model, answers=answers, classes=classes, prompt=prompt
        )
    try:
        config = add_names(
            config,
            load_task(description.task),
            answers=answers,
            classes=classes,
            prompt=prompt,
            fixed=config.head_sizes,
        )
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    built = loading.load_weights(directory, text_model=text_model, config=config)
    return built, LoadReport(f"{directory} ({description.task})", tuple(get_weights(built)), {}, {})
