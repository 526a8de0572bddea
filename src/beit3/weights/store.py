"""A directory of weights: everything that inference needs, in three files.

weights/
  model.safetensors   all tensors but those of frozen parts, under our names
  config.json         format, task, its config with the preprocessing, digests
  text.model          the SentencePiece text tokenizer, where the task has one
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3.config import from_dict, to_dict
from beit3.files import flush_to_disk, read_json
from beit3.recipe import TaskConfig
from beit3.task import FrozenFile, Task, load_task, task_name
from beit3.tensor_files import check_finite, write_tensors
from beit3.tokenizer import text
from beit3.weights.matching import get_weights
from beit3.weights.state_dicts import to_float32

FORMAT = 1
MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE = "model.safetensors", "config.json", text.MODEL_FILE

FOREIGN_FILES = ("*.index.json", "*.safetensors", "*.pth", "*.pt", "*.ckpt", "*.bin")
"""Files of other programs' weights, in the order in which one of them is named."""


@dataclass(frozen=True)
class StoredConfig:
    """The `config.json` of a weights directory, read and checked."""

    task: str
    config: TaskConfig
    tokenizer: str | None
    """SHA-256 of the text tokenizer that the weights were trained with."""
    frozen: Mapping[str, FrozenFile]
    """Config field that names the weights of a frozen part -> the file it was."""


# Find and write ----------------------------------------------------------------------------------


def is_weights(path: str | Path) -> bool:
    """Returns whether `path` is a directory that `save_weights` wrote."""
    return all((Path(path) / name).is_file() for name in (MODEL_FILE, CONFIG_FILE))


def find_weights(path: str | Path) -> Path:
    """Returns the weights directory at `path`: itself, or the `best` or else `last` of a run.

    Raises ValueError where there is none.
    """
    path = Path(path)
    for directory in (path, path / "best", path / "last"):
        if is_weights(directory):
            return directory
    for pattern in FOREIGN_FILES:
        if files := sorted(path.glob(pattern)):
            raise ValueError(f"{path} is a directory: give the file in it, {files[0]}")
    raise ValueError(
        f"{path} holds neither weights nor a run's best or last: give one that beit3 train wrote"
    )


def save_weights(
    task: Task, directory: str | Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the weights of a task, replacing older ones as a whole, never a mix of both.

    Args:
        task: The task.
        directory: Where to write. It may hold older weights or not exist.
        tensors: Written in place of the task's own tensors, in their own precision.

    Raises:
        ValueError: `directory` holds something else than weights.
        OSError: It cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not is_weights(directory):
        if directory.is_file() or any(directory.iterdir()):
            raise ValueError(
                f"{directory} exists and does not hold weights: give another directory"
            )
    with replace_directory(directory) as new:
        write_weights_files(task, new, tensors=tensors)


def write_weights_files(
    task: Task, directory: Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the three files of a weights directory; the arguments are those of `save_weights`."""
    values = get_weights(task) if tensors is None else tensors
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
    try:
        write_tensors(values, directory / MODEL_FILE)
    except SafetensorError as error:  # raised where the disk is full or gone
        raise OSError(f"{directory / MODEL_FILE} cannot be written: {error}") from error
    description = json.dumps(describe_task(task), indent=1, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(description + "\n", encoding="utf-8")
    if task.has_tokenizer:
        task.tokenizer.save(directory / TOKENIZER_FILE)


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which then takes the place of `directory`.

    An error leaves the older directory alone.
    """
    new = directory.with_name(f".{directory.name}.new")
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():
        old.rename(directory)  # the last save died between its two renames
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for path in (*new.iterdir(), new):
        flush_to_disk(path)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    flush_to_disk(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def describe_task(task: Task) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    return {
        "format": FORMAT,
        "task": task_name(type(task)),
        "config": to_dict(task.config),
        "tokenizer": task.tokenizer.digest if task.has_tokenizer else None,
        "frozen": to_dict(task.frozen_files),
    }


# Read --------------------------------------------------------------------------------------------


def read_config(directory: str | Path) -> StoredConfig:
    """Reads the `config.json` of a weights directory.

    Raises ValueError, naming the file and the field, where it cannot be read.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"no weights at {directory}: {CONFIG_FILE} is missing")
    data = read_json(path)
    if isinstance(data, dict) and "teacher" in data:
        raise ValueError(
            f"{directory} holds a {data['teacher']} teacher, no BEiT-3: "
            "it is for --task.teacher_weights of vqkd"
        )
    for field in ("format", "task", "config", "tokenizer", "frozen"):
        if not isinstance(data, dict) or field not in data:
            raise ValueError(
                f"{path} lacks the field {field!r}: weights as `beit3 train` writes them "
                "are expected"
            )
    if data["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {data['format']!r}, not {FORMAT}: "
            "read it with the version that wrote it"
        )
    for field, kind in (("task", str), ("tokenizer", str | None), ("frozen", dict)):
        if not isinstance(data[field], kind):
            raise ValueError(
                f"{path}: the field {field!r} is {str(data[field])[:60]!r}: weights as "
                "`beit3 train` writes them are expected"
            )
    try:
        task_class = load_task(data["task"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = from_dict(task_class.Config, data["config"], f"{path}: config")
    frozen = {
        name: from_dict(FrozenFile, file, f"{path}: frozen.{name}")
        for name, file in data["frozen"].items()
    }
    return StoredConfig(data["task"], config, data["tokenizer"], frozen)


def read_tensors(directory: str | Path, *, as_stored: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of a weights directory under our names.

    Floating tensors become float32, or keep the file's precision with `as_stored`.
    """
    path = Path(directory) / MODEL_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"no weights at {directory}: {MODEL_FILE} is missing") from None
    except (SafetensorError, OSError):
        raise ValueError(f"{path} is not a complete safetensors file: copy it again") from None
    check_finite(tensors, path)
    if as_stored:
        return tensors
    return {name: to_float32(tensor) for name, tensor in tensors.items()}
