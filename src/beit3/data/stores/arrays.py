"""Opens .npy files, which may come from outside."""

import tokenize
from pathlib import Path

import numpy as np

DAMAGES = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    TypeError,
    SyntaxError,
    RecursionError,
    tokenize.TokenError,
)
"""What numpy raises where the header of a file is damaged: it reads it as Python source."""


def open_array(path: Path, remedy: str) -> np.ndarray:
    """Maps the array of an .npy file without reading it.

    Raises ValueError that names the file and ends with `remedy` where it is no such file, or cut.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGES as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}): {remedy}") from None
    if not isinstance(array, np.ndarray):  # numpy also opens .npz under any name
        raise ValueError(f"{path} cannot be read (it is no .npy file): {remedy}")
    return array
