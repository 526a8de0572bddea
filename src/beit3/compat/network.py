"""torchscale's BEiT3 over our network: its arguments and results, and the released keys in `state_dict` both ways.

B images or texts, L tokens of a text, P patches, N = 1 + P + L tokens of a pair, D wide, K tokens seen so far.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.model import beit3 as network
from beit3.model.config import POSITION_OFFSET, ModelConfig
from beit3.model.layers import Cache, LayerCache
from beit3.ops.init import trunc_normal
from beit3.weights.release_format import keys_of

State = dict[int, dict[str, Tensor]]
"""Per layer `prev_key` and `prev_value` [B, H, K, D/H]: the caller reorders and cuts them between the steps."""


@dataclass(init=False)
class EncoderConfig:
    """The fields of torchscale's configuration that BEiT-3 reads, by keyword; others are ignored, as torchscale does."""

    encoder_embed_dim: int = 768
    encoder_attention_heads: int = 12
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    img_size: int = 224
    patch_size: int = 16
    vocab_size: int = 64010
    max_source_positions: int = 1024
    drop_path_rate: float = 0.0
    layernorm_eps: float = 1e-5
    subln: bool = True
    normalize_output: bool = True
    checkpoint_activations: bool | None = None
    multiway: bool = True
    encoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    in_chans: int = 3
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    no_output_layer: bool = True
    share_encoder_input_output_embed: bool = False
    moe_freq: int = 0
    rel_pos_buckets: int = 0
    deepnorm: bool = False
    xpos_rel_pos: bool = False

    def __init__(self, **kwargs: Any):
        for field in fields(self):
            setattr(self, field.name, kwargs.get(field.name, field.default))


FIXED = (
    "multiway",
    "encoder_normalize_before",
    "activation_fn",
    "in_chans",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "no_scale_embedding",
    "layernorm_embedding",
    "no_output_layer",
    "share_encoder_input_output_embed",
    "moe_freq",
    "rel_pos_buckets",
    "deepnorm",
    "xpos_rel_pos",
)
"""Fields of which this network knows one value, the default; no released model has another."""


def _get_base_config(
    img_size: int = 224,
    patch_size: int = 16,
    drop_path_rate: float = 0,
    checkpoint_activations: bool | None = None,
    mlp_ratio: float = 4,
    vocab_size: int = 64010,
    **kwargs: Any,
) -> EncoderConfig:
    """The released base network; what else is given is ignored, as upstream does."""
    return EncoderConfig(
        encoder_embed_dim=768,
        encoder_attention_heads=12,
        encoder_ffn_embed_dim=int(768 * mlp_ratio),
        encoder_layers=12,
        img_size=img_size,
        patch_size=patch_size,
        vocab_size=vocab_size,
        drop_path_rate=drop_path_rate,
        checkpoint_activations=checkpoint_activations,
    )


def _get_large_config(
    img_size: int = 224,
    patch_size: int = 16,
    drop_path_rate: float = 0,
    checkpoint_activations: bool | None = None,
    mlp_ratio: float = 4,
    vocab_size: int = 64010,
    **kwargs: Any,
) -> EncoderConfig:
    """The released large network; what else is given is ignored, as upstream does."""
    return EncoderConfig(
        encoder_embed_dim=1024,
        encoder_attention_heads=16,
        encoder_ffn_embed_dim=int(1024 * mlp_ratio),
        encoder_layers=24,
        img_size=img_size,
        patch_size=patch_size,
        vocab_size=vocab_size,
        drop_path_rate=drop_path_rate,
        checkpoint_activations=checkpoint_activations,
    )


class BEiT3(network.BEiT3):
    """torchscale's BEiT3: `state_dict` and `load_state_dict` speak the released keys."""

    def __init__(self, args: Any, **kwargs: Any):
        """args: an `EncoderConfig`, or any object with its attributes."""
        super().__init__(_model_config(args))
        self.args = args
        if not self.image_embedding.positions.is_meta:
            self.init_weights()
        if getattr(args, "checkpoint_activations", None):
            for block in self.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        self.register_state_dict_post_hook(_to_released)
        self.register_load_state_dict_pre_hook(_from_released)

    def forward(  # type: ignore[override]
        self,
        textual_tokens: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        text_padding_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
        vision_masked_position: Tensor | None = None,
        incremental_state: State | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """States as `encoder_out` [B, N, D] and where the text begins as `multiway_split_position` (-1 images alone, 0 texts).

        incremental_state: keys and values of earlier calls, brought up to date in place; padding is refused with it.
        positions [1, L]: rows of the text's table, one after the other. Raises ValueError for what cannot be honoured.
        """
        padding = (
            None
            if textual_tokens is None or text_padding_position is None
            else text_padding_position.bool()
        )
        if incremental_state is not None and padding is not None:
            if padding.any():
                raise ValueError(
                    "text_padding_position with incremental_state: decode texts without padding"
                )
            padding = None
        cache = (
            None
            if incremental_state is None and positions is None
            else _cache(incremental_state or {}, positions, len(self.blocks))
        )
        if positions is not None and visual_tokens is not None:
            raise ValueError(
                "positions beside visual_tokens: they are rows of the text's table, leave them out"
            )
        encoded = super().forward(
            visual_tokens,
            textual_tokens,
            image_mask=vision_masked_position,
            text_padding=padding,
            attention_mask=None if attn_mask is None else ~attn_mask.bool(),
            cache=cache,
        )
        if incremental_state is not None and cache is not None:
            for index, layer in enumerate(cache.layers):
                assert layer.key is not None and layer.value is not None
                states = {"prev_key": layer.key, "prev_value": layer.value}
                incremental_state.setdefault(index, {}).update(
                    {name: state[:, :, : layer.length] for name, state in states.items()}
                )
        split = (
            -1 if textual_tokens is None else 0 if visual_tokens is None else encoded.spans[0][1]
        )
        hidden = torch.zeros(
            encoded.tokens.shape[:2], dtype=torch.bool, device=encoded.tokens.device
        )
        if padding is not None:
            hidden[:, split:] = padding
        return {
            "encoder_out": encoded.tokens,
            "encoder_padding_mask": hidden,
            "encoder_states": [],
            "l_aux": [],
        } | {"multiway_split_position": split}


class BEiT3Wrapper(nn.Module):
    """The network as `beit3`, for a head of one's own."""

    def __init__(self, args: Any, **kwargs: Any):
        super().__init__()
        self.args = args
        self.beit3 = BEiT3(args)

    def get_num_layers(self) -> int:
        return len(self.beit3.blocks)

    def get_num_layer(self, name: str) -> int:
        """For layer-wise decay, by the names of `named_parameters`: 0 an embedding, i + 1 of block i, the last what follows them."""
        inside = name.removeprefix("beit3.")
        return self.beit3.layer_of(inside) if inside != name else self.get_num_layers() + 1

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no optimizer should pull to zero."""
        return {
            "beit3.image_embedding.positions",
            "beit3.image_embedding.class_token",
            "logit_scale",
        }

    def _init_weights(self, module: nn.Module) -> None:
        """For `apply` on a head: linear layers normal .02 cut at one deviation, biases 0, norms 1 and 0."""
        if isinstance(module, nn.Linear):
            trunc_normal(module.weight, None)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


# Into the network and back -------------------------------------------------------------------------------------------


def _model_config(args: Any) -> ModelConfig:
    """Our config of upstream's; ValueError for what only other networks have."""
    default = EncoderConfig()
    for name in FIXED:
        known = getattr(default, name)
        if getattr(args, name, known) != known:
            raise ValueError(
                f"{name}={getattr(args, name)!r} cannot be honoured: BEiT-3 has {name}={known!r}"
            )
    ours = {
        "dim": "encoder_embed_dim",
        "depth": "encoder_layers",
        "num_heads": "encoder_attention_heads",
        "ffn_dim": "encoder_ffn_embed_dim",
        "image_size": "img_size",
        "patch_size": "patch_size",
        "vocab_size": "vocab_size",
        "text_positions": "max_source_positions",
        "sub_ln": "subln",
        "final_norm": "normalize_output",
        "norm_eps": "layernorm_eps",
        "drop_path_rate": "drop_path_rate",
    }
    values: dict[str, Any] = {
        name: getattr(args, theirs, getattr(default, theirs)) for name, theirs in ours.items()
    }
    return ModelConfig(**values)


def _cache(state: State, positions: Tensor | None, depth: int) -> Cache:
    """Keys and values of the caller's dictionaries, before a text whose first token has the first of `positions`."""
    rows = [POSITION_OFFSET] if positions is None else positions.flatten().tolist()
    if rows[0] < POSITION_OFFSET or rows != list(range(rows[0], rows[0] + len(rows))):
        raise ValueError(
            f"positions {rows[:4]}: rows of the text's table one after the other, from {POSITION_OFFSET} on, are taken"
        )
    layers = [
        LayerCache(layer.get("prev_key"), layer.get("prev_value"))
        for layer in (state.get(index, {}) for index in range(depth))
    ]
    for layer in layers:
        layer.length = 0 if layer.key is None else layer.key.shape[2]
    return Cache(layers, num_text=rows[0] - POSITION_OFFSET)


def _released_names(module: BEiT3, prefix: str) -> list[tuple[str, Tensor, list[str]]]:
    """(our name, our parameter, its released keys) of all parameters."""
    keys = {name: keys_of(f"backbone.{name}", {}, "") for name, _ in module.named_parameters()}
    return [
        (prefix + name, p, [prefix + key for key in keys[name]])
        for name, p in module.named_parameters()
    ]


def _to_released(module: BEiT3, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """After `state_dict`: released keys, whose tensors are views of our parameters.

    Copies would suit safetensors' `save_model`, but a moving average of weights (timm's ModelEma, in upstream's trainer)
    writes into what `state_dict` returned, and would change nothing without a sign.
    """
    for name, _, keys in _released_names(module, prefix):
        tensor = state.pop(name)
        state.update(
            zip(keys, tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,), strict=True)
        )


def _from_released(
    module: BEiT3,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before loading: our names for the released ones. What is missing or misshapen keeps its values and is named as released."""
    given = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for name, parameter, keys in _released_names(module, prefix):
        parts = list(
            parameter.detach().chunk(len(keys)) if len(keys) > 1 else (parameter.detach(),)
        )
        for index, key in enumerate(keys):
            value = given.pop(key, None)
            if value is None:
                missing.append(key)
            elif value.shape != parts[index].shape:
                errors.append(
                    f"{key} has shape {list(value.shape)}, this network needs {list(parts[index].shape)}"
                )
            else:
                parts[index] = value
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    unexpected += given
