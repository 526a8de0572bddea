"""Reads state dicts from foreign files, by whatever trainer they were written."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from beit3 import tensor_files
from beit3.tensor_files import TensorFile
from beit3.weights.names import explain_missing


def read_checkpoint(path: str | Path, *, as_stored: bool = False) -> TensorFile:
    """Returns the tensors of a file under the file's own names, and what was passed over in it.

    `beit3.tensor_files` says which files are read, and under which keys and names.

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
        raise ValueError(explain_missing(path))
    file = tensor_files.read_tensors(path)
    if as_stored:
        return file
    tensors = {name: to_float32(tensor) for name, tensor in file.tensors.items()}
    return replace(file, tensors=tensors)


def read_state_dict(path: str | Path, *, as_stored: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of `read_checkpoint` alone."""
    return read_checkpoint(path, as_stored=as_stored).tensors


def to_float32(tensor: Tensor) -> Tensor:
    """Returns a floating tensor in float32 and any other tensor unchanged."""
    return tensor.float() if tensor.is_floating_point() else tensor
