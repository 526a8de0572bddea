"""BEiT-3's backbone (paper section 2.1): images, texts or both -> token states.

One call covers every use of the paper's figure 3: an image alone (vision encoder), a text alone (language encoder), both
in two calls (dual encoder), both in one call (fusion encoder), and both with `attention_mask.image_to_text` (image to
text). Whether a sequence is fused is decided here, once per call.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.attention_mask import joint, visible_keys
from beit3.model.backbone import Backbone
from beit3.model.config import FUSION, IMAGE, TEXT, ModelConfig
from beit3.model.embeddings import ImageEmbedding, TextEmbedding
from beit3.model.layers import Block, Cache, LayerCache, Read, reading
from beit3.model.multiway import Parts, Spans, norm
from beit3.model.ragged import Ragged


@dataclass(frozen=True)
class Encoded:
    """Token states of one call, part by part in the order image, text; where the call reads some alone, of those."""

    parts: Parts
    spans: Spans

    @property
    def tokens(self) -> Tensor:
        """All states [B, N, D]."""
        return torch.cat(self.parts, 1)

    def of(self, modality: str) -> Tensor:
        """States [B, n, D] of `"image"` (class token first) or `"text"`."""
        for part, (name, _) in zip(self.parts, self.spans, strict=True):
            if name == modality:
                return part
        raise ValueError(
            f"no {modality} in this input: it holds {[name for name, _ in self.spans]}"
        )

    def first(self, modality: str) -> Tensor:
        """The first state [B, D] of a modality: the class token's, or that of the text's begin mark."""
        return self.of(modality)[:, 0]


class BEiT3(Backbone):
    """The Multiway Transformer.

    Parameters are named `image_embedding.*`, `text_embedding.*`, `blocks.{i}.{norm1,attention,norm2,ffn}.*`, `norm.*`;
    a copy per modality is a child named `image`, `text` or `fusion`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.image_embedding = ImageEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        experts = config.experts(config.depth - 1)
        self.norm = (
            norm(config.dim, config.norm_eps, experts, shared=config.shared_norms)
            if config.final_norm
            else None
        )

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        text_padding: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_places: Tensor | None = None,
        cache: Cache | None = None,
        read: Literal["all", "real", "first", "last"] = "all",
    ) -> Encoded:
        """Encode `image` [B, 3, H, W] and/or `text` [B, L] int64.

        image_mask [B, P] bool, True = the patch is hidden. text_padding [B, L] bool, True = padding.
        attention_mask [N, K] or [B, 1, N, K] bool, True = may attend; K counts the cached tokens too.
        text_places [L] int64: the tokens' places in their text; by default one after the other, behind what a cache holds.
        With a cache, this call's tokens come after those that it holds; padding is then not allowed.
        read: whose states are wanted: of all tokens, of all but the padding, or of each modality's first or last. Nothing is
        computed for padding unless all are; its states then mean nothing. The last layer leaves out all that is not wanted.
        Raises ValueError for no input, a text beyond the position table, or an image that patches do not tile.
        """
        if text_padding is not None:
            text_padding = text_padding.bool()
            if cache is not None:
                raise ValueError("text_padding cannot be combined with a cache: leave padding out")
            if text is None:
                raise ValueError("text_padding without text: give both or neither")
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        parts, spans = self.embed(image, text, image_mask, text_padding, text_places, cache)
        keys = (
            None
            if text_padding is None
            else visible_keys(sum(n for name, n in spans if name == IMAGE), text_padding)
        )
        mask = joint(attention_mask, keys)
        layers: list[LayerCache] | list[None] = (
            cache.layers if cache is not None else [None] * len(self.blocks)
        )
        fused = len(spans) == 2 or (cache is not None and cache.fused)

        first_fusion, last = self.config.depth - self.config.fusion_layers, self.config.depth - 1
        route, end = spans, spans
        ragged = None if text_padding is None or read == "all" else Ragged.of(text_padding)
        if ragged is not None:
            parts = ragged.flat(parts)
        for index, (block, layer_cache) in enumerate(zip(self.blocks, layers, strict=True)):
            if fused and index == first_fusion:
                parts, ragged = fuse(parts, text_padding, ragged)
                route = ((FUSION, sum(count for _, count in spans)),)
            wanted = (
                rows_read(read, spans, route)
                if index == last and (read == "first" or read == "last")
                else None
            )
            if wanted is not None and ragged is not None:
                parts, ragged = ragged.padded(parts), None
            parts = block(parts, route, mask, layer_cache, wanted, ragged)
            if wanted is not None:
                route, end = reading(wanted, route), tuple((name, 1) for name, _ in spans)
        if self.norm is not None:
            parts = self.norm(parts, route)
        if ragged is not None:
            parts = ragged.padded(parts)
        if len(parts) != len(end):
            parts = parts[0].split([count for _, count in end], 1)
        return Encoded(parts, end)

    def embed(
        self,
        image: Tensor | None,
        text: Tensor | None,
        image_mask: Tensor | None,
        text_padding: Tensor | None,
        text_places: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Parts, Spans]:
        """The input of the first block, and a cache made ready for it."""
        parts: Parts = ()
        spans: Spans = ()
        if cache is not None and not cache.layers:
            cache.layers.extend(LayerCache() for _ in self.blocks)
            cache.fused = image is not None and text is not None
        if image is not None:
            parts = (self.image_embedding(image, image_mask),)
            spans = ((IMAGE, parts[0].shape[1]),)
        if text is not None:
            start = 0 if cache is None else cache.num_text
            parts += (self.text_embedding(text, text_padding, start=start, places=text_places),)
            spans += ((TEXT, text.shape[1]),)
            if cache is not None:
                cache.num_text += text.shape[1]
        if not parts:
            raise ValueError("nothing to encode: give image, text or both")
        return parts, spans


def fuse(
    parts: Parts, text_padding: Tensor | None, ragged: Ragged | None
) -> tuple[Parts, Ragged | None]:
    """Image and text as one part; without the padding if the text came without it."""
    if ragged is None or text_padding is None:
        return (torch.cat(parts, 1),), None
    whole = Ragged.of(F.pad(text_padding, (parts[0].shape[1], 0)))
    assert whole is not None
    return whole.flat((torch.cat(ragged.padded(parts), 1),)), whole


def rows_read(read: Literal["first", "last"], spans: Spans, route: Spans) -> Read:
    """The first or last token of each modality, by its place in the part of `route` that holds it."""
    ends = [sum(count for _, count in spans[: index + 1]) for index in range(len(spans))]
    rows = tuple(
        end - 1 if read == "last" else end - count
        for end, (_, count) in zip(ends, spans, strict=True)
    )
    if len(route) < len(spans):
        return (rows,)
    return tuple(
        (row - end + count,) for row, end, (_, count) in zip(rows, ends, spans, strict=True)
    )
