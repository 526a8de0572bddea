"""Mask2Former's pixel decoder and query decoder (arXiv:2112.01527), taken from transformers without
its backbone and losses.

Importing this file takes seconds, so `head.py` imports it when a head is built. It changes:

- Cross-attention does not store its matrix of weights, and one mask serves all its heads. Before,
  that took B * heads * Q * h * w numbers of float32.
- Sine positions come from a function, not from a cache shared by all models of a process, and are
  computed in float32.
- No parameter is a tensor of uninitialized memory when built on "meta".
- Layers may be recomputed in the backward pass.

Parameters keep transformers' names. Features are four maps [B, D, h, w], each half as large as the
one before.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

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

NUM_LEVELS = 3
"""Maps that the pixel decoder's layers and the queries attend to: all but the largest."""

NUM_POINTS = 4
"""Sampling points of each head on each map; transformers has it fixed."""


def build_decoders(
    dim: int, config: HeadConfig
) -> tuple[Mask2FormerPixelDecoder, Mask2FormerTransformerModule]:
    """Builds pixel decoder and query decoder for features of width `dim`."""
    settings = Mask2FormerConfig(
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
    pixel_decoder = Mask2FormerPixelDecoder(settings, [dim] * (NUM_LEVELS + 1))
    query_decoder = Mask2FormerTransformerModule(config.hidden_dim, settings)
    pixel_decoder.level_embed = nn.Parameter(torch.zeros(NUM_LEVELS, config.hidden_dim))
    # Called alike, but of another class than transformers declares.
    positions: Any = SinePositions(config.hidden_dim), SinePositions(config.hidden_dim)
    pixel_decoder.position_embedding, query_decoder.position_embedder = positions
    query_decoder.decoder.mask_predictor.num_heads = 1
    for layer in query_decoder.decoder.layers:
        layer.cross_attn = CrossAttention(config.hidden_dim, config.num_heads)
    if config.checkpointing:
        for layer in (*pixel_decoder.encoder.layers, *query_decoder.decoder.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return pixel_decoder, query_decoder


class CrossAttention(nn.MultiheadAttention):
    """Attends from queries [Q, B, D] to features [N, B, D] by a fused kernel, which never stores
    the weights [B, heads, Q, N]."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        key_padding_mask: None = None,
    ) -> tuple[Tensor, None]:
        """Returns the attended values and None in place of the weights.

        Args:
            query: [Q, B, D].
            key: [N, B, D].
            value: [N, B, D].
            attn_mask: Bool [B, Q, N], True = not attended to.
            key_padding_mask: Unused; transformers passes it.
        """
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
    """Computes sine and cosine embeddings [B, D, h, w] of the row, then of the column.

    Positions are angles; the whole height or width of a map is one full turn.
    """

    TEMPERATURE = 10_000

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, mask: None = None
    ) -> Tensor:
        batch_size, _, height, width = shape
        precise_dtype = torch.promote_types(dtype, torch.float32)
        frequency_indices = torch.arange(self.dim // 4, device=device, dtype=precise_dtype)
        periods = self.TEMPERATURE ** (4 * frequency_indices / self.dim)
        rows = self.embed_positions(height, periods)[:, None].expand(-1, width, -1)
        columns = self.embed_positions(width, periods)[None].expand(height, -1, -1)
        embeddings = torch.cat((rows, columns), -1).permute(2, 0, 1).to(dtype)
        return embeddings.expand(batch_size, -1, -1, -1)

    def embed_positions(self, side: int, periods: Tensor) -> Tensor:
        """Returns sines and cosines, interleaved, of all positions of a side: [side, D / 2]."""
        positions = torch.arange(1, side + 1, device=periods.device, dtype=periods.dtype)
        turns = positions / (side + 1e-6) * (2 * math.pi)
        angles = turns[:, None] / periods
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


def make_initial_offsets(num_heads: int) -> Tensor:
    """Returns the initial bias of `sampling_offsets`, [heads * NUM_LEVELS * NUM_POINTS * 2].

    Each head looks in a direction of its own, and each of its points lies one cell further
    (Deformable DETR, arXiv:2010.04159).
    """
    angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the unit square
    distances = torch.arange(1, NUM_POINTS + 1).view(1, 1, -1, 1)
    return (directions[:, None, None] * distances).expand(-1, NUM_LEVELS, -1, -1).flatten()
