"""BEiT-3's backbone (paper section 2.1): images, texts or both become token states.

One call covers every use of the paper's figure 3: an image alone (vision encoder), a text alone
(language encoder), each in a call of its own (dual encoder), both in one call (fusion encoder), and
both with `make_image_to_text_mask` (image-to-text generation). Other modalities work alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from beit3.model.attention_mask import combine_masks
from beit3.model.backbone import MultiwayBackbone
from beit3.model.cache import Cache, LayerCache
from beit3.model.config import FUSION, IMAGE, TEXT, ModelConfig
from beit3.model.embeddings import Embedding, make_embedding
from beit3.model.layers import Block
from beit3.model.layout import Layout, Parts, Spans
from beit3.model.multiway import make_norm

Observer = Callable[[int, Parts, Layout, Tensor | None], None]
"""Receives the number of a block, its input, the layout and the attention mask."""


@dataclass(frozen=True)
class Encoded:
    """Token states of one call, one part per modality."""

    parts: Parts
    spans: Spans
    """(modality, number of tokens) of each part."""

    @property
    def tokens(self) -> Tensor:
        """All states [B, N, D]."""
        return torch.cat(self.parts, 1)

    def of(self, modality: str) -> Tensor:
        """Returns the states [B, n, D] of a modality; an image's begin with the class token.

        Raises:
            ValueError: the call had no such modality.
        """
        for part, (name, _) in zip(self.parts, self.spans, strict=True):
            if name == modality:
                return part
        names = ", ".join(name for name, _ in self.spans)
        raise ValueError(f"no {modality} in this input: it holds {names}")

    def first(self, modality: str) -> Tensor:
        """Returns the first state [B, D] of a modality: the class token's, or that of `<s>`."""
        return self.of(modality)[:, 0]


class BEiT3(MultiwayBackbone):
    """The Multiway Transformer.

    Parameters are named `{modality}_embedding.*`, `blocks.{i}.{norm1,attention,norm2,ffn}.*` and
    `norm.*`. A layer that exists once per expert has a child per expert: `image`, `text`, `fusion`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        for modality in config.modalities:
            self.add_module(f"{modality.name}_embedding", make_embedding(modality, config))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        experts = config.experts_per_layer[-1]
        self.norm = (
            make_norm(config.dim, config.norm_eps, experts, shared=config.shared_norms)
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
        inputs: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        padding: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        text_position_ids: Tensor | None = None,
        cache: Cache | None = None,
        read: Literal["all", "real", "first", "last"] = "all",
        observe: Observer | None = None,
    ) -> Encoded:
        """Encodes an image, a text, or several modalities fused in one sequence.

        Args:
            image: [B, 3, H, W]; H and W are multiples of the patch size.
            text: [B, L] int64.
            image_mask: [B, P] bool, True = the patch is masked.
            text_padding: [B, L] bool, True = padding.
            inputs: values of further modalities by name, as their embeddings take them.
            masks: masked positions of further modalities by name.
            padding: padding [B, n] bool of any modality by name; n counts its tokens.
            attention_mask: [N, K] or [B, 1, N, K] bool, True = may attend; K counts cached tokens.
            text_position_ids: [L] int64, places of the tokens in their text. By default they follow
                each other, after those that the cache holds.
            cache: keys and values of the tokens of earlier calls, extended by this call's.
            read: which states the caller reads: of all tokens; of all but the padding, whose states
                are then arbitrary; or of each modality's first or last token alone. Less is
                computed for what is not read.
            observe: called before each block with (number of the block, its input, the layout, the
                mask), for those who look inside. With `read` "all" the input is padded.

        Raises:
            ValueError: no input, padding together with a cache, a text beyond the position table,
                an image that patches do not tile, a modality that the config does not name.
        """
        inputs = _collect(inputs, {IMAGE: image, TEXT: text})
        masks = _collect(masks, {IMAGE: image_mask})
        padding = _collect(padding, {TEXT: text_padding})
        self._check_names(inputs, masks, padding, cache)

        parts, layout = self.embed(inputs, masks, padding, text_position_ids, cache)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        mask = combine_masks(attention_mask, layout.visible_keys())
        if read != "all":
            parts, layout = layout.leave_out_padding(parts)

        fused = len(inputs) > 1 or (cache is not None and cache.fused)
        layer_caches = [None] * len(self.blocks) if cache is None else cache.layers
        for layer, (block, layer_cache) in enumerate(zip(self.blocks, layer_caches, strict=True)):
            if fused and layer == self.config.first_fusion_layer:
                parts, layout = layout.fuse(parts)
            if read in ("first", "last") and layer == self.config.depth - 1:
                parts, layout = layout.select(parts, read)
            if observe is not None:
                observe(layer, parts, layout, mask)
            parts = block(parts, layout, mask, layer_cache)

        layout = layout.without_unselected()
        if self.norm is not None:
            parts = self.norm(parts, layout.experts)
        return Encoded(layout.split_modalities(parts), layout.modalities)

    def embed(
        self,
        inputs: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        padding: Mapping[str, Tensor],
        text_position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Parts, Layout]:
        """Returns the first block's input and its layout; notes in the cache what it will hold."""
        if cache is not None and not cache.layers:
            cache.layers.extend(LayerCache() for _ in self.blocks)
            cache.fused = len(inputs) > 1
        names = [name for name in self.config.modality_names if name in inputs]
        parts: list[Tensor] = []
        for name in names:
            embedding = self.get_embedding(name)
            if name == TEXT:
                start = 0 if cache is None else cache.num_text
                tokens = embedding(inputs[name], start=start, position_ids=text_position_ids)
            else:
                tokens = embedding(inputs[name], masks.get(name))
            if name in padding:
                tokens = tokens * ~padding[name].bool()[..., None]  # padding enters as zeros
            parts.append(tokens)
        if cache is not None and TEXT in inputs:
            cache.num_text += inputs[TEXT].shape[1]
        spans = tuple((name, part.shape[1]) for name, part in zip(names, parts, strict=True))
        paddings = tuple(padding[name].bool() if name in padding else None for name in names)
        return tuple(parts), Layout(spans, spans, paddings)

    def get_embedding(self, modality: str) -> Embedding:
        """Returns the embedding of a modality."""
        embedding = self.get_submodule(f"{modality}_embedding")
        assert isinstance(embedding, Embedding)
        return embedding

    def find_unused_parameters(
        self, *calls: Sequence[str], read: Sequence[str] = (), masked: Sequence[str] = ()
    ) -> dict[str, str]:
        """Finds the parameters without a gradient when the network is called in these ways alone.

        Args:
            calls: the modalities of each kind of call: `("image", "text")` is a fused sequence,
                `("image",), ("text",)` are the two calls of a dual encoder.
            read: modalities whose final states the loss reads; empty: of all.
            masked: modalities that are masked in training.

        Returns:
            Names or name prefixes of parameters, each with the reason.
        """
        config = self.config
        unused: dict[str, str] = {}
        for layer in range(config.depth):
            unused |= self._find_unused_in_block(layer, calls, read or config.modality_names)
        if config.final_norm and not config.shared_norms:
            needed = self._find_experts(calls, read or config.modality_names, config.depth - 1)
            for expert in config.experts_per_layer[-1]:
                if expert not in needed:
                    unused[f"norm.{expert}"] = "no state that is read goes through it"
        called = {name for call in calls for name in call}
        for name in config.modality_names:
            if name not in called:
                unused[f"{name}_embedding"] = f"there is no {name}"
            elif name not in masked and hasattr(self.get_embedding(name), "mask_token"):
                unused[f"{name}_embedding.mask_token"] = "nothing is masked"
        return unused

    def _find_unused_in_block(
        self, layer: int, calls: Sequence[Sequence[str]], read: Sequence[str]
    ) -> dict[str, str]:
        """`find_unused_parameters` for one block.

        A modality that is not read is still attended to, so only what follows attention is unused.
        """
        config = self.config
        before_attention = [] if config.shared_norms else ["norm1"]
        after_attention = ["norm2", "ffn"]
        if not config.shared_attention:
            before_attention.append("attention.qkv")
            after_attention += ["attention.norm", "attention.out"]
        used = self._find_experts(calls, config.modality_names, layer)
        is_last = layer == config.depth - 1
        needed = self._find_experts(calls, read, layer) if is_last else used
        unused: dict[str, str] = {}
        for expert in config.experts_per_layer[layer]:
            if expert not in used:
                modules = before_attention + after_attention
                reason = f"no tokens go through the {expert} expert here"
            elif expert not in needed:
                modules, reason = after_attention, f"the last states of {expert} are not read"
            else:
                continue
            unused |= {f"blocks.{layer}.{module}.{expert}": reason for module in modules}
        return unused

    def _find_experts(
        self, calls: Sequence[Sequence[str]], read: Sequence[str], layer: int
    ) -> set[str]:
        """The experts of a layer that take the tokens of `read` in any of the calls."""
        experts: set[str] = set()
        for call in calls:
            is_fused = len(call) > 1 and layer >= self.config.first_fusion_layer
            experts |= {FUSION} if is_fused else set(call) & set(read)
        return experts

    def _check_names(
        self,
        inputs: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        padding: Mapping[str, Tensor],
        cache: Cache | None,
    ) -> None:
        """Raises a ValueError for inputs that do not go together."""
        known_names = self.config.modality_names
        if not inputs:
            raise ValueError(f"nothing to encode: give one or more of {', '.join(known_names)}")
        for name in inputs:
            if name not in known_names:
                raise ValueError(f"no modality {name!r}: this network has {', '.join(known_names)}")
            if not torch.compiler.is_compiling() and not inputs[name].numel():
                raise ValueError(
                    f"{name} of shape {list(inputs[name].shape)} is empty: give one sample or more "
                    "of one token or more, or leave it out"
                )
        for name in (*masks, *padding):
            if name not in inputs:
                option = f"{name}_{'padding' if name in padding else 'mask'}"
                raise ValueError(f"{option} without {name}: give both or neither")
        if cache is not None and padding:
            raise ValueError("padding cannot be combined with a cache: leave text_padding out")
        if TEXT in masks:
            raise ValueError("texts take no mask: replace masked tokens by the [MASK] id")


def _collect(
    by_name: Mapping[str, Tensor] | None, by_argument: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Merges values given by name with those given by arguments of the published modalities."""
    collected = {name: value for name, value in by_argument.items() if value is not None}
    return collected | dict(by_name or {})
