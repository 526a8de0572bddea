"""The frozen teachers whose patch features the visual tokenizer learns to predict.

BEiT v2, section 3.1. A teacher turns images [B, 3, H, W], uint8 or floats in [0, 1], into float32
features [B, P, F] on the tokenizer's grid of patches, in row-major order. CLIP and DINO are read
from a local file; `Gradients` needs none and is the default.
"""

import math
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.tokenizer.teacher_files import read_teacher, rename_clip, rename_dino, write_teacher
from beit3.tokenizer.vit import ViT, ViTConfig, compute_patch_grid, to_unit_range

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], per channel."""

CLIP_MEAN_STD: MeanStd = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
IMAGENET_MEAN_STD: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

TeacherName = Literal["gradients", "clip", "dino"]


def load_teacher(
    name: TeacherName, *, path: Path | str | None = None, patch_size: int
) -> "Teacher":
    """Returns a teacher.

    Args:
        name: Which one.
        path: Weights of CLIP or DINO, a file, or for CLIP a directory of `save_clip`.
        patch_size: Patch size of the visual tokenizer, in pixels.

    Raises:
        ValueError: The name is unknown, or the file is missing, unreadable or of another network.
    """
    if name == "gradients":
        return Gradients(patch_size)
    if name not in ("clip", "dino"):
        raise ValueError(f"unknown teacher {name!r}: choose gradients, clip or dino")
    if path is None:
        raise ValueError(
            f"teacher {name!r} has no weights: give the path of its .pt, .pth or .safetensors file"
        )
    teacher_class = CLIPTeacher if name == "clip" else DINOTeacher
    return teacher_class(read_teacher(Path(path), name), patch_size=patch_size)


class Teacher(nn.Module):
    """A frozen network that is always in evaluation mode."""

    dim: int
    """Channels F of the features."""

    def extract_features(self, images: Tensor) -> Tensor:
        """Returns the features [B, P, F] of images, without gradient."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)


class Gradients(Teacher):
    """Hand-made features of 2 x 2 cells per patch: mean colors and edge directions.

    Edge directions are histograms of 8 bins, as in HOG. Colors and edges each have at most unit
    length, so both count in a cosine. A small constant keeps a flat gray patch defined.
    """

    num_orientations = 8
    constant = 0.25
    softening = 0.05
    """Edges of this strength per patch count half. Patches below it are flat, and their noise must
    not be amplified."""

    def __init__(self, patch_size: int):
        super().__init__()
        if patch_size < 4 or patch_size % 2:
            raise ValueError(
                f"patch_size {patch_size} has no 2 x 2 cells: "
                "the gradients teacher needs an even one"
            )
        self.patch_size = patch_size
        self.dim = 4 * 3 + 4 * self.num_orientations + 1

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        pixels = to_unit_range(images)
        compute_patch_grid(pixels, self.patch_size)  # refuses images that patches do not tile
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            colors = self._average_cells(pixels - 0.5) / math.sqrt(3)  # 12 values within +-0.5
            edges = self._average_cells(self._compute_edges(pixels.mean(1)))
            edges = edges / (edges.norm(dim=2, keepdim=True) + self.softening)
            constant = colors.new_full((*colors.shape[:2], 1), self.constant)
            return torch.cat((colors, edges, constant), 2)

    def _compute_edges(self, gray: Tensor) -> Tensor:
        """Returns the edge strength [B, 8, H, W] per direction of gray images [B, H, W].

        Each pixel's strength is divided between the two nearest directions.
        """
        padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        angle = torch.atan2(dy, dx) * (self.num_orientations / math.pi)  # 180 degrees are 8
        bins = torch.arange(self.num_orientations, device=gray.device).view(1, -1, 1, 1)
        offset = (angle[:, None] - bins).remainder(self.num_orientations)
        distance = torch.minimum(offset, self.num_orientations - offset)
        return (1 - distance).clamp_min(0) * torch.hypot(dx, dy)[:, None]

    def _average_cells(self, maps: Tensor) -> Tensor:
        """Returns the means [B, P, C * 4] over the cells of maps [B, C, H, W]."""
        means = F.avg_pool2d(maps, self.patch_size // 2)
        return F.unfold(means, 2, stride=2).transpose(1, 2)


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


def resize_to_patch_size(pixels: Tensor, patch_size: int, new_patch_size: int) -> Tensor:
    """Resizes images so that patches of a new size make the same grid as those of `patch_size`."""
    if new_patch_size == patch_size:
        return pixels
    rows, columns = compute_patch_grid(pixels, patch_size)
    size = (rows * new_patch_size, columns * new_patch_size)
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


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
