"""Which teachers there are, what supervised each, and how those of files are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from beit3.tokenizer.efficientnet import load_efficientnet
from beit3.tokenizer.teacher import Teacher
from beit3.tokenizer.teacher_efficientnet import EfficientNetTeacher, find_installed_weights
from beit3.tokenizer.teacher_files import read_teacher
from beit3.tokenizer.teacher_gradients import Gradients
from beit3.tokenizer.teacher_vit import CLIPTeacher, DINOTeacher

TeacherName = Literal["gradients", "efficientnet", "clip", "dino"]

SUPERVISION: Mapping[str, str] = {
    "gradients": "hand-made color and edge statistics, without any supervision",
    "efficientnet": "EfficientNet-Lite0, supervised by the class labels of ImageNet-1k "
    "(Apache License 2.0)",
    "clip": "CLIP, supervised by the texts of image-text pairs",
    "dino": "DINO, trained on images alone",
    "beit3": "a BEiT-3 of one's own, supervised as its weights were",
}
"""Name of a teacher -> what it is and what supervised it, which its codes carry on."""


def load_teacher(name: TeacherName, *, path: Path | str | None = None, patch_size: int) -> Teacher:
    """Returns a teacher.

    Args:
        name: Which one.
        path: Weights of CLIP or DINO, a file, or for CLIP a directory of `save_clip`. Those of
            EfficientNet are an installed package's where none are given.
        patch_size: Patch size of the visual tokenizer, in pixels.

    Raises:
        ValueError: The name is unknown, or the file is missing, unreadable or of another network.
    """
    if name == "gradients":
        return Gradients(patch_size)
    if name == "efficientnet":
        tensors = read_teacher(Path(path or find_installed_weights()), name)
        return EfficientNetTeacher(load_efficientnet(tensors), patch_size=patch_size)
    if name not in ("clip", "dino"):
        raise ValueError(f"unknown teacher {name!r}: choose gradients, efficientnet, clip or dino")
    if path is None:
        raise ValueError(
            f"teacher {name!r} has no weights: give the path of its .pt, .pth or .safetensors file"
        )
    teacher_class = CLIPTeacher if name == "clip" else DINOTeacher
    return teacher_class(read_teacher(Path(path), name), patch_size=patch_size)
