"""Reads the published weights of CLIP and DINO, and our directories of a converted CLIP teacher.

All functions return tensors under the names of `beit3.tokenizer.vit.ViT`, in float32, with CLIP's
projection [D, F] as `projection`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3 import tensor_files
from beit3.files import compute_sha256

FORMAT = 1
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"

CONTAINERS = ("state_dict", "model", "teacher")
"""Keys under which the teachers' trainers store the state dict of a checkpoint."""

Renames = tuple[tuple[str, str], ...]
"""(pattern, replacement), applied in this order."""

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

HUGGING_FACE_CLIP: Renames = (
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


# Names -------------------------------------------------------------------------------------------


def rename_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames CLIP's image tower, in OpenAI's, Hugging Face's or our names, to ours.

    Raises ValueError where there is no projection.
    """
    if "class_token" in state:
        tensors = dict(state)
    elif any(name.startswith("vision_model.") for name in state):
        own = _select(state, ("vision_model.", "visual_projection."))
        tensors = _merge_qkv(_rename(own, HUGGING_FACE_CLIP))
        if "projection" in tensors:
            tensors["projection"] = tensors["projection"].T.contiguous()
    else:
        tensors = _rename(_select(state, ("visual.",)), OPENAI_CLIP)
    if "class_token" in tensors:
        tensors["class_token"] = tensors["class_token"].reshape(1, 1, -1)
    if "positions" in tensors and tensors["positions"].ndim == 2:
        tensors["positions"] = tensors["positions"][None]
    if "projection" not in tensors:
        raise ValueError(
            "not a CLIP image tower: no tensor visual.proj or visual_projection.weight; "
            "give CLIP's own file"
        )
    return tensors


def rename_dino(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames DINO's Vision Transformer to our names, without its projection head."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return _rename(own, DINO)


def _select(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with one of `prefixes`."""
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def _rename(state: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """Returns the tensors in float32 under our names, without stored position numbers."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.float()
    return tensors


def _merge_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks Hugging Face's separate projections of query, key and value."""
    merged = dict(tensors)
    for query_name in tensors:
        if ".attention.q." not in query_name:
            continue
        names = [query_name.replace(".attention.q.", f".attention.{part}.") for part in "qkv"]
        if all(name in tensors for name in names):
            stacked_name = query_name.replace(".attention.q.", ".attention.qkv.")
            merged[stacked_name] = torch.cat([merged.pop(name) for name in names])
    return merged


# Files -------------------------------------------------------------------------------------------


def read_teacher(path: Path, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a teacher's file, under its own names, or directory, under ours.

    `name`: the teacher that a directory must hold, `clip`.
    """
    return _read_directory(path, name) if path.is_dir() else _read_file(path)


def write_teacher(tensors: Mapping[str, Tensor], directory: Path, name: str) -> None:
    """Fills an empty directory with tensors under our names, and their digest."""
    copies = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    tensor_files.write_tensors(copies, directory / MODEL_FILE)
    digest = compute_sha256(directory / MODEL_FILE)
    config = {"format": FORMAT, "teacher": name, "sha256": digest}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read_directory(directory: Path, name: str) -> dict[str, Tensor]:
    """Reads what `write_teacher` wrote; raises ValueError for anything else."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    expected = (FORMAT, name)
    if not isinstance(config, dict) or (config.get("format"), config.get("teacher")) != expected:
        raise ValueError(
            f"{directory} holds no {name} teacher: "
            "give its weight file, or a directory of beit3 convert clip"
        )
    path = directory / MODEL_FILE
    if not path.is_file() or compute_sha256(path) != config.get("sha256"):
        raise ValueError(
            f"{path} is not the file that {CONFIG_FILE} describes: "
            "convert it again with beit3 convert clip"
        )
    return load_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    """Returns the state dict in a weight file, without `backbone.` in front of its names."""
    if not path.is_file():
        raise ValueError(f"no teacher weights at {path}: give a .pt, .pth or .safetensors file")
    if tensor_files.is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive: convert it, "
            "torch.save(torch.jit.load(path).state_dict(), 'clip.pth')"
        )
    state = tensor_files.read_tensors(path, containers=CONTAINERS).tensors
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
