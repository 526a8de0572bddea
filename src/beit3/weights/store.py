"""Our own weights: a directory with everything that inference needs.

`model.safetensors` (all tensors but those of frozen parts), `config.json` (task, its config with the preprocessing,
digests) and, where the task has one, the text tokenizer `text.model`. Loading is strict: names and shapes must agree.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3.config import from_dict, to_dict
from beit3.files import flush_to_disk
from beit3.model.beit3 import BEiT3
from beit3.model.trunk import ImageTrunk
from beit3.recipe import TaskConfig
from beit3.task import Task, task_name
from beit3.task import load_task as load_task
from beit3.tokenizer.text import FILE, TextTokenizer
from beit3.weights.adapt import adapted, with_names
from beit3.weights.matching import (
    FINAL_NORM,
    Report,
    assign,
    beyond_images,
    complete,
    first_few,
    match,
    may_lack,
    prepared_differently,
    stored,
)
from beit3.weights.release_format import (
    family,
    in_float32,
    known_pictures,
    load_official,
    read_file,
    refuse_other_tokenizer,
    sizes,
    translate,
)

FORMAT = 1
MODEL, CONFIG, TEXT = "model.safetensors", "config.json", FILE


@dataclass(frozen=True)
class FrozenFile:
    """Where a frozen part came from, and the digest of its tensors' file."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Stored:
    """A weights directory's `config.json`, read and checked."""

    task: str
    config: TaskConfig
    tokenizer: str | None
    """SHA-256 of the text tokenizer that the weights were trained with."""
    frozen: Mapping[str, FrozenFile]


def is_weights(path: str | Path) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    return all((Path(path) / name).is_file() for name in (MODEL, CONFIG))


def find(path: str | Path) -> Path:
    """The weights at `path`: itself, or the `best` or `last` of a run; ValueError where there are none."""
    path = Path(path)
    for place in (path, path / "best", path / "last"):
        if is_weights(place):
            return place
    raise ValueError(
        f"{path} holds neither weights nor a run's best or last: give one that beit3 train wrote"
    )


def save(task: Task, directory: str | Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights of `task` to `directory`, in place of older ones, by renaming: never a mix of both.

    tensors: written for the task's own, in their own precision. Raises ValueError where `directory` is something else
    than weights, OSError where it cannot be written.
    """
    directory = Path(directory)
    if (
        directory.exists()
        and not is_weights(directory)
        and (directory.is_file() or any(directory.iterdir()))
    ):
        raise ValueError(f"{directory} exists and does not hold weights: give another directory")
    values = stored(task) if tensors is None else tensors
    with in_place_of(directory) as new:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()},
                new / MODEL,
            )
        except SafetensorError as error:  # its own kind of error for a disk that is full or gone
            raise OSError(f"{new / MODEL} cannot be written: {error}") from error
        (new / CONFIG).write_text(
            json.dumps(_description(task), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if task.has_tokenizer:
            task.tokenizer.save(new / TEXT)


@contextmanager
def in_place_of(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which then takes the place of `directory`; an error leaves the older one alone."""
    new, old = (directory.with_name(f".{directory.name}.{age}") for age in ("new", "old"))
    if old.exists() and not directory.exists():
        old.rename(
            directory
        )  # the last save died between its two renames: keep what it had set aside
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


def load(
    directory: str | Path, *, text_model: str | Path | None = None, config: TaskConfig | None = None
) -> Task:
    """The task that `save` wrote, on the CPU. Strict: ValueError naming what is missing, unknown, misshapen or unfit.

    text_model: the text tokenizer's file, where the directory came without. config: used in place of the stored one.
    """
    directory = Path(directory)
    description = read_config(directory)
    tokenizer = _tokenizer(directory, description, text_model)
    task = load_task(description.task)(
        _with_frozen(config or description.config, description.frozen), tokenizer=tokenizer
    )
    for name, file in getattr(task, "frozen_files", {}).items():
        if name in description.frozen and description.frozen[name].sha256 != file.sha256:
            raise ValueError(
                f"{name} {file.path} is not the file that these weights were trained with: put that back"
            )
    tensors, here = read_tensors(directory), stored(task)
    unknown = [name for name in tensors if name not in here]
    missing = [name for name in here if name not in tensors]
    if unknown or missing:
        verb, names = ("unknown", unknown) if unknown else ("missing", missing)
        # `beit3 convert` leaves out what its file did not hold; fine-tuning fills it in.
        start = not unknown and all(may_lack(name, images_alone=True) for name in missing)
        remedy = (
            f"; train them with beit3 train {description.task} --init {directory}" if start else ""
        )
        raise ValueError(
            f"{directory / MODEL}: {len(names)} tensors are {verb}: {first_few(names)}{remedy}"
        )
    for name, tensor in tensors.items():
        shape, needed = list(tensor.shape), list(here[name].shape)
        if shape != needed:
            raise ValueError(
                f"{directory / MODEL}: {name} has shape {shape}, the config needs {needed}"
            )
    task.load_state_dict(tensors, strict=False)
    return task


def load_as(
    directory: str | Path,
    task: str,
    *,
    text_model: str | Path | None = None,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
) -> tuple[Task, Report]:
    """Weights of one task as another, with their network, pictures, texts' length and tokenizer: (the task on the CPU, the report).

    Heads go by their names, so those of retrieval serve imagenet, which then classifies into any `classes`. What the
    weights do not hold is initialised with seed 0 and reported. Raises ValueError for networks of another kind, for
    tensors that do not fit, and for names that do not.
    """
    description, kind = read_config(directory), load_task(task)
    there: Any = description.config
    if type(there.model) is not type(kind.Config().model):
        raise ValueError(
            f"{directory} holds weights of {description.task}, whose network cannot become {task}: give other weights"
        )
    tensors = read_tensors(directory)
    config = replace(
        adapted(kind, there.model, there.image, by_names="image_projection.weight" in tensors),
        text_length=there.text_length,
    )
    config = with_names(config, kind, answers=answers, classes=classes, prompt=prompt, fixed={})
    built = kind(config, tokenizer=_tokenizer(Path(directory), description, text_model))
    try:
        ignored = _unused(built, tensors)
        values, fresh = match(built, tensors, exact=True)
    except ValueError as error:
        raise ValueError(
            f"{directory} holds weights of {description.task}, which cannot become {task}: {error}"
        ) from None
    complete(built, values, fresh)
    return built, Report(f"{directory} ({description.task})", tuple(values), ignored, fresh)


def _with_frozen(config: TaskConfig, frozen: Mapping[str, FrozenFile]) -> TaskConfig:
    """`config` with the absolute path of a frozen part where the relative one leads nowhere from this directory."""
    moved: dict[str, Any] = {
        name: file.path
        for name, file in frozen.items()
        if not Path(getattr(config, name)).exists() and Path(file.path).exists()
    }
    return replace(config, **moved) if moved else config


def read_config(directory: str | Path) -> Stored:
    """What a weights directory says about itself; ValueError naming the file and field that cannot be read."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"no weights at {directory}: {CONFIG} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and "teacher" in data:
        raise ValueError(
            f"{directory} holds a {data['teacher']} teacher, no BEiT-3: it is for --task.teacher_weights of vqkd"
        )
    fields = ("format", "task", "config", "tokenizer", "frozen")
    missing = [field for field in fields if not isinstance(data, dict) or field not in data]
    if missing:
        raise ValueError(
            f"{path} lacks the field {missing[0]!r}: weights as `beit3 train` writes them are expected"
        )
    if data["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {data['format']!r}, not {FORMAT}: read it with the version that wrote it"
        )
    config = from_dict(load_task(data["task"]).Config, data["config"], f"{path}: config")
    frozen = {
        name: from_dict(FrozenFile, file, f"{path}: frozen.{name}")
        for name, file in data["frozen"].items()
    }
    return Stored(data["task"], config, data["tokenizer"], frozen)


def read_tensors(directory: str | Path, *, as_stored: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights directory by our names, floating ones in float32 or, `as_stored`, as they are."""
    path = Path(directory) / MODEL
    try:
        return {
            name: tensor if as_stored else in_float32(tensor)
            for name, tensor in load_file(path).items()
        }
    except FileNotFoundError:
        raise ValueError(f"no weights at {directory}: {MODEL} is missing") from None
    except (SafetensorError, OSError):
        raise ValueError(f"{path} is not a whole safetensors file: copy it again") from None


def load_frozen(path: str, kind: str) -> tuple[Task, FrozenFile]:
    """A part that never trains: the task `kind` from our directory or a released file, and the file's digest."""
    with torch.device("cpu"):  # real, also where the task around it is built on meta
        if Path(path).is_dir():
            file, task = find(path) / MODEL, load(find(path))
        else:
            file, (task, _) = Path(path), load_official(read_file(path), kind)
    if task_name(type(task)) != kind:
        raise ValueError(f"{path} holds weights of {task_name(type(task))}, {kind} is needed here")
    return task.eval().requires_grad_(False), FrozenFile(str(Path(path).resolve()), digest(file))


def load_backbone(path: str) -> BEiT3:
    """The BEiT-3 of our directory or of a released file, whatever its task; ValueError where it holds none."""
    if not path:
        raise ValueError("no weights given: name a directory of weights or a released file")
    task = load(find(path)) if Path(path).is_dir() else load_official(read_file(path))[0]
    if not isinstance(task.backbone, BEiT3):
        raise ValueError(f"{path} holds a {task_name(type(task))}, a BEiT-3 is needed here")
    return task.backbone


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def initialise_from(task: Task, path: str | Path) -> Report:
    """Copy into `task` what fits from our directory or a released file: the start of fine-tuning.

    The backbone must fit, with image positions resampled to the task's image size; heads are taken where name and shape
    agree; what the file lacks keeps its present values. Raises ValueError naming how the networks differ and which
    tensors do not fit, and where the text tokenizers differ.
    """
    path = Path(path)
    try:
        return _from_directory(task, find(path)) if path.is_dir() else _from_file(task, path)
    except ValueError as error:
        raise ValueError(f"cannot start from {path}: {error}") from None


def _from_directory(task: Task, path: Path) -> Report:
    description, name = read_config(path), task_name(type(task))
    there, here = description.config.model, task.config.model
    if type(there) is not type(here):
        raise ValueError(
            f"it holds a {description.task}, whose network is of another kind than that of {name}: give other weights"
        )
    if task.has_tokenizer and description.tokenizer not in (None, task.tokenizer.digest):
        raise ValueError(
            f"the text tokenizer is not the one that these weights know: use {path / TEXT}"
        )
    if task.has_tokenizer and description.tokenizer is None:
        refuse_other_tokenizer(task.tokenizer, description.config)
    tensors = read_tensors(path)
    try:
        ignored = _unused(task, tensors)
        values, fresh = match(task, tensors, exact=False)
    except ValueError as error:
        raise ValueError(_differences(there, here, str(error))) from None
    if there.num_heads != here.num_heads:  # no shape tells it
        raise ValueError(_differences(there, here, "their tensors have the same shapes"))
    assign(task, values)
    notes = prepared_differently(description.config.image, task.config.image)
    return Report(f"{path} ({description.task})", tuple(values), ignored, fresh, notes)


def _from_file(task: Task, path: Path) -> Report:
    state = read_file(path)
    found = family(state)
    if task.has_tokenizer and any(key.endswith("text_embed.weight") for key in state):
        refuse_other_tokenizer(task.tokenizer, task.config)
    try:
        tensors, ignored, label = translate(state, task)
        values, fresh = match(task, tensors, exact=False, label=label)
    except ValueError as error:
        reason = str(error)
        with suppress(ValueError):  # tensors that imply no network: the first error says enough
            there, here = sizes(state), task.config.model
            # At one width the heads are this network's to say: no shape tells them.
            reason = _differences(
                replace(there, num_heads=here.num_heads) if there.dim == here.dim else there,
                here,
                reason,
            )
        raise ValueError(reason) from None
    assign(task, values)
    pictures = known_pictures(state)
    notes = prepared_differently(pictures, task.config.image) if pictures else ()
    return Report(f"{path} (a released {found} file)", tuple(values), ignored, fresh, notes)


def recipe_for(kind: type[Task], init: str | Path) -> str:
    """The recipe of a task where none is named: `demo`, or the first one for a network of the size of the weights `init`."""
    if not init:
        return "demo"
    try:
        model = (
            read_config(find(init)).config.model if Path(init).is_dir() else sizes(read_file(init))
        )
    except ValueError:  # the run that starts from them says what is wrong
        return "demo"
    same = ("dim", "depth", "patch_size", "shared_attention", "fusion_layers")
    for name, recipe in kind.recipes.items():
        if type(recipe.task.model) is type(model) and all(
            getattr(recipe.task.model, f, None) == getattr(model, f, None) for f in same
        ):
            return name
    return "demo"


NETWORK = (
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
    "num_codes",
    "teacher_dim",
)
"""Fields of a network's config that its weights cannot do without: BEiT-3's, and the visual tokenizer's."""


def _differences(there: Any, here: Any, reason: str) -> str:
    """`reason`, led by the fields in which the file's network differs from this one, and how to give them."""
    names = [name for name in NETWORK if getattr(there, name, None) != getattr(here, name, None)]
    if not names:
        return reason
    listed = "; ".join(
        f"{name} is {getattr(there, name)}, here {getattr(here, name)}" for name in names
    )
    flags = " ".join(f"--task.model.{name} {getattr(there, name)}" for name in names)
    return f"another network ({listed}): take a recipe of its size, or give {flags}; {reason}"


def _unused(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Why tensors of other weights are left out; ValueError for those of a backbone that this one has no place for."""
    here, name = stored(task), task_name(type(task))
    left = [key for key in tensors if key not in here]
    reasons = {}
    for key in left:
        if key.startswith(FINAL_NORM):
            reasons[key] = f"the final norm: {name} reads the states before it"
        elif isinstance(task.backbone, ImageTrunk) and beyond_images(key):
            reasons[key] = f"{name} takes images alone"
        elif not key.startswith("backbone."):
            reasons[key] = f"a head that {name} does not have"
    unknown = [key for key in left if key not in reasons]
    if unknown:
        raise ValueError(
            f"this {name} has no place for {len(unknown)} tensors: {first_few(unknown)}"
        )
    return reasons


def _description(task: Task) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "task": task_name(type(task)),
        "config": to_dict(task.config),
        "tokenizer": task.tokenizer.digest if task.has_tokenizer else None,
        "frozen": to_dict(getattr(task, "frozen_files", {})),
    }


def _tokenizer(
    directory: Path, description: Stored, text_model: str | Path | None
) -> TextTokenizer | None:
    file = Path(text_model) if text_model is not None else directory / TEXT
    if text_model is None and not file.is_file():
        return None
    tokenizer = TextTokenizer(file)
    if description.tokenizer not in (None, tokenizer.digest):
        raise ValueError(
            f"{file} is a tokenizer that does not fit the weights: give the one they were trained with"
        )
    if description.tokenizer is None:  # a released file that was converted without one
        try:
            refuse_other_tokenizer(tokenizer, description.config)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    return tokenizer
