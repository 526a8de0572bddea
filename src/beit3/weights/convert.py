"""Foreign files to our directories and back, without resampling anything and in each file's own precision.

`model.safetensors` keeps the types of the file's tensors (reading makes them float32), so what goes back is equal to the
byte, names included. What a file does not hold is not written. Shapes: paths, and report lines for a person.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from beit3.task import task_name
from beit3.tokenizer.teacher import CLIPTeacher, load_teacher, save_clip
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import first_few
from beit3.weights.release_format import load_official, read_file, to_official, translate
from beit3.weights.store import find, in_place_of, load, read_tensors, save


def from_official(
    path: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    num_heads: int | None = None,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
    tokenizer: TextTokenizer | None = None,
) -> list[str]:
    """A released file -> our directory `out`; what became of every tensor, as lines.

    Without `task` the keys decide and nothing may be lost. Raises ValueError where something would be, for an `out` that
    exists, and for whatever `load_official` refuses.
    """
    refuse_existing(out)
    state = read_file(path, as_stored=True)
    try:
        built, report = load_official(
            state,
            task,
            num_heads=num_heads,
            answers=answers,
            classes=classes,
            prompt=prompt,
            tokenizer=tokenizer,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if report.ignored and task is None:
        reason, kind = next(iter(report.ignored.values())), task_name(type(built))
        lost = (
            f"{len(report.ignored)} tensors would be lost ({reason}): {first_few(report.ignored)}"
        )
        raise ValueError(f"{path}: {lost}; give --task {kind} to convert the rest")
    tensors = translate(state, built)[0]
    save(
        built, out, tensors={name: tensor.clone() for name, tensor in tensors.items()}
    )  # files may share memory between tensors
    left_out = (
        ["what is fresh was not written: fine-tuning starts it (--init)"] if report.fresh else []
    )
    return [*report.lines(), *left_out, f"{task_name(type(built))} at {out}"]


def to_file(path: str | Path, out: str | Path) -> list[str]:
    """Our directory or run -> a file as the release's: `{"model": tensors}` under its names; what was done, as lines.

    Raises ValueError for weights in a form that the release has no names for, and for an `out` that exists.
    """
    directory, out = find(path), Path(out)
    if out.suffix != ".pth":
        raise ValueError(
            f"--out {out}: weights of ours go back into one file, give a name that ends in .pth"
        )
    refuse_existing(out)
    task = load(directory)
    state = to_official(task, read_tensors(directory, as_stored=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.new")
    try:
        with temporary.open("wb") as file:
            torch.save({"model": state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    kinds = ", ".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    )
    return [
        f"{len(state)} tensors of {directory} ({task_name(type(task))}, {kinds}) at {out}",
        "a released file has no place for the preprocessing, the text tokenizer and the names of answers: keep the directory",
    ]


def from_clip(path: str | Path, out: str | Path) -> list[str]:
    """CLIP's image tower, OpenAI's or Hugging Face's tensors -> a directory for `--task.teacher_weights` of vqkd.

    Raises ValueError for a file of another network, for a TorchScript archive, and for an `out` that exists.
    """
    refuse_existing(out)
    with in_place_of(Path(out)) as new:
        teacher = load_teacher(
            "clip", path=path, patch_size=16
        )  # of who asks it: its own patches stay what they are
        assert isinstance(teacher, CLIPTeacher)
        save_clip(teacher, new)
    network = teacher.vit.config
    return [
        f"image tower of CLIP, {network.depth} x {network.dim}, {network.image_size} px / {network.patch_size}, at {out}",
        f"train with it: --task.teacher clip --task.teacher_weights {out} --task.model.teacher_dim {teacher.dim}",
    ]


def refuse_existing(out: str | Path) -> None:
    """ValueError where `out` is there, unless it is an empty directory: converting replaces nothing."""
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} exists already: give another one, or remove it")
