"""Reads state dicts from foreign files, safetensors or pickles of `torch.save`.

Nothing in a file is executed.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3.tokenizer.teacher_files import is_torchscript
from beit3.weights.catalog import describe_file

WRAPPING_KEYS = ("model", "module", "state_dict")
"""Keys under which trainers store the state dict of a checkpoint."""


def read_state_dict(path: str | Path, *, as_stored: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of a file under the file's own names.

    The content decides how the file is read, not its ending. A state dict may lie under one of
    `WRAPPING_KEYS`.

    Args:
        path: The file.
        as_stored: Keep the precision of the file. By default floating tensors become float32.

    Raises:
        ValueError: The file is missing, damaged, of another kind, or holds more than tensors. For
            a missing file with the name of a released one, the message says what that file is.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, a released file is needed here: give a .pth file")
    if not path.is_file():
        remedy = describe_file(path.name) or "give a released .pth file or a directory of weights"
        raise ValueError(f"no weights at {path}: {remedy}")
    state = _unwrap(_read_content(path))
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no named tensors: a state dict is expected")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(
                f"{path}: {name!r} is of type {kind}: a state dict of tensors is expected"
            )
    return {
        str(name): tensor if as_stored else to_float32(tensor) for name, tensor in state.items()
    }


def to_float32(tensor: Tensor) -> Tensor:
    """Returns a floating tensor in float32 and any other tensor unchanged."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _read_content(path: Path) -> Any:
    """Returns the deserialized file; its first bytes tell the format."""
    with path.open("rb") as file:
        start = file.read(9)
    is_zip, is_pickle = start[:4] == b"PK\x03\x04", start[:1] == b"\x80"
    if is_zip or is_pickle:
        return _read_pickle(path)
    if start[8:] == b"{":  # safetensors: 8 bytes of length, then a JSON header
        return _read_safetensors(path)
    raise ValueError(f"{path} is neither a torch nor a safetensors file: download it again")


def _read_pickle(path: Path) -> Any:
    """Returns what `torch.save` wrote, refusing everything that would have to be executed."""
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, as OpenAI's CLIP files are: "
            "a file of tensors is needed here"
        )
    try:
        # Checkpoints of the released trainer carry their command line (argparse.Namespace).
        # torch.load gets an open file, because with a path it goes by the ending.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused_name = re.search(r"GLOBAL (\S+)", str(error))
        content = refused_name[1] if refused_name else "something damaged"
        raise ValueError(
            f"{path} is refused, it holds {content}: ask for a file of tensors alone"
        ) from None
    except (RuntimeError, EOFError, KeyError, AttributeError, IndexError, ValueError, OSError):
        raise ValueError(f"{path} is not a complete torch file: download it again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path} is not a complete safetensors file: download it again") from None


def _unwrap(content: Any) -> Any:
    """Returns the state dict inside a checkpoint, or `content` itself where nothing wraps it."""
    if isinstance(content, Mapping):
        for key in WRAPPING_KEYS:
            if isinstance(content.get(key), Mapping):
                return content[key]
    return content
