"""timm's BEiT-3 weights: the image half of the released networks, under timm's parameter names.

timm keeps the parameters of the image expert alone, stacks query, key and value as this package
does, and leaves out the mask token and the two rows of the position table that are never read.
Its models are `beit3_base_patch16_224`, `beit3_large_patch16_224` and `beit3_giant_patch14_*`; the
release never had the last.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.model.config import IMAGE_MODALITY, POSITION_OFFSET
from beit3.task import Task, load_task
from beit3.weights.adapt import add_names
from beit3.weights.matching import abbreviate, match_tensors
from beit3.weights.release_format import HEAD_SIZES, infer_task_config, translate

NUM_HEADS = {768: 12, 1024: 16, 1408: 16}
"""Width of timm's networks -> attention heads, which no shape tells."""

BLOCK_NAMES = {
    "norm1.": "self_attn_layer_norm.A.",
    "attn.norm.": "self_attn.inner_attn_ln.A.",
    "attn.proj.": "self_attn.out_proj.A.",
    "norm2.": "final_layer_norm.A.",
    "mlp.fc1.": "ffn.A.fc1.",
    "mlp.norm.": "ffn.A.ffn_layernorm.",
    "mlp.fc2.": "ffn.A.fc2.",
}
"""Prefix in a block of timm's -> prefix in a released layer."""

OTHER_NAMES = {
    "patch_embed.proj.": "beit3.vision_embed.proj.",
    "norm.": "beit3.encoder.layer_norm.A.",
    "head.": "head.",
    "fc_norm.": "fc_norm.",
}
"""Prefix outside of blocks -> released prefix."""

REQUIRED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.norm.weight")
"""Tensors that tell timm's BEiT-3 from its other vision transformers, which have no norm there."""


def is_timm(keys: Iterable[str]) -> bool:
    """Returns whether tensors have the names of timm's BEiT-3 networks."""
    return set(REQUIRED) <= set(keys)


def to_released_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames timm's tensors to those of a released file that holds the image side alone.

    Returns:
        The tensors, and for each tensor of timm's that was left out the reason.

    Raises:
        ValueError: These are no weights of timm's BEiT-3, or a tensor is unknown.
    """
    if not is_timm(state):
        missing = [name for name in REQUIRED if name not in state]
        raise ValueError(f"no weights of timm's BEiT-3: {abbreviate(missing)} missing")
    released: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, tensor in state.items():
        if name.startswith("fc_norm.") and "head.weight" not in state:
            left_out[name] = "the norm before a head, and there is no head"
        elif not (renamed := _rename(name, tensor)):
            raise ValueError(f"tensor {name} is none of timm's BEiT-3: give a file of that network")
        else:
            released |= renamed
    released["beit3.vision_embed.mask_token"] = torch.zeros_like(state["cls_token"])
    return released, left_out


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the released tensors that one of timm's becomes; none for an unknown name."""
    if name == "cls_token":
        return {"beit3.vision_embed.cls_token": tensor}
    if name == "pos_embed":
        unread = tensor.new_zeros(POSITION_OFFSET, tensor.shape[-1])
        return {"beit3.encoder.embed_positions.A.weight": torch.cat([unread, tensor[0]])}
    if name.startswith("blocks."):
        _, layer, rest = name.split(".", 2)
        return _rename_in_block(f"beit3.encoder.layers.{layer}.", rest, tensor)
    for prefix, released_prefix in OTHER_NAMES.items():
        if name.startswith(prefix):
            return {released_prefix + name.removeprefix(prefix): tensor}
    return {}


def _rename_in_block(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the released tensors of one in a block; query, key and value come apart."""
    if name.startswith("attn.qkv."):
        part = name.removeprefix("attn.qkv.")
        return {
            f"{layer}self_attn.{letter}_proj.A.{part}": rows
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True)
        }
    for prefix, released_prefix in BLOCK_NAMES.items():
        if name.startswith(prefix):
            return {layer + released_prefix + name.removeprefix(prefix): tensor}
    return {}


def build_task(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, classes: tuple[str, ...] = ()
) -> tuple[Task, dict[str, Tensor], dict[str, str]]:
    """Builds the task of timm's weights: `imagenet` where they have a head, else `backbone`.

    Its network reads images alone.

    Returns:
        The task, untouched; its tensors, by name; and what was left out, with reasons.

    Raises:
        ValueError: These are other weights, or the number of classes is not the head's.
    """
    released, left_out = to_released_names(state)
    task_class = load_task("imagenet" if "head.weight" in released else "backbone")
    width = released["beit3.vision_embed.cls_token"].shape[-1]
    config: Any = infer_task_config(released, task_class, num_heads or NUM_HEADS.get(width))
    config = replace(config, model=replace(config.model, modalities=(IMAGE_MODALITY,)))
    fixed = {field: len(released[key]) for field, key in HEAD_SIZES.items() if key in released}
    config = add_names(config, task_class, classes=classes, fixed=fixed)
    task = task_class(config)
    tensors, ignored, label = translate(released, task)
    values, fresh = match_tensors(task, tensors, exact=True, label=label)
    if fresh:
        raise ValueError(f"{len(fresh)} tensors are missing: {abbreviate(map(label, fresh))}")
    return task, values, left_out | ignored


def find_model_file(path: Path) -> Path:
    """Returns the file of a folder as the hub has timm's, or the file itself."""
    return path / "model.safetensors" if path.is_dir() else path
