"""Upstream's classes and factories over our network, for code that copied unilm/beit3.

Such code changes an import. Names, arguments, results and `state_dict` keys are upstream's;
parameters and attributes inside the network are ours (docs/migrating.md has a table). Nothing is
stored between calls, so one model serves several threads. Padding is 1 where a token is padding,
`attn_mask` is 1 where attention is blocked.

Upstream's own signatures end in **kwargs that it passes on and ignores, and its users rely on that:
so do those of the classes here. A factory (`MODELS`, `create_model`) refuses an argument that it
does not know and that asks for something. What cannot be honored is a ValueError that names it.
"""

from typing import Any

from beit3.compat.factories import MODELS, create_model, load_model_and_may_interpolate
from beit3.compat.modeling import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    ClipLoss,
    Pooler,
    TwoLayerMLP,
)
from beit3.compat.network import (
    BEiT3,
    BEiT3Wrapper,
    EncoderConfig,
    _get_base_config,
    _get_large_config,
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
