"""Converts foreign files to weights directories and back, byte for byte.

Nothing is resampled, and each tensor keeps its file's precision (reading makes it float32), so a
file that is converted and exported again is equal to the byte, names included. Tensors that a file
does not hold are not written.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from beit3.files import flush_to_disk
from beit3.task import task_name
from beit3.tokenizer.teacher_loading import load_teacher
from beit3.tokenizer.teacher_vit import CLIPTeacher, save_clip
from beit3.tokenizer.text import TextTokenizer
from beit3.weights import timm_format
from beit3.weights.loading import load_released, load_weights
from beit3.weights.matching import LoadReport, abbreviate
from beit3.weights.names import find_path
from beit3.weights.release_format import to_released_state, translate
from beit3.weights.state_dicts import read_checkpoint
from beit3.weights.store import find_weights, read_tensors, replace_directory, save_weights


def convert_released(
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
    """Converts a released file to a weights directory and returns a report, as lines.

    Args:
        path: The file.
        out: The directory to write, which must not exist.
        task: What to convert it to. By default the keys decide, and no tensor may be lost.
        num_heads, answers, classes, prompt, tokenizer: As for `load_released`.

    Raises:
        ValueError: `out` exists, `load_released` refuses the file, or a tensor would be lost.
    """
    check_does_not_exist(out)
    file = read_checkpoint(path, as_stored=True)
    state = file.tensors
    try:
        built, report = load_released(
            state,
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
    kind = task_name(type(built))
    if report.ignored and task is None:
        reason = next(iter(report.ignored.values()))
        raise ValueError(
            f"{path}: {len(report.ignored)} tensors would be lost ({reason}): "
            f"{abbreviate(report.ignored)}; give --task {kind} to convert the rest"
        )
    tensors, _, _ = translate(state, built)
    # Tensors of a file may share memory, which safetensors refuses: they are copied.
    save_weights(built, out, tensors={name: tensor.clone() for name, tensor in tensors.items()})
    lines = report.lines()
    if report.fresh:
        lines.append("what is fresh was not written: fine-tuning starts it (--init)")
    return [*lines, f"{kind} at {out}"]


def export_released(path: str | Path, out: str | Path) -> list[str]:
    """Writes a weights directory or run as a file of the released format; returns a report.

    The file holds `{"model": tensors}` under the released names.

    Raises ValueError for weights that the release has no names for, and for an `out` that exists.
    """
    directory, out = find_weights(path), Path(out)
    if out.suffix != ".pth":
        raise ValueError(
            f"--out {out}: weights of ours go back into one file, give a name that ends in .pth"
        )
    check_does_not_exist(out)
    task = load_weights(directory)
    state = to_released_state(task, read_tensors(directory, as_stored=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.new")
    try:
        with partial.open("wb") as file:  # an open file, whose name torch.save does not record
            torch.save({"model": state}, file)
        flush_to_disk(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    summary = f"{task_name(type(task))}, {', '.join(sorted(dtypes))}"
    return [
        f"{len(state)} tensors of {directory} ({summary}) at {out}",
        "a released file holds no preprocessing, text tokenizer or names of answers: "
        "keep the directory",
    ]


def convert_timm(
    path: str | Path,
    out: str | Path,
    *,
    num_heads: int | None = None,
    classes: Sequence[str] = (),
) -> list[str]:
    """Converts timm's BEiT-3 weights to a weights directory that reads images alone.

    Args:
        path: The file, a folder with timm's `model.safetensors`, or `hf:owner/name`.
        out: The directory to write, which must not exist.
        num_heads: Attention heads; by default those of timm's network of this width.
        classes: Names of the head's outputs.

    Returns:
        A report, as lines.

    Raises:
        ValueError: `out` exists, or the file holds other weights.
    """
    check_does_not_exist(out)
    path = timm_format.find_model_file(find_path(path))
    file = read_checkpoint(path, as_stored=True)
    try:
        built, tensors, ignored = timm_format.build_task(
            file.tensors, num_heads=num_heads, classes=tuple(classes)
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    save_weights(built, out, tensors={name: tensor.clone() for name, tensor in tensors.items()})
    report = LoadReport(f"timm's file {path}", tuple(tensors), ignored, {}, tuple(file.notes))
    return [*report.lines(), f"{task_name(type(built))}, image side alone, at {out}"]


def convert_clip(path: str | Path, out: str | Path) -> list[str]:
    """Converts CLIP's image tower to a directory for `--task.teacher_weights` of vqkd.

    `path` holds tensors under OpenAI's or Hugging Face's names. Returns a report, as lines.

    Raises ValueError for a file of another network, for a TorchScript archive, and for an `out`
    that exists.
    """
    check_does_not_exist(out)
    with replace_directory(Path(out)) as new:
        # The patch size is that of a tokenizer, which plays no part in what is stored.
        teacher = load_teacher("clip", path=path, patch_size=16)
        assert isinstance(teacher, CLIPTeacher)
        save_clip(teacher, new)
    vit = teacher.vit.config
    return [
        f"image tower of CLIP, {vit.depth} x {vit.dim}, {vit.image_size} px / {vit.patch_size}, "
        f"at {out}",
        f"train with it: --task.teacher clip --task.teacher_weights {out} "
        f"--task.model.teacher_dim {teacher.dim}",
    ]


def check_does_not_exist(out: str | Path) -> None:
    """Raises ValueError where `out` exists and is not an empty directory."""
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} exists already: give another one, or remove it")
