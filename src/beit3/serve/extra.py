"""The packages of the extra `serve`, imported where they are used."""

import importlib
from types import ModuleType


def import_extra(module: str) -> ModuleType:
    """Imports a module of the extra. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise ValueError(f"the server needs {package}: pip install 'beit3[serve]'") from None
