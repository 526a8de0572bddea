"""The release's classes and factories over our network: code that vendored unilm/beit3 switches by changing an import.

Names, arguments, results and `state_dict` keys are upstream's; parameters and attributes inside the network are ours (a
table is in docs/migrating.md). Nothing is stored between calls, so one model serves several threads. Padding is 1 where
a token is padding, `attn_mask` 1 where attention is blocked. Upstream's own signatures end in **kwargs that it passes on
and ignores, and its users rely on that: so do those of the classes here. A factory (`MODELS`, `create_model`) refuses an
argument that it does not know and that asks for something. What cannot be honoured is a ValueError that names it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.compat.network import (
    BEiT3,
    BEiT3Wrapper,
    EncoderConfig,
    State,
    _get_base_config,
    _get_large_config,
)
from beit3.config import suggestion
from beit3.model.attention_mask import image_to_text
from beit3.model.config import POSITION_OFFSET
from beit3.ops.collectives import all_gather_with_gradient, rank
from beit3.ops.losses import LOGIT_SCALE, similarities
from beit3.tasks import imagenet, nlvr2
from beit3.weights.matching import first_few, fit_positions
from beit3.weights.release_format import read_file

Norm = Callable[[int], nn.Module]

# The tasks -----------------------------------------------------------------------------------------------------------


class Pooler(nn.Module):
    """Norm, linear and tanh on the first of the states [B, N, D]."""

    def __init__(self, input_features: int, output_features: int, norm_layer: Norm = nn.LayerNorm):
        super().__init__()
        self.norm = norm_layer(input_features)
        self.dense = nn.Linear(input_features, output_features)

    def forward(self, states: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(states[:, 0])))


class TwoLayerMLP(nn.Module):
    """Linear, norm, GELU, linear, and a norm before them unless `norm_input` is False."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        norm_layer: Norm = nn.LayerNorm,
        norm_input: bool = True,
    ):
        super().__init__()
        self.norm1 = norm_layer(in_features) if norm_input else nn.Identity()
        self.dense1 = nn.Linear(in_features, hidden_features)
        self.norm2 = norm_layer(hidden_features)
        self.act = nn.GELU()
        self.dense2 = nn.Linear(hidden_features, out_features)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense2(self.act(self.norm2(self.dense1(self.norm1(states)))))


class ClipLoss(nn.Module):
    """Each image against the texts of all processes and the other way round: a retrieval model's `criterion`."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean over this process's pairs, logits of its images, of its texts [B, world * B]), of unit features [B, D]."""
        to_text = similarities(image_features, all_gather_with_gradient(text_features), logit_scale)
        to_image = similarities(
            text_features, all_gather_with_gradient(image_features), logit_scale
        )
        own = torch.arange(len(image_features), device=image_features.device) + rank() * len(
            image_features
        )
        return (
            (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2,
            to_text,
            to_image,
        )


class BEiT3ForVisualQuestionAnswering(BEiT3Wrapper):
    def __init__(
        self, args: Any, num_classes: int = 3129, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.pooler = Pooler(dim, dim, norm_layer)
        self.head = nn.Sequential(
            nn.Linear(dim, 2 * dim), norm_layer(2 * dim), nn.GELU(), nn.Linear(2 * dim, num_classes)
        )
        for part in (self.pooler, self.head):
            part.apply(self._init_weights)

    def forward(
        self, image: Tensor, question: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.pooler(self.beit3(question, image, padding_mask)["encoder_out"]))


class BEiT3ForVisualReasoning(BEiT3Wrapper):
    def __init__(
        self, args: Any, num_classes: int = 2, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.head = TwoLayerMLP(4 * dim, 2 * dim, num_classes, norm_layer)
        self.head.apply(self._init_weights)
        for layer in (self.head.dense1, self.head.dense2):
            layer.weight.data.mul_(nlvr2.SMALL_START)

    def forward(
        self,
        image_a: Tensor,
        image_b: Tensor,
        text_description: Tensor,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits [B, num_classes], false before true."""
        padding = None if padding_mask is None else padding_mask.repeat(2, 1)
        found = self.beit3(text_description.repeat(2, 1), torch.cat((image_a, image_b)), padding)
        states = found["encoder_out"][:, [0, found["multiway_split_position"]]].flatten(
            1
        )  # [2B, 2D]
        return self.head(torch.cat(states.chunk(2), 1))


class BEiT3ForImageClassification(BEiT3Wrapper):
    def __init__(
        self, args: Any, num_classes: int = 1000, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        self.fc_norm = norm_layer(args.encoder_embed_dim)
        self.head = (
            nn.Linear(args.encoder_embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        )
        self.head.apply(self._init_weights)
        for parameter in self.head.parameters():
            parameter.data.mul_(imagenet.SMALL_START)

    def forward(self, image: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, num_classes] of the patches' mean."""
        return self.head(
            self.fc_norm(self.beit3(visual_tokens=image)["encoder_out"][:, 1:].mean(1))
        )


class BEiT3ForCaptioning(BEiT3Wrapper):
    def __init__(self, args: Any, **kwargs: Any):
        super().__init__(args)
        self.mlm_head = nn.Linear(args.encoder_embed_dim, args.vocab_size)
        self.mlm_head.apply(self._init_weights)

    def forward(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None = None,
        incremental_state: State | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, State | None]:
        """(logits of the text's places [B, L, V], or of the masked ones [n, V]; the state).

        A step without an image goes on from `incremental_state`, where the last `text_ids` are those of a text of `text_len`.
        """
        count = text_ids.shape[1]
        total, positions = count if text_len is None else text_len, None
        if image is not None:
            if total != count:
                raise ValueError(
                    f"text_len {total} with {count} text_ids beside an image: give all of them, or leave text_len out"
                )
            patch = self.beit3.config.patch_size
            mask = image_to_text(
                1 + (image.shape[2] // patch) * (image.shape[3] // patch),
                count,
                device=text_ids.device,
            )
        else:
            if not incremental_state or "prev_key" not in incremental_state.get(0, {}):
                raise ValueError(
                    "no image and no incremental_state of one: the first step needs the image"
                )
            seen = incremental_state[0]["prev_key"].shape[2]
            mask, padding_mask = (
                image_to_text(seen + count - total, total, device=text_ids.device)[-count:],
                None,
            )
            positions = (
                torch.arange(total - count, total, device=text_ids.device)[None] + POSITION_OFFSET
            )
        states = self.beit3(
            text_ids,
            image,
            padding_mask,
            ~mask,
            incremental_state=incremental_state,
            positions=positions,
        )["encoder_out"]
        states = states[:, -count:]
        return self.mlm_head(
            states if language_masked_pos is None else states[language_masked_pos.bool()]
        ), incremental_state


class BEiT3ForRetrieval(BEiT3Wrapper):
    def __init__(self, args: Any, **kwargs: Any):
        super().__init__(args)
        self.language_head = nn.Linear(args.encoder_embed_dim, args.encoder_embed_dim, bias=False)
        self.vision_head = nn.Linear(args.encoder_embed_dim, args.encoder_embed_dim, bias=False)
        for head in (self.language_head, self.vision_head):
            head.apply(self._init_weights)
        self.criterion = ClipLoss()
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Unit features [B, D] of images and texts, None of what was not given; without `only_infer` the loss before them.

        The loss compares the pairs of all processes, each of which has the mean over its own.
        """
        vision = language = None
        if image is not None:
            vision = F.normalize(
                self.vision_head(self.beit3(visual_tokens=image)["encoder_out"][:, 0]), dim=-1
            )
        if text_description is not None:
            states = self.beit3(text_description, text_padding_position=padding_mask)["encoder_out"]
            language = F.normalize(self.language_head(states[:, 0]), dim=-1)
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ValueError(
                "a loss needs image and text_description: give both, or only_infer=True"
            )
        return self.criterion(vision, language, self.logit_scale.exp())[0], vision, language


# Files and names ----------------------------------------------------------------------------------------------------

IMAGE_TABLE = "beit3.encoder.embed_positions.A.weight"


def load_model_and_may_interpolate(
    ckpt_path: str | Path, model: BEiT3Wrapper, model_key: str = "", model_prefix: str = ""
) -> list[str]:
    """Load what fits of a released file, the image positions resampled; returns what did not come from it, as lines.

    `model_key` plays no part: the tensors are found in whatever they are nested. Heads of another shape keep their initial
    values, with a warning, as all do that the file lacks. Raises ValueError for a file that cannot be read and for a
    prefix, RuntimeError for another network's tensors.
    """
    if model_prefix:
        raise ValueError(
            f"model_prefix {model_prefix!r}: a released file's names have none, give ''"
        )
    state, own = read_file(ckpt_path), model.state_dict()
    if IMAGE_TABLE in state:
        state[IMAGE_TABLE] = fit_positions(state[IMAGE_TABLE], model.beit3.config.grid, IMAGE_TABLE)
    for name in [
        name
        for name in state
        if name in own and state[name].shape != own[name].shape and not name.startswith("beit3.")
    ]:
        del state[name]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing:
        warnings.warn(
            f"{len(missing)} tensors are not in {ckpt_path} in this shape and stay untrained: {first_few(missing)}",
            stacklevel=2,
        )
    return [f"untrained: {name}" for name in missing] + [f"left out: {name}" for name in unexpected]


KINDS: dict[str, tuple[type[BEiT3Wrapper], dict[str, Any]]] = {
    "imageclassification": (BEiT3ForImageClassification, {"num_classes": 1000}),
    "vqav2": (BEiT3ForVisualQuestionAnswering, {"num_classes": 3129}),
    "nlvr2": (BEiT3ForVisualReasoning, {"num_classes": 2}),
    "captioning": (BEiT3ForCaptioning, {}),
    "retrieval": (BEiT3ForRetrieval, {}),
}
ARGUMENTS = (
    "img_size",
    "patch_size",
    "drop_path_rate",
    "checkpoint_activations",
    "mlp_ratio",
    "vocab_size",
    "num_classes",
    "norm_layer",
)
"""What a factory passes on; as upstream's, captioning and retrieval have no use for the last two."""
SIZES = {
    "base": {
        "imageclassification": (224,),
        "nlvr2": (224,),
        "captioning": (224, 480),
        "retrieval": (224, 384),
        "vqav2": (384, 480),
    },
    "large": {
        "imageclassification": (224,),
        "nlvr2": (224,),
        "captioning": (480,),
        "retrieval": (384,),
        "vqav2": (384, 480, 768),
    },
}


def _factory(size: str, pixels: int, kind: str) -> Callable[..., BEiT3Wrapper]:
    """The function that upstream registers under this name.

    It takes `ARGUMENTS`, and of others (timm's trainers pass a good many) those that ask for nothing: None, False, 0.
    """
    model, outputs = KINDS[kind]

    def make(pretrained: bool = False, **kwargs: Any) -> BEiT3Wrapper:
        if pretrained:
            raise ValueError(
                "pretrained=True: nothing is downloaded; give the file to load_model_and_may_interpolate"
            )
        for name, value in kwargs.items():
            if value and name not in ARGUMENTS:
                raise ValueError(
                    f"{name}={value!r} means nothing to {kind}{suggestion(name, ARGUMENTS)} (known: {', '.join(ARGUMENTS)})"
                )
        args = (_get_base_config if size == "base" else _get_large_config)(
            **{"img_size": pixels} | kwargs
        )
        args.normalize_output = kind not in ("imageclassification", "vqav2")
        return model(args, **outputs | kwargs)

    make.__name__ = make.__qualname__ = f"beit3_{size}_patch16_{pixels}_{kind}"
    return make


MODELS = {
    f"beit3_{size}_patch16_{pixels}_{kind}": _factory(size, pixels, kind)
    for size, kinds in SIZES.items()
    for kind, sizes in kinds.items()
    for pixels in sizes
}
"""Every name that upstream registers -> its factory; each is also an attribute of this module."""


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> BEiT3Wrapper:
    """timm's way to a model by its name. kwargs: `ARGUMENTS`; what is None counts as not given.

    Raises ValueError for a name that upstream does not register, and for another argument unless it asks for nothing.
    """
    if model_name not in MODELS:
        raise ValueError(
            f"no model {model_name}{suggestion(model_name, list(MODELS))} (known: {', '.join(MODELS)})"
        )
    return MODELS[model_name](
        pretrained=pretrained,
        **{name: value for name, value in kwargs.items() if value is not None},
    )


__all__ = [
    "BEiT3",
    "BEiT3ForCaptioning",
    "BEiT3ForImageClassification",
    "BEiT3ForRetrieval",
    "BEiT3ForVisualQuestionAnswering",
    "BEiT3ForVisualReasoning",
    "BEiT3Wrapper",
    "ClipLoss",
    "EncoderConfig",
    "MODELS",
    "Pooler",
    "TwoLayerMLP",
    "_get_base_config",
    "_get_large_config",
    "create_model",
    "load_model_and_may_interpolate",
    *MODELS,
]


def __getattr__(name: str) -> Any:
    if name in MODELS:
        return MODELS[name]
    raise AttributeError(f"module 'beit3.compat' has no attribute {name!r}")
