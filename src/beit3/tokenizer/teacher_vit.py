"""Vision Transformers as teachers: CLIP's and DINO's, read from a file, and a trained BEiT-3."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from beit3.tokenizer.teacher import Teacher, resize_to_patch_size
from beit3.tokenizer.teacher_files import rename_clip, rename_dino, write_teacher
from beit3.tokenizer.vit import ViT, ViTConfig, to_unit_range

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], per channel."""

CLIP_MEAN_STD: MeanStd = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
IMAGENET_MEAN_STD: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ViTTeacher(Teacher):
    """The normed patch tokens of a Vision Transformer, projected if it has a projection.

    Where its patch size is not the tokenizer's, images are resized so that both have the same grid.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: ViT, projection: Tensor | None, *, mean_std: MeanStd, patch_size: int):
        super().__init__()
        self.vit, self.patch_size = vit, patch_size
        self.projection = None if projection is None else nn.Parameter(projection)  # [D, F]
        self.dim = vit.config.dim if projection is None else projection.shape[1]
        self.register_buffer("mean", torch.tensor(mean_std[0]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(mean_std[1]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        pixels = to_unit_range(images)
        pixels = resize_to_patch_size(pixels, self.patch_size, self.vit.config.patch_size)
        states = self.vit((pixels - self.mean) / self.std)[:, 1:]
        return (states if self.projection is None else states @ self.projection).float()


class CLIPTeacher(ViTTeacher):
    """CLIP's image tower with its projection, in OpenAI's names, Hugging Face's or ours."""

    def __init__(self, state: Mapping[str, Tensor], *, patch_size: int):
        tensors = rename_clip(state)
        projection = tensors.pop("projection")
        vit = _build_vit(tensors, "clip", 1e-5)
        super().__init__(vit, projection, mean_std=CLIP_MEAN_STD, patch_size=patch_size)


class DINOTeacher(ViTTeacher):
    """DINO's Vision Transformer in the names of facebookresearch/dino, without its head."""

    def __init__(self, state: Mapping[str, Tensor], *, patch_size: int):
        vit = _build_vit(rename_dino(state), "dino", 1e-6)
        super().__init__(vit, None, mean_std=IMAGENET_MEAN_STD, patch_size=patch_size)


class BackboneTeacher(Teacher):
    """The image states of a trained BEiT-3 without the class token.

    The backbone is frozen in place, not copied. It gets pixels in [-1, 1], resized where its patch
    size is not the tokenizer's.
    """

    def __init__(self, backbone: nn.Module, *, patch_size: int):
        super().__init__()
        self.backbone, self.patch_size = backbone.requires_grad_(False), patch_size
        config: Any = backbone.config
        self.backbone_patch_size, self.dim = config.patch_size, config.dim
        self.eval()

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        pixels = to_unit_range(images)
        pixels = resize_to_patch_size(pixels, self.patch_size, self.backbone_patch_size)
        return self.backbone(image=pixels * 2 - 1).of("image")[:, 1:].float()


def save_clip(teacher: CLIPTeacher, directory: Path) -> None:
    """Fills an empty directory with a CLIP teacher, as `load_teacher` reads it."""
    assert teacher.projection is not None
    tensors = teacher.vit.state_dict() | {"projection": teacher.projection.detach()}
    write_teacher(tensors, directory, "clip")


def _build_vit(tensors: dict[str, Tensor], style: Literal["dino", "clip"], ln_eps: float) -> ViT:
    """Returns the network of these tensors, with 64 channels per head as in all published ones.

    Raises ValueError, naming the tensors, where they do not make one.
    """
    for name, rank in (("patch.weight", 4), ("positions", 3), ("blocks.0.ffn.fc1.weight", 2)):
        if name not in tensors or tensors[name].ndim != rank:
            raise ValueError(
                f"not a {style.upper()} Vision Transformer: "
                f"no tensor of {rank} dimensions for {name}"
            )
    dim, _, patch_size, _ = tensors["patch.weight"].shape
    if dim % 64:
        raise ValueError(
            f"the {style.upper()} network is {dim} wide, not a multiple of 64 channels per head"
        )
    config = ViTConfig(
        image_size=isqrt(tensors["positions"].shape[1] - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=dim // 64,
        ffn_dim=len(tensors["blocks.0.ffn.fc1.weight"]),
        ln_eps=ln_eps,
        style=style,
    )
    with torch.device("meta"):
        vit = ViT(config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected_shapes = {name: tensor.shape for name, tensor in vit.state_dict().items()}
    names = shapes.keys() | expected_shapes.keys()
    wrong = sorted(name for name in names if shapes.get(name) != expected_shapes.get(name))
    if wrong:
        raise ValueError(
            f"not a {style.upper()} Vision Transformer: "
            f"missing, unknown or misshapen {', '.join(wrong)}"
        )
    vit.load_state_dict(tensors, assign=True)
    return vit
