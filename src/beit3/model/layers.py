"""The Multiway block (paper section 2.1, figure 2): attention over all tokens, then each expert.

Shapes: B samples, N tokens of a sequence, H heads, D width; parts as in layout.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.cache import LayerCache
from beit3.model.config import ModelConfig
from beit3.model.layout import Layout, Parts, concatenate, take
from beit3.model.multiway import Multiway, make_linear, make_norm


class Attention(nn.Module):
    """Softmax attention over all parts together; projections are per expert or shared."""

    def __init__(self, config: ModelConfig, experts: tuple[str, ...]):
        super().__init__()
        dim, shared = config.dim, config.shared_attention
        self.num_heads = config.num_heads
        self.qkv = make_linear(dim, 3 * dim, experts, shared=shared)
        self.norm = (
            make_norm(dim, config.norm_eps, experts, shared=shared) if config.sub_ln else None
        )
        self.out = make_linear(dim, dim, experts, shared=shared)

    def forward(
        self,
        parts: Parts,
        layout: Layout,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Parts:
        """Attends from all tokens, or from the selected ones, to all tokens.

        Args:
            parts: normed states, as `layout` holds them.
            layout: with a selection, only the selected tokens' outputs are computed and returned.
            mask: bool, broadcast to [B, H, queries, keys], True = may attend.
            cache: keys and values of earlier tokens, extended by this call's.
        """
        query, key, value = self.project(parts, layout)
        if layout.selection:
            rows = layout.selected_indices()
            query = take(query, rows, 2)  # [B, H, selected, D/H]
            if mask is not None and mask.shape[-2] > 1:
                mask = take(mask, rows, mask.ndim - 2)
            layout = layout.without_unselected()
        if cache is not None:
            key, value = cache.extend(key, value)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states.transpose(1, 2).flatten(2)  # [B, N or selected, D]
        parts = layout.unpad(states.split(layout.lengths, 1))
        if self.norm is not None:
            parts = self.norm(parts, layout.experts)
        return self.out(parts, layout.experts)

    def project(self, parts: Parts, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of all tokens, each [B, H, N, D/H]."""
        qkv = concatenate(layout.pad(self.qkv(parts, layout.experts)))  # [B, N, 3D]
        batch, length, _ = qkv.shape
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return query, key, value

    def compute_weights(self, parts: Parts, layout: Layout, mask: Tensor | None = None) -> Tensor:
        """Returns the fraction [B, H, N, N] of each value that goes into each output of a head.

        `forward` never forms it. The arguments are those of `forward`; rows sum to one.
        """
        query, key, _ = self.project(parts, layout)
        scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)


class FeedForward(nn.Module):
    """One expert: linear, exact GELU, optional sub-LN on the inner width, linear."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.norm = nn.LayerNorm(config.ffn_dim, eps=config.norm_eps) if config.sub_ln else None
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, states: Tensor) -> Tensor:
        """Maps states [B, n, D] -> [B, n, D]."""
        states = F.gelu(self.fc1(states))
        if self.norm is not None:
            states = self.norm(states)
        return self.fc2(states)


class Block(nn.Module):
    """A pre-norm residual block with stochastic depth."""

    def __init__(self, config: ModelConfig, layer: int, *, experts: tuple[str, ...] = ()):
        """Builds layer number `layer`, 0 the first, with all its experts or only those named."""
        super().__init__()
        experts = experts or config.experts_per_layer[layer]
        self.drop_path_rate = config.drop_path_rate * layer / max(1, config.depth - 1)
        self.norm1 = make_norm(config.dim, config.norm_eps, experts, shared=config.shared_norms)
        self.attention = Attention(config, experts)
        self.norm2 = make_norm(config.dim, config.norm_eps, experts, shared=False)
        self.ffn = Multiway(lambda: FeedForward(config), experts)

    def forward(
        self,
        parts: Parts,
        layout: Layout,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Parts:
        """Returns the block's output for all tokens, or for the selected ones; see `Attention`."""
        attended = self.attention(self.norm1(parts, layout.experts), layout, mask, cache)
        parts, layout = layout.keep_selected(parts)
        parts = self.add(parts, attended, layout)
        return self.add(parts, self.ffn(self.norm2(parts, layout.experts), layout.experts), layout)

    def add(self, parts: Parts, branch: Parts, layout: Layout) -> Parts:
        """Adds a residual branch; stochastic depth drops the whole branch of random samples.

        In training the branch is kept with probability 1 - drop_path_rate and scaled up by its
        inverse, in all parts of a sample alike.
        """
        if not self.training or self.drop_path_rate == 0:
            return tuple(part + change for part, change in zip(parts, branch, strict=True))
        keep_rate = 1 - self.drop_path_rate
        # torch.compile would turn the rate of bernoulli_ into a constant, one program per layer.
        uniform = torch.rand(
            layout.count_samples(parts), *[1] * (parts[0].ndim - 1), device=parts[0].device
        )
        scale = (uniform < keep_rate).to(parts[0].dtype) / keep_rate
        scales = layout.scale_per_part(parts, scale)
        return tuple(
            part + change * factor
            for part, change, factor in zip(parts, branch, scales, strict=True)
        )
