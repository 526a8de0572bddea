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


@dataclass
class LayerCache:
    """Keys and values [B, H, K, D/H] of the tokens that one layer has seen."""

    key: Tensor | None = None
    value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values and return all of them."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value


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
        """Forget the last `count` text tokens (the [MASK] slot after each decoding step)."""
        self.num_text -= count
        self._apply(lambda states: states[:, :, : states.shape[2] - count])

    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index` [B'] in that order (beams)."""
        self._apply(lambda states: states.index_select(0, index))

    def _apply(self, change) -> None:
        for layer in self.layers:
            if layer.key is not None and layer.value is not None:
                layer.key, layer.value = change(layer.key), change(layer.value)


class Attention(nn.Module):
    """Joint softmax attention over all parts; projections per expert or shared."""

    def __init__(self, config: ModelConfig, experts: tuple[str, ...]):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = linear(config.dim, 3 * config.dim, experts, shared=config.shared_attention)
        self.norm = norm(config.dim, config.norm_eps, experts, shared=config.shared_attention) if config.sub_ln else None
        self.out = linear(config.dim, config.dim, experts, shared=config.shared_attention)

    def forward(self, parts: Parts, spans: Spans, mask: Tensor | None = None, cache: LayerCache | None = None) -> Parts:
        qkv = torch.cat(self.qkv(parts, spans), 1)  # [B, N, 3D]
        batch, length, width = qkv.shape
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, D/H]
        if cache is not None:
            key, value = cache.extend(key, value)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states.transpose(1, 2).reshape(batch, length, width // 3)  # [B, N, D]
        parts = states.split([count for _, count in spans], 1)
        if self.norm is not None:
            parts = self.norm(parts, spans)
        return self.out(parts, spans)


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

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        experts = config.experts(layer)
        self.drop_path_rate = config.drop_path_rate * layer / max(1, config.depth - 1)
        self.norm1 = norm(config.dim, config.norm_eps, experts, shared=config.shared_norms)
        self.attention = Attention(config, experts)
        self.norm2 = norm(config.dim, config.norm_eps, experts, shared=False)
        self.ffn = Multiway(lambda: FeedForward(config), experts)

    def forward(self, parts: Parts, spans: Spans, mask: Tensor | None = None, cache: LayerCache | None = None) -> Parts:
        parts = self.add(parts, self.attention(self.norm1(parts, spans), spans, mask, cache))
        return self.add(parts, self.ffn(self.norm2(parts, spans), spans))

    def add(self, parts: Parts, branch: Parts) -> Parts:
        """The residual sum, with the branch dropped for a share of the samples and scaled up for the rest."""
        if not self.training or self.drop_path_rate == 0:
            return tuple(part + change for part, change in zip(parts, branch, strict=True))
        kept = 1 - self.drop_path_rate
        # A comparison, not bernoulli_: torch.compile would make a constant of its rate, and a program for every layer.
        draws = torch.rand(parts[0].shape[0], 1, 1, device=parts[0].device)
        scale = (draws < kept).to(parts[0].dtype) / kept
        return tuple(part + change * scale for part, change in zip(parts, branch, strict=True))
