"""torchscale's BEiT3 over our network, with the released keys in its `state_dict`.

In shapes, B is the batch size, L the tokens of a text, P the patches, N = 1 + P + L the tokens of a
pair, D the width, H the number of heads, and K the tokens of earlier calls.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.model import beit3 as network
from beit3.model.cache import Cache, LayerCache
from beit3.model.config import POSITION_OFFSET, ModelConfig
from beit3.ops.init import trunc_normal
from beit3.weights.release_format import find_released_keys, split_rows

State = dict[int, dict[str, Tensor]]
"""Layer -> `prev_key` and `prev_value` [B, H, K, D/H]. Callers reorder and cut them between
decoding steps."""


@dataclass(init=False)
class EncoderConfig:
    """The fields of torchscale's config that BEiT-3 reads. Others are ignored, as there."""

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


FIXED_FIELDS = (
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
"""Fields that must have their default value; no released model has another."""

CONFIG_FIELDS = {
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
"""Field of `ModelConfig` -> field of `EncoderConfig`."""


def _get_base_config(
    img_size: int = 224,
    patch_size: int = 16,
    drop_path_rate: float = 0,
    checkpoint_activations: bool | None = None,
    mlp_ratio: float = 4,
    vocab_size: int = 64010,
    **kwargs: Any,
) -> EncoderConfig:
    """Returns the config of the released base network; ignores `kwargs`, as upstream does."""
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
    """Returns the config of the released large network; ignores `kwargs`, as upstream does."""
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
    """torchscale's BEiT3, whose `state_dict` and `load_state_dict` use the released keys.

    `args` is an `EncoderConfig`, or any object with its attributes.
    """

    def __init__(self, args: Any, **kwargs: Any):
        super().__init__(_make_model_config(args))
        self.args = args
        if not next(self.parameters()).is_meta:
            self.init_weights()
        if getattr(args, "checkpoint_activations", None):
            for block in self.blocks:
                recompute = partial(checkpoint, block.forward, use_reentrant=False)
                block.forward = recompute  # type: ignore[method-assign]
        self.register_state_dict_post_hook(_export_released_keys)
        self.register_load_state_dict_pre_hook(_import_released_keys)

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
        """Encodes images, texts or pairs.

        Args:
            textual_tokens: Token ids [B, L].
            visual_tokens: Normalized images [B, 3, H, W].
            text_padding_position: [B, L], 1 = padding. Refused with `incremental_state`.
            attn_mask: [N, N], 1 = attention is blocked.
            vision_masked_position: [B, P], 1 = the patch is masked.
            incremental_state: Keys and values of earlier calls, updated in place.
            positions: [1, L] consecutive rows of the text position table.

        Returns:
            The states `encoder_out` [B, N, D] and `multiway_split_position`, the index of the first
            text token: -1 for images alone, 0 for texts alone. The other keys are torchscale's.

        Raises:
            ValueError: An argument cannot be honored.
        """
        if positions is not None and visual_tokens is not None:
            raise ValueError(
                "positions beside visual_tokens: they are rows of the text position table, "
                "leave them out"
            )
        padding = None if textual_tokens is None else text_padding_position
        padding = _check_padding(padding, incremental_state)
        cache = None
        if incremental_state is not None or positions is not None:
            cache = _make_cache(incremental_state or {}, positions, len(self.blocks))
        encoded = super().forward(
            visual_tokens,
            textual_tokens,
            image_mask=vision_masked_position,
            text_padding=padding,
            attention_mask=None if attn_mask is None else ~attn_mask.bool(),
            cache=cache,
        )
        if incremental_state is not None and cache is not None:
            _update_state(incremental_state, cache)
        num_image = encoded.tokens.shape[1]
        if textual_tokens is not None:
            num_image -= textual_tokens.shape[1]
        return {
            "encoder_out": encoded.tokens,
            "encoder_padding_mask": _make_padding_mask(encoded.tokens, num_image, padding),
            "encoder_states": [],
            "l_aux": [],
            "multiway_split_position": -1 if textual_tokens is None else num_image,
        }


class BEiT3Wrapper(nn.Module):
    """The network as `beit3`, for models that add a head."""

    def __init__(self, args: Any, **kwargs: Any):
        super().__init__()
        self.args = args
        self.beit3 = BEiT3(args)

    def get_num_layers(self) -> int:
        return len(self.beit3.blocks)

    def get_num_layer(self, name: str) -> int:
        """Returns the layer of a parameter, by its name in `named_parameters`.

        That is 0 for embeddings, i + 1 for block i, and one more than the last block for the rest.
        """
        own_name = name.removeprefix("beit3.")
        return self.get_num_layers() + 1 if own_name == name else self.beit3.layer_of(own_name)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that no optimizer should pull to zero."""
        return {
            "beit3.image_embedding.positions",
            "beit3.image_embedding.class_token",
            "logit_scale",
        }

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a module of a head, for `Module.apply`.

        Linear weights are normal .02 cut at one deviation, biases 0, norms 1 and 0.
        """
        if isinstance(module, nn.Linear):
            trunc_normal(module.weight, None)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


# Arguments of our network ------------------------------------------------------------------------


def _make_model_config(args: Any) -> ModelConfig:
    """Returns our config of upstream's; raises ValueError for what BEiT-3 does not have."""
    default = EncoderConfig()
    for name in FIXED_FIELDS:
        fixed = getattr(default, name)
        value = getattr(args, name, fixed)
        if value != fixed:
            raise ValueError(f"{name}={value!r} cannot be honored: BEiT-3 has {name}={fixed!r}")
    values: dict[str, Any] = {
        field: getattr(args, argument, getattr(default, argument))
        for field, argument in CONFIG_FIELDS.items()
    }
    return ModelConfig(**values)


def _check_padding(padding: Tensor | None, state: State | None) -> Tensor | None:
    """Returns a text's padding as booleans; raises ValueError for padding while decoding."""
    if padding is None:
        return None
    padding = padding.bool()
    if state is None:
        return padding
    if padding.any():
        raise ValueError(
            "text_padding_position with incremental_state: decode texts without padding"
        )
    return None


def _make_cache(state: State, positions: Tensor | None, depth: int) -> Cache:
    """Returns a cache with the keys and values of `state`.

    The next text token takes the first of `positions`, or the first row of a text without them.
    """
    rows = [POSITION_OFFSET] if positions is None else positions.flatten().tolist()
    if rows[0] < POSITION_OFFSET or rows != list(range(rows[0], rows[0] + len(rows))):
        raise ValueError(
            f"positions {rows[:4]}: give consecutive rows of the text position table, "
            f"from {POSITION_OFFSET} on"
        )
    layers = []
    for index in range(depth):
        layer = state.get(index, {})
        key, value = layer.get("prev_key"), layer.get("prev_value")
        layers.append(LayerCache(key, value, 0 if key is None else key.shape[2]))
    return Cache(layers, num_text=rows[0] - POSITION_OFFSET)


def _update_state(state: State, cache: Cache) -> None:
    """Writes the keys and values of a cache into the caller's dictionaries."""
    for index, layer in enumerate(cache.layers):
        assert layer.key is not None and layer.value is not None
        entry = state.setdefault(index, {})
        entry["prev_key"] = layer.key[:, :, : layer.length]
        entry["prev_value"] = layer.value[:, :, : layer.length]


def _make_padding_mask(states: Tensor, num_image: int, padding: Tensor | None) -> Tensor:
    """Returns booleans [B, N], true where a token is padding; image tokens never are."""
    mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    if padding is not None:
        mask[:, num_image:] = padding
    return mask


# State dicts -------------------------------------------------------------------------------------


def _list_released_keys(module: BEiT3, prefix: str) -> list[tuple[str, Tensor, list[str]]]:
    """Returns (our name, our parameter, its released keys) of all parameters."""
    entries: list[tuple[str, Tensor, list[str]]] = []
    for name, parameter in module.named_parameters():
        keys = find_released_keys(f"backbone.{name}", {}, "")
        entries.append((prefix + name, parameter, [prefix + key for key in keys]))
    return entries


def _export_released_keys(
    module: BEiT3, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    """Replaces our names in a state dict by released keys, whose tensors are views of ours.

    Copies would suit safetensors' `save_model`. But a moving average of weights (timm's ModelEma,
    in upstream's trainer) writes into what `state_dict` returned, and with copies would change
    nothing without a sign.
    """
    for name, _, keys in _list_released_keys(module, prefix):
        tensor = state.pop(name)
        state.update(zip(keys, split_rows(tensor, len(keys)), strict=True))


def _import_released_keys(
    module: BEiT3,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Replaces released keys in a state dict by our names, before it is loaded.

    Missing and misshapen tensors keep their values and are reported by their released keys.
    """
    released = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for name, parameter, keys in _list_released_keys(module, prefix):
        parts = list(split_rows(parameter.detach(), len(keys)))
        for index, key in enumerate(keys):
            value = released.pop(key, None)
            if value is None:
                missing.append(key)
            elif value.shape != parts[index].shape:
                errors.append(
                    f"{key} has shape {list(value.shape)}, "
                    f"this network needs {list(parts[index].shape)}"
                )
            else:
                parts[index] = value
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    unexpected += released
