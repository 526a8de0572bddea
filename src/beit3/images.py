"""Opening images: every image becomes uint8 [3, H, W] RGB, or a ValueError that names it.

No byte of a file crashes the process. Pillow decodes all formats but JPEG, the common case, which
torchvision decodes 1.3 times as fast to the same pixels (`benchmarks/image_decoding.py`); that
decoder survived the damaged files
of `benchmarks/fuzz.py`. torchvision's PNG decoder did not, and is not used.
"""

import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from beit3.files import parse_tar_member, read_tar_member

ImageInput = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
"""What `open_image` takes."""

Image.init()
FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
"""Formats that are read, as Pillow names them; older versions of Pillow lack AVIF.

Other formats may run programs, as EPS does, or take any bytes for an image, as TGA does.
"""

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 "
    ".j2k .avif".split()
)
"""Endings of these formats' files, in lower case."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit against decompression bombs, 2 x 89.5 million pixels."""

MAX_BYTES = 1 << 29
"""Largest file that is opened, 512 MiB: no photograph is that large."""

SMALL_FILE_BYTES = 4096
"""Files up to this size stay decoded in memory."""

OTHER_FILES = (
    (rb"\s*<(svg|\?xml.*<svg)", "an SVG drawing: export it as PNG"),
    (rb"\s*<", "a web page: download the image again"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC photograph: convert it to JPEG"),
    (rb"....ftypavi[fs]", "an AVIF image, which this Pillow cannot read: convert it to PNG"),
    (rb"....ftyp", "a video: extract its frames as images"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image: convert it to PNG"),
    (rb"8BPS", "a Photoshop file: export it as PNG"),
    (rb"%PDF|%!PS", "a document: export its pages as PNG"),
    (rb"\x93NUMPY", "a numpy array: give the array itself, uint8 [H, W, 3]"),
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file: run git lfs pull"),
    (rb"\x1f\x8b|PK\x03\x04|7z\xbc\xaf|Rar!", "an archive: unpack it"),
    (rb"\Z", "empty"),
)
"""Pattern of a file's first bytes -> what the file is in place of an image, and the remedy."""

SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_LOADING = tuple(threading.Lock() for _ in range(61))
"""Locks by an image's identity: Pillow reads a file that is opened lazily in one thread only."""


# One image ------------------------------------------------------------------------------------


def open_image(image: ImageInput) -> Tensor:
    """Reads an image as RGB and turns it upright as its EXIF orientation says.

    A Pillow image is turned where it is as `Image.open` returned it.
    Transparency is dropped, and of 16 bits per channel the upper 8 are kept. Of an animation it is
    the first frame.

    Args:
        image: A file, a member of a tar file ("photos.tar@1536+20480"), the bytes of a file, an
            open binary file, a Pillow image, a uint8 array [H, W] or [H, W, 1, 3 or 4], or a uint8
            tensor [1 or 3, H, W].

    Returns:
        uint8 [3, H, W]. Do not write into it: the tensors of small files are shared.

    Raises:
        ValueError: The file is absent, damaged, no image, larger than 178 million pixels or
            512 MiB, or its pixels have no known range (floats, 32-bit integers). The message names
            it.
    """
    if isinstance(image, str | Path):
        size, modified = measure_file(image)
        read = _read_small_image if size <= SMALL_FILE_BYTES else _read_image
        return read(str(image), modified)
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(bytes(image), f"image of {len(image)} bytes")
    if isinstance(image, Image.Image):
        # A transformed image keeps the orientation of its file, which applies to it no more.
        is_from_file = isinstance(image, ImageFile.ImageFile)
        orientation = read_orientation(image) if is_from_file else 1
        file_name = getattr(image, "filename", "") or f"of mode {image.mode}"
        with explain_faults(f"Pillow image {file_name}"):
            with _LOADING[id(image) % len(_LOADING)]:
                image.load()
            return _turn_upright(_convert(image), orientation)
    if isinstance(image, np.ndarray):
        return _convert_array(image)
    if isinstance(image, Tensor):
        return _convert_tensor(image)
    if hasattr(image, "read"):
        return _decode(image.read(MAX_BYTES + 1), f"image {getattr(image, 'name', 'from a file')}")
    raise ValueError(
        f"an image cannot be a {type(image).__name__}: give a path, the bytes of a file, a Pillow "
        "image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]"
    )


@lru_cache(maxsize=16384)
def _read_small_image(path: str, modified: int) -> Tensor:
    """Caches files of a few KB: a small network takes less time for them than decoding does."""
    return _read_image(path, modified)


def _read_image(path: str, _modified: int) -> Tensor:
    return _decode(read_image_bytes(path), f"image {path}")


def _decode(data: bytes, name: str) -> Tensor:
    """Decodes the content of a file."""
    with open_with_pillow(data, name) as header:
        orientation = read_orientation(header)
        if header.format == "JPEG" and header.mode in ("RGB", "L"):
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = decode_jpeg(buffer, mode=ImageReadMode.RGB)
        else:
            pixels = _convert(header)
    return _turn_upright(pixels, orientation)


def _convert(image: Image.Image) -> Tensor:
    """Converts the pixels of a Pillow image of any mode that `find_mode_fault` accepts."""
    fault = "is empty" if min(image.size) <= 0 else find_mode_fault(image)
    if fault:
        raise ValueError(fault)
    if image.mode.startswith("I"):
        upper_bits = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(upper_bits.astype(np.uint8))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _convert_array(array: np.ndarray) -> Tensor:
    """Copies a uint8 array [H, W] or [H, W, 1, 3 or 4] to [3, H, W] without its alpha channel."""
    channels = array.shape[2:] or (1,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels[0] not in (1, 3, 4):
        raise ValueError(
            f"an image cannot be a {array.dtype} array {list(array.shape)}: give uint8 [H, W, 3]"
        )
    if not array.size:
        raise ValueError(f"an image array {list(array.shape)} is empty")
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1)[:, :, :3].copy())
    return pixels.expand(-1, -1, 3).permute(2, 0, 1)


def _convert_tensor(tensor: Tensor) -> Tensor:
    """Copies a uint8 tensor [1 or 3, H, W] to [3, H, W] on the CPU."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            f"an image cannot be a {tensor.dtype} tensor {list(tensor.shape)}: give uint8 "
            "[3, H, W] of 0 to 255, before normalization"
        )
    if not tensor.numel():
        raise ValueError(f"an image tensor {list(tensor.shape)} is empty")
    return tensor.detach().cpu().clone().expand(3, -1, -1)


def _turn_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Applies an EXIF orientation, 1 to 8, to [3, H, W]."""
    if orientation in SWAPPING_ORIENTATIONS:
        pixels = pixels.transpose(1, 2)
    flipped_axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flipped_axes) if flipped_axes else pixels


# Headers and bytes ----------------------------------------------------------------------------


def find_header_fault(image: str | BinaryIO, size: tuple[int, int] | None = None) -> str:
    """Checks an image by its header alone; returns the fault as text, "" for none.

    `size` is the (width, height) that the image should have once it is upright, None for any.
    """
    try:
        with open_with_pillow(image, "") as header:
            fault = find_mode_fault(header)
            actual = header.size if size is None else read_upright_size(header)
    except ValueError as error:
        return str(error).strip()
    if fault:
        return fault
    if min(actual) <= 0:
        return "is empty"
    if size in (None, actual):
        return ""
    return (
        f"has {actual[0]} x {actual[1]} pixels, its annotations are of {size[0]} x {size[1]} pixels"
    )


def find_mode_fault(image: Image.Image) -> str:
    """Returns why the pixels of an opened image have no 8-bit version, "" if they have one.

    PNG and PPM files of 16 bits may be opened as mode "I", whose values then fill 0 to 65,535.
    """
    if image.mode == "F":
        return "has float pixels, whose range is not known: save it with 8 bits per channel"
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return "has 32-bit pixels, whose range is not known: save it with 8 bits per channel"
    return ""


def read_upright_size(header: Image.Image) -> tuple[int, int]:
    """Returns (width, height) of an opened Pillow image as `open_image` will turn it upright.

    The pixels are not decoded.
    """
    if read_orientation(header) in SWAPPING_ORIENTATIONS:
        return header.height, header.width
    return header.size


def read_orientation(header: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image, 1 to 8; 1 if it has none or it is damaged.

    TIFF files have none here: Pillow turns them itself.
    """
    # A PNG without EXIF data is decoded completely when it is asked for some.
    if "exif" not in header.info:
        return 1
    try:
        orientation = int(header.getexif().get(ExifTags.Base.Orientation) or 1)
    except Exception:  # damaged EXIF data raises whatever its bytes lead to
        return 1
    return orientation if 1 <= orientation <= 8 else 1


@contextmanager
def open_with_pillow(source: str | Path | bytes | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens an image of `FORMATS` without decoding it.

    Raises ValueError, which begins with `name`, for what is no image or has too many pixels, and
    for everything that goes wrong with its bytes inside the block.
    """
    if isinstance(source, str | Path):
        measure_file(source)
    if isinstance(source, bytes):
        if len(source) > MAX_BYTES:
            raise ValueError(f"{name} has more than {MAX_BYTES} bytes: make it smaller")
        source = io.BytesIO(source)
    with explain_faults(name), _open_known_format(source) as header:
        if header.width * header.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        yield header


def _open_known_format(source: str | Path | BinaryIO) -> Image.Image:
    """Opens an image of `FORMATS`; raises ValueError that says what another file is."""
    try:
        return Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                start = file.read(256)
        else:
            source.seek(0)
            start = source.read(256)
        for pattern, description in OTHER_FILES:
            if re.match(pattern, start, re.DOTALL):
                raise ValueError(f"is {description}") from None
        raise


@contextmanager
def explain_faults(name: str) -> Iterator[None]:
    """Turns every exception of a decoder into a ValueError that begins with `name`."""
    try:
        yield
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {MAX_PIXELS} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image of a known format") from None
    # Damaged bytes lead Pillow's readers to every kind: struct.error, KeyError, IndexError, ...
    except Exception as error:
        fault = " ".join(str(error).split()) or type(error).__name__
        verb = "" if fault.startswith(("has ", "is ")) else "cannot be read: "
        raise ValueError(f"{name} {verb}{fault}") from error


def measure_file(path: str | Path) -> tuple[int, int]:
    """Returns the size of a file or tar member in bytes and the file's time of change.

    Raises ValueError when it is absent, too large, or no regular file: reading a pipe never ends.
    """
    tar, _, size = parse_tar_member(str(path))
    try:
        status = os.stat(tar or path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read image {path}: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read image {path}: it is not a file")
    if not tar:
        size = status.st_size
    if size > MAX_BYTES:
        raise ValueError(f"image {path} has {size} bytes, more than {MAX_BYTES}: make it smaller")
    return size, status.st_mtime_ns


def read_image_bytes(path: str | Path) -> bytes:
    """Reads a file or a member of a tar; raises ValueError naming it when that fails."""
    tar, start, size = parse_tar_member(str(path))
    try:
        return read_tar_member(tar, start, size) if tar else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from error
