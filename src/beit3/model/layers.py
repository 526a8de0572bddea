"""The Multiway block: attention over the whole sequence, then each part's own expert (paper section 2.1, figure 2).

Sequences are tuples of parts (see multiway.py). Only queries, keys and values are concatenated, once per layer, for one
attention call over all N tokens; everything else works part by part.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.config import ModelConfig
from beit3.model.multiway import Multiway, Parts, Spans, linear, norm
from beit3.model.ragged import Ragged

SPARE = 64
"""Tokens for which a cache makes room at a time: growing by one copies everything."""

Read = tuple[tuple[int, ...], ...]
"""For each part the tokens, by place, whose states are wanted."""


@dataclass
class LayerCache:
    """Keys and values [B, H, K, D/H] of the tokens that one layer has seen, in buffers with room for more."""

    key: Tensor | None = None
    value: Tensor | None = None
    length: int = 0
    """K; what lies behind it in the buffers is room."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values and return all of them."""
        start, self.length = self.length, self.length + key.shape[2]
        if self.key is None or self.value is None or self.length > self.key.shape[2]:
            self.key, self.value = (
                self._grown(self.key, key, start),
                self._grown(self.value, value, start),
            )
        self.key[:, :, start : self.length], self.value[:, :, start : self.length] = key, value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]

    def _grown(self, buffer: Tensor | None, like: Tensor, start: int) -> Tensor:
        batch, heads, _, width = like.shape
        grown = like.new_empty(batch, heads, self.length + SPARE, width)
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start]
        return grown


@dataclass
class Cache:
    """Keys and values of a sequence that grows by text tokens: image and first words once, then a few words a call.

    The cache belongs to the caller, not to the network. It remembers whether its sequence is fused, because a later
    call brings text alone.
    """

    layers: list[LayerCache] = field(default_factory=list)
    fused: bool = False
    num_text: int = 0

    def drop_last(self, count: int) -> None:
        """Forget the last `count` text tokens (the [MASK] slots after each decoding step)."""
        self.num_text -= count
        for layer in self.layers:
            layer.length -= count


class Attention(nn.Module):
    """Joint softmax attention over all parts; projections per expert or shared."""

    def __init__(self, config: ModelConfig, experts: tuple[str, ...]):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = linear(config.dim, 3 * config.dim, experts, shared=config.shared_attention)
        self.norm = (
            norm(config.dim, config.norm_eps, experts, shared=config.shared_attention)
            if config.sub_ln
            else None
        )
        self.out = linear(config.dim, config.dim, experts, shared=config.shared_attention)

    def forward(
        self,
        parts: Parts,
        spans: Spans,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        read: Read | None = None,
        ragged: Ragged | None = None,
    ) -> Parts:
        """With `read`, of those tokens alone: they attend to all, and nothing more is computed for the others.

        With `ragged`, the last part holds real tokens alone, [1, T, D], before and after.
        """
        projected = self.qkv(parts, spans)
        qkv = joined(projected if ragged is None else ragged.padded(projected))  # [B, N, 3D]
        batch, length, width = qkv.shape
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(
            2, 0, 3, 1, 4
        )  # [B, H, N, D/H]
        if read is not None:
            rows = places(read, spans)
            query, spans = query[:, :, rows], reading(read, spans)  # [B, H, R, D/H]
            mask = mask[..., rows, :] if mask is not None and mask.shape[-2] > 1 else mask
        if cache is not None:
            key, value = cache.extend(key, value)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states.transpose(1, 2).reshape(batch, -1, width // 3)  # [B, N, D], or [B, R, D]
        parts = states.split([count for _, count in spans], 1)
        if ragged is not None:
            parts = ragged.flat(parts)
        if self.norm is not None:
            parts = self.norm(parts, spans)
        return self.out(parts, spans)


def joined(parts: Parts) -> Tensor:
    """One tensor [B, N, ...] of all parts; a part alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def places(read: Read, spans: Spans) -> list[int]:
    """Where the tokens that are read stand in the whole sequence."""
    starts = [sum(count for _, count in spans[:index]) for index in range(len(spans))]
    return [start + row for start, rows in zip(starts, read, strict=True) for row in rows]


def reading(read: Read, spans: Spans) -> Spans:
    """The spans of what is read."""
    return tuple((name, len(rows)) for rows, (name, _) in zip(read, spans, strict=True))


class FeedForward(nn.Module):
    """One expert: linear, exact GELU, optional sub-LN on the inner width, linear. [B, n, D] -> [B, n, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.norm = nn.LayerNorm(config.ffn_dim, eps=config.norm_eps) if config.sub_ln else None
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, states: Tensor) -> Tensor:
        states = F.gelu(self.fc1(states))
        if self.norm is not None:
            states = self.norm(states)
        return self.fc2(states)


class Block(nn.Module):
    """Pre-norm residual block; stochastic depth drops a sample's whole branch, in all parts alike."""

    def __init__(self, config: ModelConfig, layer: int, *, experts: tuple[str, ...] = ()):
        """`experts`: those to hold where it is not all that the config names for this layer."""
        super().__init__()
        experts = experts or config.experts(layer)
        self.drop_path_rate = config.drop_path_rate * layer / max(1, config.depth - 1)
        self.norm1 = norm(config.dim, config.norm_eps, experts, shared=config.shared_norms)
        self.attention = Attention(config, experts)
        self.norm2 = norm(config.dim, config.norm_eps, experts, shared=False)
        self.ffn = Multiway(lambda: FeedForward(config), experts)

    def forward(
        self,
        parts: Parts,
        spans: Spans,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        read: Read | None = None,
        ragged: Ragged | None = None,
    ) -> Parts:
        """The next states of all tokens, or with `read` of those. `ragged`: the last part is without its padding."""
        attended = self.attention(self.norm1(parts, spans), spans, mask, cache, read, ragged)
        if read is not None:
            parts = tuple(part[:, list(rows)] for part, rows in zip(parts, read, strict=True))
            spans = reading(read, spans)
        parts = self.add(parts, attended, ragged)
        return self.add(parts, self.ffn(self.norm2(parts, spans), spans), ragged)

    def add(self, parts: Parts, branch: Parts, ragged: Ragged | None = None) -> Parts:
        """The residual sum, with the branch dropped for a share of the samples and scaled up for the rest."""
        if not self.training or self.drop_path_rate == 0:
            return tuple(part + change for part, change in zip(parts, branch, strict=True))
        kept = 1 - self.drop_path_rate
        # A comparison, not bernoulli_: torch.compile would make a constant of its rate, and a program for every layer.
        samples = len(parts[0]) if ragged is None else len(ragged.sources)
        draws = torch.rand(samples, *[1] * (parts[0].ndim - 1), device=parts[0].device)
        scale = (draws < kept).to(parts[0].dtype) / kept
        scales = (
            [scale] * len(parts)
            if ragged is None
            else [scale] * (len(parts) - 1) + [ragged.per_token(scale)]
        )
        return tuple(
            part + change * each for part, change, each in zip(parts, branch, scales, strict=True)
        )
