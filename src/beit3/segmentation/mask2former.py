"""transformers' parts of Mask2Former (arXiv:2112.01527), without their backbone and losses, and
with what they need.

Importing this file takes seconds: `head.py` does it when a head is built. Changed are:

- cross-attention keeps no matrix of weights, and one mask serves all its heads (B * heads * Q * h *
  w of float32 before);
- sine positions come from a function, not from a cache that all models of a process share;
- no parameter is a tensor of uninitialised memory when built on "meta";
- layers may be recomputed in the backward pass.

Parameters keep transformers' names. Features: four maps [B, D, h, w], each half as large as the one
before.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)

from beit3.segmentation.config import HeadConfig

LEVELS = 3
"""Maps that the pixel decoder's layers and the queries attend to: all but the largest."""

POINTS = 4
"""Of each head on each map, which transformers sets."""


def parts(
    dim: int, config: HeadConfig
) -> tuple[Mask2FormerPixelDecoder, Mask2FormerTransformerModule]:
    """Pixel decoder and query decoder for features of width `dim`."""
    theirs = Mask2FormerConfig(
        feature_size=config.hidden_dim,
        mask_feature_size=config.hidden_dim,
        hidden_dim=config.hidden_dim,
        num_attention_heads=config.num_heads,
        encoder_layers=config.encoder_layers,
        encoder_feedforward_dim=config.encoder_ffn,
        decoder_layers=config.decoder_layers + 1,
        dim_feedforward=config.decoder_ffn,
        num_queries=config.num_queries,
        dropout=0.0,
    )
    pixels, queries = (
        Mask2FormerPixelDecoder(theirs, [dim] * (LEVELS + 1)),
        Mask2FormerTransformerModule(config.hidden_dim, theirs),
    )
    pixels.level_embed = nn.Parameter(torch.empty(LEVELS, config.hidden_dim))
    for part, name in ((pixels, "position_embedding"), (queries, "position_embedder")):
        setattr(part, name, SinePositions(config.hidden_dim))
    queries.decoder.mask_predictor.num_heads = 1
    for layer in queries.decoder.layers:
        layer.cross_attn = CrossAttention(config.hidden_dim, config.num_heads)
    if config.checkpointing:
        for layer in (*pixels.encoder.layers, *queries.decoder.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return pixels, queries


class CrossAttention(nn.MultiheadAttention):
    """Queries [Q, B, D] to places [N, B, D] by a fused kernel, which never holds the weights [B,
    heads, Q, N]."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        key_padding_mask: None = None,
    ) -> tuple[Tensor, None]:
        """`attn_mask` [B, Q, N] bool, True = not attended to. There are no weights to return."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(states, weight, bias)
            .unflatten(-1, (self.num_heads, -1))
            .permute(1, 2, 0, 3)  # [B, heads, N, D / heads]
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=~attn_mask[:, None]
        )
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2)), None


class SinePositions(nn.Module):
    """Sines and cosines of the row, then of the column, as parts of a turn over the whole map: [B,
    D, h, w]."""

    TEMPERATURE = 10_000

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, mask: None = None
    ) -> Tensor:
        batch, _, height, width = shape
        pairs = torch.arange(self.dim // 4, device=device, dtype=dtype)
        periods = self.TEMPERATURE ** (4 * pairs / self.dim)
        rows, columns = (self.waves(side, periods) for side in (height, width))  # [side, D / 2]
        both = (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1))
        return torch.cat(both, -1).permute(2, 0, 1).expand(batch, -1, -1, -1)

    def waves(self, side: int, periods: Tensor) -> Tensor:
        """Sine and cosine by turns, [side, D / 2]."""
        turns = (
            torch.arange(1, side + 1, device=periods.device, dtype=periods.dtype)
            / (side + 1e-6)
            * (2 * math.pi)
        )
        angles = turns[:, None] / periods
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


def offsets(num_heads: int) -> Tensor:
    """Where deformable attention looks at first: each head in a direction of its own, each point
    one place further.

    The bias [heads * LEVELS * POINTS * 2] of `sampling_offsets` (Deformable DETR,
    arXiv:2010.04159).
    """
    angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the square
    steps = torch.arange(1, POINTS + 1).view(1, 1, -1, 1)
    return (directions[:, None, None] * steps).expand(-1, LEVELS, -1, -1).flatten()
