"""BEiT v2's published visual tokenizers: their state dict -> ours.

All sizes are read from the tensors' shapes. What only their training used (teacher, losses, pixel scaling, bookkeeping
of the codebook) is dropped; any other name that ours lacks is refused.
"""

import re
from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig

DROPPED = re.compile(
    r"loss|teacher|scaling|quantize\.cluster_size$|quantize\.embedding\.(cluster_size|embed_avg|initted)$"
)
"""Matched from the beginning of a name, as the official loader does."""

RENAMED = (
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^encode_task_layer\.", "to_code."),
    (r"^decode_task_layer\.", "to_feature."),
    (r"\.cls_token$", ".class_token"),
    (r"\.pos_embed$", ".positions"),
    (r"\.patch_embed\.proj\.", ".patch."),
    (r"\.fc_norm\.", ".norm."),
    (r"\.attn\.q_bias$", ".attention.query_bias"),
    (r"\.attn\.v_bias$", ".attention.value_bias"),
    (r"\.attn\.qkv\.weight$", ".attention.qkv.weight"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.", ".ffn."),
)


def read_vqkd(
    state: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[VisualTokenizerConfig, dict[str, Tensor]]:
    """An official tokenizer's tensors -> (config, complete state dict of `VisualTokenizer`, in float32).

    num_heads: shapes do not tell it; by default 64 units a head, as published. ValueError names tensors that are
    missing, unknown or of another shape than the rest implies.
    """
    given = {
        _rename(name): (name, tensor) for name, tensor in state.items() if not DROPPED.match(name)
    }
    tensors = {name: tensor.float() for name, (_, tensor) in given.items()}
    config = _sizes(tensors, num_heads)
    with torch.device("meta"):
        expected = VisualTokenizer(config).state_dict()
    bookkeeping = {name for name in expected if name.startswith("quantizer.")} - {
        "quantizer.codebook"
    }
    unknown = [
        original
        for name, (original, _) in given.items()
        if name not in expected or name in bookkeeping
    ]
    if unknown:
        raise ValueError(f"not a VQ-KD tokenizer: unknown tensors {', '.join(sorted(unknown))}")
    missing = sorted(expected.keys() - tensors.keys() - bookkeeping)
    if missing:
        raise ValueError(f"incomplete VQ-KD tokenizer: no tensors for {', '.join(missing)}")
    for name, (original, tensor) in given.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{original} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
            )
    for name in bookkeeping:
        tensors[name] = torch.zeros(expected[name].shape, dtype=expected[name].dtype)
    tensors["quantizer.started"] = torch.tensor(True)
    return config, tensors


def _rename(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def _sizes(tensors: Mapping[str, Tensor], num_heads: int | None) -> VisualTokenizerConfig:
    """The config that the shapes imply. ValueError where a tensor that gives a size is missing or of another rank."""
    ranks = {
        "encoder.patch.weight": 4,
        "encoder.positions": 3,
        "encoder.blocks.0.ffn.fc1.weight": 2,
        "quantizer.codebook": 2,
        "to_feature.2.weight": 2,
    }
    for name, rank in ranks.items():
        if name not in tensors or tensors[name].ndim != rank:
            raise ValueError(f"not a VQ-KD tokenizer: no tensor of {rank} dimensions for {name}")
    dim, _, patch_size, _ = tensors["encoder.patch.weight"].shape
    if num_heads is None and dim % 64:
        raise ValueError(f"width {dim} is not a multiple of 64: give num_heads")
    return VisualTokenizerConfig(
        image_size=isqrt(tensors["encoder.positions"].shape[1] - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        depth=_depth(tensors, "encoder"),
        num_heads=num_heads or dim // 64,
        ffn_dim=len(tensors["encoder.blocks.0.ffn.fc1.weight"]),
        decoder_depth=_depth(tensors, "decoder"),
        code_dim=tensors["quantizer.codebook"].shape[1],
        num_codes=tensors["quantizer.codebook"].shape[0],
        teacher_dim=len(tensors["to_feature.2.weight"]),
    )


def _depth(tensors: Mapping[str, Tensor], part: str) -> int:
    """One more than the highest block, so that a gap shows as missing tensors."""
    return 1 + max(
        (int(name.split(".")[2]) for name in tensors if name.startswith(f"{part}.blocks.")),
        default=-1,
    )
