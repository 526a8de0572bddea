"""Reading label maps, which give every pixel of an image a class.

A label map is read as [H, W], uint8 or int32, in which `ignore` marks pixels without a label.
"""

import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit3.images import measure_file, open_image, open_with_pillow, read_image_bytes

IGNORE_INDEX = 255

INDEXED_MODES = {"1", "L", "P", "I", "I;16", "I;16B"}
"""Pillow's modes of one integer per pixel. In a palette it is the index, whatever the color."""


def open_labeled_image(
    image: str | Path,
    label_map: str | Path | io.BytesIO,
    *,
    num_classes: int,
    reduce_zero: bool = False,
    unlabeled: Collection[int] = (),
    lookup: Sequence[int] = (),
    ignore: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Opens an image, uint8 [3, H, W], and its label map [H, W].

    The options are those of `open_label_map`. Raises ValueError naming the file when one of them
    cannot be read, or their sizes differ.
    """
    pixels = open_image(image)
    labels = open_label_map(
        label_map,
        num_classes=num_classes,
        reduce_zero=reduce_zero,
        unlabeled=unlabeled,
        lookup=lookup,
        ignore=ignore,
    )
    if pixels.shape[1:] != labels.shape:
        (height, width), (map_height, map_width) = pixels.shape[1:], labels.shape
        raise ValueError(
            f"label map {label_map} is {map_width} x {map_height}, "
            f"its image {image} {width} x {height}: give pairs of one size"
        )
    return pixels, labels


def open_label_map(
    path: str | Path | io.BytesIO,
    *,
    num_classes: int,
    reduce_zero: bool = False,
    unlabeled: Collection[int] = (),
    lookup: Sequence[int] = (),
    ignore: int = IGNORE_INDEX,
) -> Tensor:
    """Reads a label map.

    Args:
        path: A file, a member of a tar file, or the file's content.
        num_classes: Number of classes.
        reduce_zero: Whether 0 in the file means "no label" and k is class k - 1, as in ADE20K.
        unlabeled: Further values in the file that mean "no label", besides `ignore`.
        lookup: Label of each value in the file; it is applied before all other options.
        ignore: Label of pixels without a label.

    Returns:
        Labels [H, W] between 0 and num_classes - 1, or `ignore`. They are uint8 if all of them
        fit, else int32.

    Raises:
        ValueError: The file cannot be read, has more than one channel or contains another value.
            The message names it.
    """
    if 0 <= ignore < num_classes:
        raise ValueError(
            f"the label {ignore} for ignored pixels is one of the {num_classes} classes: "
            "give another"
        )
    values = read_pixel_values(path)
    if lookup:
        if values.max(initial=0) >= len(lookup):
            raise ValueError(
                f"label map {path} holds {values.max()}, its dataset has values up to "
                f"{len(lookup) - 1}: give files of this dataset"
            )
        values = np.asarray(lookup)[values]
    ignored_values = [ignore, *unlabeled, *([0] if reduce_zero else [])]
    is_ignored = np.isin(values, ignored_values)
    labels = np.where(is_ignored, ignore, values - reduce_zero)
    is_wrong = ~is_ignored & ((labels < 0) | (labels >= num_classes))
    if is_wrong.any():
        value = int(labels[is_wrong][0]) + reduce_zero
        start = " from 1 on" if reduce_zero else ""
        raise ValueError(
            f"label map {path} holds {value}, beyond its {num_classes} classes{start}: give the "
            "number of classes that the files have, or name the value as unlabeled"
        )
    fits_uint8 = max(ignore, num_classes - 1) <= 255
    return torch.from_numpy(labels.astype(np.uint8 if fits_uint8 else np.int32))


def read_pixel_values(path: str | Path | io.BytesIO) -> np.ndarray:
    """Reads the integers of an image with one channel, int64 [H, W].

    They are gray values of 1 to 16 bits, or indices into a palette. Raises ValueError naming the
    file when it cannot be read or has another mode.
    """
    data = path.getvalue() if isinstance(path, io.BytesIO) else _read_bytes(path)
    with open_with_pillow(data, f"label map {path}") as image:
        mode, values = image.mode, np.asarray(image)
    if mode not in INDEXED_MODES:
        raise ValueError(
            f"label map {path} is an image of mode {mode}: "
            "give one integer per pixel, 8 or 16 bits of gray or a palette"
        )
    return values.astype(np.int64) // _find_gray_factor(data, mode)


def _read_bytes(path: str | Path) -> bytes:
    """Reads a file or a member of a tar; a label map may be as large as an image."""
    measure_file(path)
    return read_image_bytes(path)


def _find_gray_factor(data: bytes, mode: str) -> int:
    """Returns the factor by which Pillow multiplies gray values of 2 or 4 bits: 85 or 17.

    It makes white 255. A PNG file has the number of bits in byte 24.
    """
    bits = data[24] if data.startswith(b"\x89PNG") and mode == "L" else 8
    return 255 // (2**bits - 1)
