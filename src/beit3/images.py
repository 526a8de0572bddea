"""Opening images: every image becomes uint8 [3, H, W] RGB, or a ValueError that names the file."""

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

MAX_PIXELS = 178_956_970
"""Pillow's own limit against decompression bombs, 2 x 89.5 million pixels."""

MAX_BYTES = 1 << 29
"""Largest file that is opened, 512 MiB: no photograph is that large."""

SMALL_FILE_BYTES = 4096
"""Files up to this size stay decoded in memory."""

DECODE_ERRORS = (OSError, RuntimeError, SyntaxError, ValueError, OverflowError, struct.error)
"""Exceptions that Pillow raises for files that are damaged or are not images."""

SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def open_image(image: str | Path | Image.Image) -> Tensor:
    """Reads an image as RGB and turns it upright as its EXIF orientation says.

    Args:
        image: A file, a member of a tar file ("photos.tar@1536+20480") or a Pillow image.

    Returns:
        uint8 [3, H, W]. Of an animation it is the first frame. Do not write into it: the tensors
        of small files are shared.

    Raises:
        ValueError: The file is absent, damaged, no image, or larger than 178 million pixels or
            512 MiB. The message names it.
    """
    if isinstance(image, Image.Image):
        return _convert(image)
    tar, _, size = parse_tar_member(str(image))
    try:
        status = os.stat(tar or image)
    except OSError as error:
        raise ValueError(f"cannot read image {image}: {error.strerror}") from error
    if not tar:
        size = status.st_size
    if size > MAX_BYTES:
        raise ValueError(f"image {image} has {size} bytes, more than {MAX_BYTES}: make it smaller")
    if size <= SMALL_FILE_BYTES:
        return _read_small_image(str(image), status.st_mtime_ns)
    return _read_image(image)


def find_header_fault(image: str | BinaryIO, size: tuple[int, int] | None = None) -> str:
    """Checks an image by its header alone; returns the fault as text, "" for none.

    `size` is the (width, height) that the image should have once it is upright, None for any.
    """
    try:
        with Image.open(image) as header:
            actual = header.size if size is None else read_upright_size(header)
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"
    if min(actual) <= 0:
        return "is empty"
    if size in (None, actual):
        return ""
    return (
        f"has {actual[0]} x {actual[1]} pixels, its annotations are of {size[0]} x {size[1]} pixels"
    )


def read_upright_size(header: Image.Image) -> tuple[int, int]:
    """Returns (width, height) of an opened Pillow image as `open_image` will turn it upright.

    The pixels are not decoded.
    """
    # A PNG without EXIF data is decoded completely when it is asked for some.
    if "exif" not in header.info:
        return header.size
    if header.getexif().get(ExifTags.Base.Orientation) in SWAPPING_ORIENTATIONS:
        return header.height, header.width
    return header.size


@lru_cache(maxsize=16384)
def _read_small_image(path: str, modified: int) -> Tensor:
    """Caches files of a few KB: a small network takes less time for them than decoding does."""
    return _read_image(path)


def _read_image(path: str | Path) -> Tensor:
    """Decodes a file or a member of a tar."""
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
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def _decode(data: bytes) -> Tensor:
    """Decodes the common formats: about twice as fast as Pillow, and equal to it within 1/255."""
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _convert(image: Image.Image) -> Tensor:
    """Converts every other mode with Pillow: palettes, CMYK, alpha, 16 bits per channel.

    Alpha is dropped, and of 16 bits the upper 8 are kept.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
