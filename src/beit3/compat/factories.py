"""Upstream's model registry and checkpoint loading: models by their registered names."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3.compat.modeling import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
)
from beit3.compat.network import BEiT3Wrapper, _get_base_config, _get_large_config
from beit3.config import suggest
from beit3.weights.matching import abbreviate, fit_positions
from beit3.weights.state_dicts import read_state_dict

IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"

MODEL_CLASSES: dict[str, tuple[type[BEiT3Wrapper], dict[str, Any]]] = {
    "imageclassification": (BEiT3ForImageClassification, {"num_classes": 1000}),
    "vqav2": (BEiT3ForVisualQuestionAnswering, {"num_classes": 3129}),
    "nlvr2": (BEiT3ForVisualReasoning, {"num_classes": 2}),
    "captioning": (BEiT3ForCaptioning, {}),
    "retrieval": (BEiT3ForRetrieval, {}),
}
"""Upstream's name of a task -> the model's class and its default arguments."""

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
"""Arguments that a factory passes on. As upstream, captioning and retrieval ignore the last two."""

IMAGE_SIZES = {
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
"""Size of the network -> upstream's name of a task -> image sizes that upstream registers."""


def load_model_and_may_interpolate(
    ckpt_path: str | Path, model: BEiT3Wrapper, model_key: str = "", model_prefix: str = ""
) -> list[str]:
    """Loads the tensors of a released file that fit, the image positions resampled.

    Parameters that the file lacks or holds in another shape keep their initial values, with a
    warning.

    Args:
        ckpt_path: The file.
        model: The model to load into.
        model_key: Plays no part: the state dict is found whatever wraps it.
        model_prefix: Must be empty, as a released file's names have no prefix.

    Returns:
        A line for each parameter that stays untrained and each tensor that is left out.

    Raises:
        ValueError: The file cannot be read, or `model_prefix` is given.
        RuntimeError: The tensors are those of another network.
    """
    if model_prefix:
        raise ValueError(
            f"model_prefix {model_prefix!r}: a released file's names have none, give ''"
        )
    state, model_state = read_state_dict(ckpt_path), model.state_dict()
    if IMAGE_POSITIONS in state:
        table = state[IMAGE_POSITIONS]
        state[IMAGE_POSITIONS] = fit_positions(table, model.beit3.config.grid, IMAGE_POSITIONS)
    for name in list(state):
        is_head = not name.startswith("beit3.")
        if is_head and name in model_state and state[name].shape != model_state[name].shape:
            del state[name]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing:
        warnings.warn(
            f"{len(missing)} tensors are not in {ckpt_path} in this shape and stay untrained: "
            f"{abbreviate(missing)}",
            stacklevel=2,
        )
    return [f"untrained: {name}" for name in missing] + [f"left out: {name}" for name in unexpected]


def _make_factory(size: str, image_size: int, kind: str) -> Callable[..., BEiT3Wrapper]:
    """Returns the function that upstream registers for a model.

    It takes `ARGUMENTS`, and ignores others (timm's trainers pass many) that ask for nothing: None,
    False, 0.
    """
    model_class, defaults = MODEL_CLASSES[kind]

    def make_model(pretrained: bool = False, **kwargs: Any) -> BEiT3Wrapper:
        if pretrained:
            raise ValueError(
                "pretrained=True: nothing is downloaded; "
                "give the file to load_model_and_may_interpolate"
            )
        for name, value in kwargs.items():
            if value and name not in ARGUMENTS:
                raise ValueError(
                    f"{name}={value!r} means nothing to {kind}{suggest(name, ARGUMENTS)} "
                    f"(known: {', '.join(ARGUMENTS)})"
                )
        get_config = _get_base_config if size == "base" else _get_large_config
        args = get_config(**{"img_size": image_size} | kwargs)
        args.normalize_output = kind not in ("imageclassification", "vqav2")
        return model_class(args, **defaults | kwargs)

    name = f"beit3_{size}_patch16_{image_size}_{kind}"
    make_model.__name__ = make_model.__qualname__ = name
    return make_model


MODELS = {
    f"beit3_{size}_patch16_{image_size}_{kind}": _make_factory(size, image_size, kind)
    for size, kinds in IMAGE_SIZES.items()
    for kind, image_sizes in kinds.items()
    for image_size in image_sizes
}
"""Name that upstream registers -> its factory; each is also an attribute of `beit3.compat`."""


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> BEiT3Wrapper:
    """Returns a model by its registered name, as timm's `create_model` does.

    `kwargs` are `ARGUMENTS`; None counts as not given.

    Raises ValueError for a name that upstream does not register, and for an unknown argument unless
    it asks for nothing.
    """
    if model_name not in MODELS:
        raise ValueError(
            f"no model {model_name}{suggest(model_name, list(MODELS))} (known: {', '.join(MODELS)})"
        )
    arguments = {name: value for name, value in kwargs.items() if value is not None}
    return MODELS[model_name](pretrained=pretrained, **arguments)
