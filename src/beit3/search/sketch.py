"""An 8-bit copy of a shard's vectors, which exact search reads first.

A sketch holds integers that, times one scale, are the vectors but for an error whose largest length
is known. A product with a sketch tells the score of a row within strict limits, at half the bytes
and a fraction of the arithmetic; rows that can be among the best are then scored exactly.

Vectors are rotated before they are rounded: where a few dimensions are much larger than the others,
as in many embeddings, one scale would leave little precision to the rest. The rotation flips signs
and mixes blocks of dimensions by a Hadamard transform, that is by sums and differences only, so
that the bytes do not depend on how many threads a computer has. Its rule is part of the format.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beit3.files import atomic_write, flush_to_disk, read_json

SKETCH_DIRECTORIES = {"image": "img_int8", "text": "text_int8"}
MIN_ROWS = 1024
"""Shards of fewer rows get no sketch: reading their vectors themselves takes milliseconds."""

LEVELS = 127
"""Codes are -127 to 127."""

CHUNK_ROWS = 1024
CHECKED_ROWS = 4
"""Rows of a shard that are compared with its sketch when a folder is opened."""

FLOAT_ERROR = 3e-6
"""More than float32 adds to an error: at most 2^-24 of the length in each of the 10 to 12 steps."""


@dataclass(frozen=True)
class Sketch:
    """An 8-bit copy of vectors.

    Attributes:
        codes: int8 [rows, dim]; `codes * scale` are the rotated vectors, nearly.
        scale: Unit of the codes.
        error: Largest distance of a row of `codes * scale` from its rotated vector.
    """

    codes: np.ndarray
    scale: float
    error: float


def rotate(vectors: np.ndarray) -> np.ndarray:
    """Rotates float32 or float64 vectors [N, dim]: products of rotated vectors are the same."""
    dim = vectors.shape[1]
    block = min(dim & -dim, 1024)  # the largest power of two that divides the dimension
    # RandomState draws the same numbers in every version of NumPy.
    signs = np.random.RandomState(0).choice([-1, 1], dim).astype(vectors.dtype)
    rotated = vectors * signs
    width = 1
    while width < block:
        pairs = rotated.reshape(len(vectors), -1, 2, width)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rotated = np.stack([first + second, first - second], axis=2).reshape(vectors.shape)
        width *= 2
    return rotated * vectors.dtype.type(1 / math.sqrt(block))


def round_to_codes(rotated: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 codes of rotated vectors and the error of each row, see `Sketch`."""
    codes = np.rint(rotated / scale)
    remainders = rotated - codes * scale
    errors = np.sqrt(np.square(remainders).sum(axis=1, dtype=np.float64)) + FLOAT_ERROR
    return codes.astype(np.int8), errors


def find_scale(largest: np.ndarray) -> np.ndarray:
    """Returns the scale at which numbers of at most `largest` fit into codes."""
    return np.where(largest > 0, largest / largest.dtype.type(LEVELS), 1).astype(largest.dtype)


def make_sketch(vectors: np.ndarray) -> Sketch:
    """Makes the sketch of vectors [rows, dim], float16 or float32."""
    starts = range(0, len(vectors), CHUNK_ROWS)
    rotated = np.empty(vectors.shape, dtype=np.float32)
    largest = np.float32(0)
    for start in starts:
        chunk = rotate(vectors[start : start + CHUNK_ROWS].astype(np.float32))
        rotated[start : start + CHUNK_ROWS] = chunk
        largest = np.maximum(largest, np.abs(chunk).max())
    scale = find_scale(np.asarray(largest))
    codes = np.empty(vectors.shape, dtype=np.int8)
    error = 0.0
    for start in starts:
        rows = slice(start, start + CHUNK_ROWS)
        codes[rows], errors = round_to_codes(rotated[rows], scale)
        error = max(error, float(errors.max()))
    # Rounded up: the last digits of a sum may differ among processors.
    return Sketch(codes, float(scale), math.ceil(error * 1e6) / 1e6)


def get_codes_path(folder: str | Path, number: int, modality: str) -> Path:
    """Returns the path of a sketch's codes, as in "V/img_int8/img_int8_0.npy"."""
    name = SKETCH_DIRECTORIES[modality]
    return Path(folder) / name / f"{name}_{number}.npy"


def write_sketch(folder: str | Path, number: int, modality: str, vectors: np.ndarray) -> None:
    """Writes the sketch of a shard's vectors as they are stored; removes it for few rows."""
    remove_sketch(folder, number, modality)
    if len(vectors) < MIN_ROWS:
        return
    path = get_codes_path(folder, number, modality)
    sketch = make_sketch(vectors)
    with atomic_write(path) as file:
        np.save(file, sketch.codes)
        file.flush()
        os.fsync(file.fileno())
    # The facts come last: without them there is no sketch.
    facts = json.dumps({"scale": sketch.scale, "error": sketch.error})
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(f"{facts}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(path.parent)


def remove_sketch(folder: str | Path, number: int, modality: str) -> None:
    """Removes the sketch of a shard, if there is one."""
    path = get_codes_path(folder, number, modality)
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def open_sketch(
    folder: str | Path, number: int, modality: str, vectors: np.ndarray
) -> Sketch | None:
    """Opens the sketch of a shard, memory-mapped; None where there is none.

    Raises:
        ValueError: If it is damaged, or not of the shard's vectors.
    """
    path = get_codes_path(folder, number, modality)
    facts_path = path.with_suffix(".json")
    if not facts_path.is_file():
        return None
    remedy = f"remove {path.parent} (search is slower without it)"
    try:
        facts = read_json(facts_path)
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
        sketch = Sketch(codes, float(facts["scale"]), float(facts["error"]))
        if not (sketch.scale > 0 and sketch.error >= 0):
            raise ValueError(f"scale {sketch.scale}, error {sketch.error}")
    except (ValueError, EOFError, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {remedy}") from None
    if not _is_of(sketch, vectors):
        raise ValueError(f"{path} is not of the vectors that are stored beside it: {remedy}")
    return sketch


def _is_of(sketch: Sketch, vectors: np.ndarray) -> bool:
    """Tells whether some rows of a sketch are what vectors give."""
    if sketch.codes.shape != vectors.shape or sketch.codes.dtype != np.int8:
        return False
    rows = np.linspace(0, len(vectors) - 1, CHECKED_ROWS).astype(int)
    rotated = rotate(vectors[rows].astype(np.float32))
    codes, _ = round_to_codes(rotated, np.asarray(sketch.scale, dtype=np.float32))
    return bool((codes == sketch.codes[rows]).all())
