"""The frozen teachers whose patch features the visual tokenizer learns to predict (BEiT v2, section 3.1).

Shapes: images [B, 3, H, W], pixels in [0, 1] or uint8 -> features [B, P, F], float32, on the tokenizer's grid of
patches, row-major. CLIP and DINO are read from a local file, CLIP also from a directory of `save_clip`; `Gradients`
needs none and is the embedded default.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from hashlib import file_digest
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit3.tokenizer.vit import ViT, ViTConfig, patch_grid, unit_pixels

CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

TeacherName = Literal["gradients", "clip", "dino"]


def load_teacher(
    name: TeacherName, *, path: Path | str | None = None, patch_size: int
) -> "Teacher":
    """The teacher of this name for a tokenizer of `patch_size`; `path`: the weights of CLIP and DINO, a file or directory.

    ValueError for an unknown name, or a file that is missing, unreadable or of another network.
    """
    if name == "gradients":
        return Gradients(patch_size)
    if name not in ("clip", "dino"):
        raise ValueError(f"unknown teacher {name!r}: choose gradients, clip or dino")
    if path is None:
        raise ValueError(
            f"teacher {name!r} has no weights: give the path of its .pt, .pth or .safetensors file"
        )
    state = _read_directory(Path(path), name) if Path(path).is_dir() else _read(Path(path))
    return (
        CLIPTeacher(state, patch_size=patch_size)
        if name == "clip"
        else DINOTeacher(state, patch_size=patch_size)
    )


class Teacher(nn.Module):
    """Frozen and always in eval mode. `dim` is F."""

    dim: int

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, P, F], without gradient."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)


class Gradients(Teacher):
    """Hand-made features of 2 x 2 cells a patch: their mean colours, and histograms of 8 edge directions (as in HOG).

    Both groups have length at most one, so both count in a cosine; a small constant keeps a flat grey patch defined.
    """

    orientations = 8
    constant = 0.25
    softening = 0.05
    """Edges of this strength a patch count half; below it lie flat patches, whose noise must not be blown up."""

    def __init__(self, patch_size: int):
        super().__init__()
        if patch_size < 4 or patch_size % 2:
            raise ValueError(
                f"patch_size {patch_size} has no 2 x 2 cells: the gradients teacher needs an even one"
            )
        self.patch_size = patch_size
        self.dim = 4 * 3 + 4 * self.orientations + 1

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = unit_pixels(images)
        patch_grid(pixels, self.patch_size)
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            colors = self._cells(pixels - 0.5) / math.sqrt(3)  # 12 values within +-0.5
            edges = self._cells(self._directed(pixels.mean(1)))
            edges = edges / (edges.norm(dim=2, keepdim=True) + self.softening)
            return torch.cat(
                (colors, edges, colors.new_full((*colors.shape[:2], 1), self.constant)), 2
            )

    def _directed(self, gray: Tensor) -> Tensor:
        """[B, H, W] -> [B, 8, H, W]: strength of the edge at each pixel, shared by the two nearest directions."""
        padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        angle = torch.atan2(down, across) * (
            self.orientations / math.pi
        )  # one turn by 180 degrees is 8
        bins = torch.arange(self.orientations, device=gray.device).view(1, -1, 1, 1)
        offset = (angle[:, None] - bins).remainder(self.orientations)
        weight = (1 - torch.minimum(offset, self.orientations - offset)).clamp_min(0)
        return weight * torch.hypot(across, down)[:, None]

    def _cells(self, maps: Tensor) -> Tensor:
        """Means of the cells, [B, C, H, W] -> [B, P, C * 4]."""
        means = F.avg_pool2d(maps, self.patch_size // 2)
        return F.unfold(means, 2, stride=2).transpose(1, 2)


def resized(pixels: Tensor, patch_size: int, own: int) -> Tensor:
    """Images whose patches of `own` pixels make the grid that patches of `patch_size` make of the given ones."""
    if own == patch_size:
        return pixels
    rows, columns = patch_grid(pixels, patch_size)
    return F.interpolate(
        pixels, size=(rows * own, columns * own), mode="bicubic", antialias=True
    ).clamp(0, 1)


class ViTTeacher(Teacher):
    """Normed patch tokens of a Vision Transformer, projected if it has a projection.

    Where its patches are not the tokenizer's, images are resized so that both have the same grid.
    """

    def __init__(
        self,
        vit: ViT,
        projection: Tensor | None,
        *,
        pixels: tuple[tuple[float, ...], ...],
        patch_size: int,
    ):
        super().__init__()
        self.vit, self.patch_size = vit, patch_size
        self.projection = None if projection is None else nn.Parameter(projection)  # [D, F]
        self.dim = vit.config.dim if projection is None else projection.shape[1]
        self.register_buffer("mean", torch.tensor(pixels[0]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(pixels[1]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = resized(unit_pixels(images), self.patch_size, self.vit.config.patch_size)
        states = self.vit((pixels - self.mean) / self.deviation)[:, 1:]
        return (states if self.projection is None else states @ self.projection).float()


class CLIPTeacher(ViTTeacher):
    """CLIP's image tower, in OpenAI's names (`visual.*`), Hugging Face's (`vision_model.*`) or ours: ln_post, projection."""

    def __init__(self, state: Mapping[str, Tensor], *, patch_size: int):
        if "class_token" in state:
            tensors = dict(state)
        elif any(name.startswith("vision_model.") for name in state):
            tensors = _merged_qkv(
                _renamed(state, HF_CLIP, keep=("vision_model.", "visual_projection."))
            )
            if "projection" in tensors:
                tensors["projection"] = tensors["projection"].T.contiguous()
        else:
            tensors = _renamed(state, OPENAI_CLIP, keep=("visual.",))
        for name in ("class_token", "positions"):
            if name in tensors:
                tensors[name] = tensors[name][(None,) * (3 - tensors[name].ndim)]
        if "projection" not in tensors:
            raise ValueError(
                "not a CLIP image tower: no tensor visual.proj or visual_projection.weight; give CLIP's own file"
            )
        projection = tensors.pop("projection")
        super().__init__(
            _build(tensors, "clip", 1e-5), projection, pixels=CLIP_PIXELS, patch_size=patch_size
        )


class DINOTeacher(ViTTeacher):
    """DINO's ViT in the names of facebookresearch/dino; its projection head is left out."""

    def __init__(self, state: Mapping[str, Tensor], *, patch_size: int):
        tensors = _renamed(
            {name: tensor for name, tensor in state.items() if not name.startswith("head.")}, DINO
        )
        super().__init__(
            _build(tensors, "dino", 1e-6), None, pixels=IMAGENET_PIXELS, patch_size=patch_size
        )


class BackboneTeacher(Teacher):
    """A trained BEiT-3: called as `backbone(image=...)`, its `.of("image")` [B, 1 + P, D] without the class token.

    The backbone itself is frozen, not a copy; its width is `backbone.config.dim`. It sees pixels in [-1, 1], resized
    where its patches are not the tokenizer's.
    """

    def __init__(self, backbone: nn.Module, *, patch_size: int):
        super().__init__()
        self.backbone, self.patch_size = backbone.requires_grad_(False), patch_size
        self.own_patch = int(backbone.config.patch_size)  # type: ignore[union-attr, arg-type]
        self.dim = int(backbone.config.dim)  # type: ignore[union-attr, arg-type]
        self.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = resized(unit_pixels(images), self.patch_size, self.own_patch)
        return self.backbone(image=pixels * 2 - 1).of("image")[:, 1:].float()


Renames = tuple[tuple[str, str], ...]

OPENAI_CLIP: Renames = (
    (r"^visual\.", ""),
    (r"^class_embedding$", "class_token"),
    (r"^positional_embedding$", "positions"),
    (r"^conv1\.", "patch."),
    (r"^proj$", "projection"),
    (r"^ln_pre\.", "pre_norm."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attention.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.c_fc\.", ".ffn.fc1."),
    (r"\.mlp\.c_proj\.", ".ffn.fc2."),
)

HF_CLIP: Renames = (
    (r"^vision_model\.", ""),
    (r"^visual_projection\.weight$", "projection"),
    (r"^embeddings\.class_embedding$", "class_token"),
    (r"^embeddings\.position_embedding\.weight$", "positions"),
    (r"^embeddings\.patch_embedding\.", "patch."),
    (r"^pre_layrnorm\.", "pre_norm."),  # the misspelling is theirs
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
    (r"\.self_attn\.([qkv])_proj\.", r".attention.\1."),
    (r"\.mlp\.", ".ffn."),
)

DINO: Renames = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "patch."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.", ".ffn."),
)


def save_clip(teacher: CLIPTeacher, directory: Path) -> None:
    """Fill an empty `directory` with what `load_teacher` reads: the tensors under our names, and their digest."""
    assert teacher.projection is not None
    tensors = teacher.vit.state_dict() | {"projection": teacher.projection.detach()}
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        directory / MODEL,
    )
    about = {"format": FORMAT, "teacher": "clip", "sha256": _digest(directory / MODEL)}
    (directory / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


FORMAT = 1
MODEL, CONFIG = "model.safetensors", "config.json"


def _read_directory(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a directory that `save_clip` filled, under our names; ValueError for anything else."""
    path = directory / CONFIG
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or (about.get("format"), about.get("teacher")) != (FORMAT, name):
        raise ValueError(
            f"{directory} holds no {name} teacher: give its weight file, or a directory of beit3 convert clip"
        )
    if not (directory / MODEL).is_file() or _digest(directory / MODEL) != about.get("sha256"):
        raise ValueError(
            f"{directory / MODEL} is not the file that {CONFIG} describes: convert it again with beit3 convert clip"
        )
    return load_file(directory / MODEL)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a weight file, without the usual wrappings."""
    if not path.is_file():
        raise ValueError(f"no teacher weights at {path}: give a .pt, .pth or .safetensors file")
    state: object
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except SafetensorError:
            raise ValueError(f"{path} is not a whole safetensors file: download it again") from None
    elif is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive: convert it, torch.save(torch.jit.load(path).state_dict(), 'clip.pth')"
        )
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is not a file of plain tensors: save the network's state_dict() alone"
            ) from error
    for wrapping in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapping), Mapping):
            state = state[wrapping]
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not a state dict: save the network's state_dict()"
        )
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {
        re.sub(r"^(module\.)?(backbone\.)?", "", name): value for name, value in tensors.items()
    }


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which only running it would open; OpenAI's CLIP files are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _renamed(
    state: Mapping[str, Tensor], names: Renames, *, keep: Iterable[str] = ("",)
) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `keep`, in float32, under our names; saved position numbers go."""
    tensors = {}
    for name, tensor in state.items():
        if not name.startswith(tuple(keep)) or name.endswith("position_ids"):
            continue
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        tensors[name] = tensor.float()
    return tensors


def _merged_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's three projections as one."""
    merged = dict(tensors)
    for name in tensors:
        if ".attention.q." in name:
            trio = [name.replace(".attention.q.", f".attention.{part}.") for part in "qkv"]
            if all(part in tensors for part in trio):
                joined = name.replace(".attention.q.", ".attention.qkv.")
                merged[joined] = torch.cat([merged.pop(part) for part in trio])
    return merged


def _build(tensors: dict[str, Tensor], style: Literal["dino", "clip"], ln_eps: float) -> ViT:
    """The network of these tensors, 64 units a head as all published ones. ValueError names what does not fit."""
    for name, rank in (("patch.weight", 4), ("positions", 3), ("blocks.0.ffn.fc1.weight", 2)):
        if name not in tensors or tensors[name].ndim != rank:
            raise ValueError(
                f"not a {style.upper()} Vision Transformer: no tensor of {rank} dimensions for {name}"
            )
    dim, _, patch, _ = tensors["patch.weight"].shape
    if dim % 64:
        raise ValueError(
            f"the {style.upper()} network is {dim} wide, not a multiple of 64 units a head"
        )
    config = ViTConfig(
        image_size=isqrt(tensors["positions"].shape[1] - 1) * patch,
        patch_size=patch,
        dim=dim,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=dim // 64,
        ffn_dim=len(tensors["blocks.0.ffn.fc1.weight"]),
        ln_eps=ln_eps,
        style=style,
    )
    with torch.device("meta"):
        vit = ViT(config)
    expected = {name: value.shape for name, value in vit.state_dict().items()}
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if _shape(tensors, name) != expected.get(name)
    )
    if wrong:
        raise ValueError(
            f"not a {style.upper()} Vision Transformer: missing, unknown or misshapen {', '.join(wrong)}"
        )
    vit.load_state_dict(tensors, assign=True)
    return vit


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
