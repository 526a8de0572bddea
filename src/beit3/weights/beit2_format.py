"""Translates the published visual tokenizers of BEiT v2 (VQ-KD) to our names.

All sizes are read from the shapes of the tensors. Tensors that only their training used (teacher,
losses, pixel scaling, statistics of the codebook) are dropped; any other name that ours lacks is
refused.
"""

import re
from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig

TRAINING_ONLY = re.compile(
    r"loss|teacher|scaling"
    r"|quantize\.cluster_size$"
    r"|quantize\.embedding\.(cluster_size|embed_avg|initted)$"
)
"""Names that are dropped. The pattern matches from a name's start, as upstream's loader does."""

RENAMES = (
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
"""(pattern, replacement), applied in this order."""

SIZE_TENSORS = {
    "encoder.patch.weight": 4,
    "encoder.positions": 3,
    "encoder.blocks.0.ffn.fc1.weight": 2,
    "quantizer.codebook": 2,
    "to_feature.2.weight": 2,
}
"""Our names of the tensors that give the sizes -> their number of dimensions."""


def read_vqkd(
    state: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[VisualTokenizerConfig, dict[str, Tensor]]:
    """Returns the config and the complete float32 state dict of `VisualTokenizer`.

    Args:
        state: The tensors of a published tokenizer under its own names.
        num_heads: Number of attention heads, which no shape tells. By default one per 64 channels,
            as published.

    Raises:
        ValueError: Tensors are missing, unknown or of another shape than the rest implies.
    """
    published_names = {_rename(name): name for name in state if not TRAINING_ONLY.match(name)}
    tensors = {name: state[published].float() for name, published in published_names.items()}
    config = _infer_config(tensors, num_heads)
    with torch.device("meta"):
        expected = VisualTokenizer(config).state_dict()
    statistics = {name for name in expected if name.startswith("quantizer.")}
    statistics.remove("quantizer.codebook")
    unknown = [
        published
        for name, published in published_names.items()
        if name not in expected or name in statistics
    ]
    if unknown:
        raise ValueError(f"not a VQ-KD tokenizer: unknown tensors {', '.join(sorted(unknown))}")
    missing = sorted(expected.keys() - tensors.keys() - statistics)
    if missing:
        raise ValueError(f"incomplete VQ-KD tokenizer: no tensors for {', '.join(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{published_names[name]} has shape {list(tensor.shape)}, "
                f"not {list(expected[name].shape)}"
            )
    for name in statistics:
        tensors[name] = torch.zeros(expected[name].shape, dtype=expected[name].dtype)
    tensors["quantizer.started"] = torch.tensor(True)
    return config, tensors


def _rename(name: str) -> str:
    """Returns our name of a published tensor."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _infer_config(tensors: Mapping[str, Tensor], num_heads: int | None) -> VisualTokenizerConfig:
    """Returns the config that the shapes imply; ValueError where one of `SIZE_TENSORS` is unfit."""
    for name, rank in SIZE_TENSORS.items():
        if name not in tensors or tensors[name].ndim != rank:
            raise ValueError(f"not a VQ-KD tokenizer: no tensor of {rank} dimensions for {name}")
    dim, _, patch_size, _ = tensors["encoder.patch.weight"].shape
    if num_heads is None and dim % 64:
        raise ValueError(f"width {dim} is not a multiple of 64: give num_heads")
    num_codes, code_dim = tensors["quantizer.codebook"].shape
    return VisualTokenizerConfig(
        image_size=isqrt(tensors["encoder.positions"].shape[1] - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        depth=_count_blocks(tensors, "encoder"),
        num_heads=num_heads or dim // 64,
        ffn_dim=len(tensors["encoder.blocks.0.ffn.fc1.weight"]),
        decoder_depth=_count_blocks(tensors, "decoder"),
        code_dim=code_dim,
        num_codes=num_codes,
        teacher_dim=len(tensors["to_feature.2.weight"]),
    )


def _count_blocks(tensors: Mapping[str, Tensor], part: str) -> int:
    """Returns one more than the highest block, so that a gap shows as missing tensors."""
    blocks = [int(name.split(".")[2]) for name in tensors if name.startswith(f"{part}.blocks.")]
    return 1 + max(blocks, default=-1)
