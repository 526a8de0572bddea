"""The packages of the extra `export`, imported where they are used."""

import importlib
from types import ModuleType

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def import_extra(module: str) -> ModuleType:
    """Imports a module of the extra. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"exports need {module.partition('.')[0]}: pip install 'beit3[export]'"
        ) from None
