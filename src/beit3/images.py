"""Opening images: any file, tar member or Pillow image becomes uint8 [3, H, W] RGB, or a ValueError that names it."""

import io
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from beit3.files import parse_tar_member, read_tar_member

# Pillow's own limit against decompression bombs (2 x 89.5 million pixels), and a file no photograph reaches.

MAX_PIXELS = 178_956_970

MAX_BYTES = 1 << 29

SMALL_FILE_BYTES = 4096

UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, OverflowError, struct.error)
"""What Pillow raises on files that are damaged or none."""


def open_image(image: str | Path | Image.Image) -> Tensor:
    """A file, a member of a tar or a Pillow image, upright as its EXIF orientation says: uint8 [3, H, W] RGB.

    Of an animation the first frame. ValueError naming the file when it is absent, no image, damaged, or beyond 178 million
    pixels or 512 MiB. Callers must not write into the tensor: those of tiny files are shared.
    """
    if isinstance(image, Image.Image):
        return _convert(image)
    tar, _, size = parse_tar_member(str(image))
    try:
        status = os.stat(tar or image)
    except OSError as error:
        raise ValueError(f"cannot read image {image}: {error.strerror}") from error
    size = size if tar else status.st_size
    if size > MAX_BYTES:
        raise ValueError(f"image {image} has {size} bytes, more than {MAX_BYTES}: make it smaller")
    return (
        _read_small_image(str(image), status.st_mtime_ns)
        if size <= SMALL_FILE_BYTES
        else _read_image(image)
    )


def find_header_fault(image: str | BinaryIO, size: tuple[int, int] | None = None) -> str:
    """'' for an image whose header can be read, and is of this width and height where they are given; else what is wrong with it."""
    try:
        with Image.open(image) as header:
            found = header.size if size is None else read_upright_size(header)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"
    if min(found) <= 0:
        return "is empty"
    return (
        ""
        if size in (None, found)
        else f"has {found[0]} x {found[1]} pixels, its annotations are of {size[0]} x {size[1]}"
    )


def read_upright_size(header: Image.Image) -> tuple[int, int]:
    """Width and height of an image, opened but not read, as `open_image` turns it by its EXIF orientation."""
    # Asked for EXIF it does not have, a PNG is read whole.
    quarter = "exif" in header.info and header.getexif().get(ExifTags.Base.Orientation) in (
        5,
        6,
        7,
        8,
    )
    return (header.height, header.width) if quarter else header.size


@lru_cache(maxsize=16384)
def _read_small_image(path: str, modified: int) -> Tensor:
    """Files of a few KB stay decoded: opening them takes longer than a small network needs to look at them."""
    return _read_image(path)


def _read_image(path: str | Path) -> Tensor:
    tar, start, size = parse_tar_member(str(path))
    try:
        data = read_tar_member(tar, start, size) if tar else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(data)) as header:
            if header.width * header.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if header.format in ("JPEG", "PNG") and header.mode in ("RGB", "L"):
                return _decode(data)
            return _convert(header)
    except Image.DecompressionBombError:
        raise ValueError(
            f"image {path} has more than {MAX_PIXELS} pixels: make it smaller"
        ) from None
    except UNREADABLE as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def _decode(data: bytes) -> Tensor:
    """The common cases by torchvision, about twice as fast as Pillow and equal to it within 1/255."""
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _convert(image: Image.Image) -> Tensor:
    """Every other mode by Pillow: palettes, alpha (dropped), CMYK, and 16 bits, of which the upper 8 are kept."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
