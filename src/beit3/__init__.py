"""BEiT-3: images as a foreign language, from pretraining to every task of the paper."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BEiT3": "beit3.model.beit3",
    "Encoded": "beit3.model.beit3",
    "ModelConfig": "beit3.model.config",
    "TINY": "beit3.model.config",
    "TINY_RELEASE": "beit3.model.config",
    "BASE": "beit3.model.config",
    "LARGE": "beit3.model.config",
    "GIANT": "beit3.model.config",
    "Cache": "beit3.model.cache",
    "Task": "beit3.task",
    "TaskConfig": "beit3.recipe",
    "DataConfig": "beit3.recipe",
    "OptimConfig": "beit3.recipe",
    "RunConfig": "beit3.recipe",
    "Recipe": "beit3.recipe",
    "TextTokenizer": "beit3.tokenizer.text",
    "VisualTokenizer": "beit3.tokenizer.visual",
    "Preprocessing": "beit3.data.views.preprocessing",
    "train": "beit3.training.loop",
    "load": "beit3.predict",
    "from_pretrained": "beit3.predict",
    "Predictor": "beit3.predict",
}
"""Public names and where they live; each is imported when it is first asked for, so `import beit3`
costs nothing."""

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from beit3.data.views.preprocessing import Preprocessing as Preprocessing
    from beit3.model.beit3 import BEiT3 as BEiT3
    from beit3.model.beit3 import Encoded as Encoded
    from beit3.model.cache import Cache as Cache
    from beit3.model.config import BASE as BASE
    from beit3.model.config import GIANT as GIANT
    from beit3.model.config import LARGE as LARGE
    from beit3.model.config import TINY as TINY
    from beit3.model.config import TINY_RELEASE as TINY_RELEASE
    from beit3.model.config import ModelConfig as ModelConfig
    from beit3.predict import Predictor as Predictor
    from beit3.predict import from_pretrained as from_pretrained
    from beit3.predict import load as load
    from beit3.recipe import DataConfig as DataConfig
    from beit3.recipe import OptimConfig as OptimConfig
    from beit3.recipe import Recipe as Recipe
    from beit3.recipe import RunConfig as RunConfig
    from beit3.recipe import TaskConfig as TaskConfig
    from beit3.task import Task as Task
    from beit3.tokenizer.text import TextTokenizer as TextTokenizer
    from beit3.tokenizer.visual import VisualTokenizer as VisualTokenizer
    from beit3.training.loop import train as train


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'beit3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
