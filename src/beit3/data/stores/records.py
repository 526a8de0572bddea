"""Records: one JSON object per line of `root/<task>/<source>/<split>.jsonl`, read at random; and the images they name.

Image paths inside a record are relative to `root` (".." allowed), so `Path(root) / record["image"]` is the file; an image
may also be a range of bytes of a tar, "photos/00000.tar@1536+20480" (start and size). A source may be several sets in
folders below its own. In place of a folder of ours, a root may hold upstream's index files as they are
(`beit3.data.stores.upstream`). Across the border: dict; image uint8 [3, H, W] RGB.
"""

import io
import json
import mmap
import operator
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

# Pillow's own limit against decompression bombs (2 x 89.5 million pixels), and a file no photograph reaches.
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 29
TINY_BYTES = 4096

UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, OverflowError, struct.error)
"""What Pillow raises on files that are damaged or none."""

IMAGES = ("image", "image2")
"""Fields of a record that name an image."""
FILES = (*IMAGES, "label_map")
"""These, and what else names a file: a label map holds numbers, no picture."""

STORES = (".jsonl", ".shards", ".tokens")
"""Endings of a split's records: one JSON object a line, an index of tars (`beit3.data.stores.shards`), or of ids (`beit3.data.stores.tokens`)."""

MEMBER = re.compile(r"(.+\.tar)@(\d{1,18})\+(\d{1,18})", re.DOTALL)
OPEN_TARS = 64
"""Tars that a process keeps open, the last ones used."""

# Upstream's index files of a task, and what they call our splits where it differs: the first that is there counts.
INDEX_FILES = {
    "vqa": ("vqa.{}.jsonl",),
    "nlvr2": ("nlvr2.{}.index.jsonl",),
    "retrieval": ("coco_retrieval.{}.jsonl", "flickr30k.{}.jsonl"),
    "captioning": ("coco_captioning.{}.jsonl", "nocaps.{}.jsonl"),
    "imagenet": ("imagenet.{}.index.jsonl",),
}
INDEX_SPLITS = {
    ("vqa", "val"): ("rest_val", "val"),
    ("nlvr2", "val"): ("dev",),
    ("nlvr2", "test"): ("test-P",),
}


class Records:
    """The records of one jsonl file, by index. Line offsets are found on first use; blank lines are no records.

    Safe to send to loader workers and to read from several processes and threads. ValueError when the file is absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no records at {self.path}: write them with `beit3 prepare`")
        self._offsets: np.ndarray | None = None
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._index()) // 2

    def __getitem__(self, index: int) -> dict:
        """Record `index`; ValueError naming file and line when that line is not a JSON object."""
        offsets, index = self._index(), operator.index(index)
        length = len(offsets) // 2
        if not -length <= index < length:
            raise IndexError(f"record {index} of {length} in {self.path}")
        start, end = offsets[2 * (index % length)], offsets[2 * (index % length) + 1]
        try:
            record = json.loads(self._bytes()[start:end])
        except ValueError as error:
            raise self._malformed(start, str(error)) from None
        if not isinstance(record, dict):
            raise self._malformed(start, f"holds a {type(record).__name__}")
        return record

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def _index(self) -> np.ndarray:
        """Start and end of each line that is not blank: [2 x records] int64."""
        if self._offsets is None:
            found: list[int] = []
            at = 0
            with self.path.open("rb") as lines:
                for line in lines:
                    if not line.isspace():
                        found += (at, at + len(line))
                    at += len(line)
            self._offsets = np.array(found, dtype=np.int64)
        return self._offsets

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _malformed(self, start: int, reason: str) -> ValueError:
        line = self._bytes()[:start].count(b"\n") + 1
        return ValueError(
            f"{self.path} line {line} is not a JSON object ({reason}): run `beit3 prepare` again"
        )


def write_records(path: str | Path, records: Iterable[dict]) -> int:
    """Write `records` to `path`, one per line, and return their number; a reader never sees half a file."""
    count = 0
    with written_aside(Path(path)) as file:
        for record in records:
            file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
            count += 1
    return count


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`; a reader never sees half a file."""
    with written_aside(Path(path)) as file:
        file.write(text.encode())


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split in `folder`, split.jsonl or split.shards; without one, those of the sets in the folders below it.

    ValueError where both are there: it would not be clear which is meant.
    """
    own = [path for path in (folder / f"{split}{ending}" for ending in STORES) if path.is_file()]
    below = sorted(path for ending in STORES for path in folder.glob(f"[!.]*/{split}{ending}"))
    for one, other in pairwise(own or below):
        if own or one.parent == other.parent:
            raise ValueError(f"{one} and {other} are both {split}: keep the one that is meant")
    if own and below:
        raise ValueError(
            f"{own[0]} and {below[0]} are both {split}: move the first into a folder of its own beside the other's"
        )
    return own or below


def locate(root: str | Path, task: str, source: str, split: str) -> Path:
    """What `Source` opens for one split: root/task/source/split.jsonl or .shards, or .../split where it is several sets.

    Without such a folder, upstream's index file in the root. ValueError with the remedy when there is none, or when two
    files serve the split.
    """
    path = Path(root) / task / source / f"{split}.jsonl"
    files = split_files(path.parent, split)
    if files:
        return files[0] if files[0].parent == path.parent else path.with_suffix("")
    if source == "main" and not path.parent.is_dir():
        for name in INDEX_SPLITS.get((task, split), (split,)):
            found = [
                file
                for file in (
                    Path(root) / pattern.format(name) for pattern in INDEX_FILES.get(task, ())
                )
                if file.is_file()
            ]
            if len(found) > 1:
                raise ValueError(
                    f"{' and '.join(map(str, found))} are both {task} {split}: keep the one that is meant in this root"
                )
            if found:
                return found[0]
    remedy = f"beit3 prepare {task} --raw DIR --root {root}" + (
        f" --source {source}" if source != "main" else ""
    )
    raise ValueError(f"no {task}/{source}/{split}.jsonl under {root}: write it with `{remedy}`")


def open_image(image: str | Path | Image.Image) -> Tensor:
    """A file, a member of a tar or a Pillow image, upright as its EXIF orientation says: uint8 [3, H, W] RGB.

    Of an animation the first frame. ValueError naming the file when it is absent, no image, damaged, or beyond 178 million
    pixels or 512 MiB. Callers must not write into the tensor: those of tiny files are shared.
    """
    if isinstance(image, Image.Image):
        return _convert(image)
    tar, _, size = in_tar(str(image))
    try:
        status = os.stat(tar or image)
    except OSError as error:
        raise ValueError(f"cannot read image {image}: {error.strerror}") from error
    size = size if tar else status.st_size
    if size > MAX_BYTES:
        raise ValueError(f"image {image} has {size} bytes, more than {MAX_BYTES}: make it smaller")
    return _open_tiny(str(image), status.st_mtime_ns) if size <= TINY_BYTES else _open(image)


def member(tar: str | Path, start: int, size: int) -> str:
    """The name by which records know an image inside a tar."""
    return f"{tar}@{start}+{size}"


def in_tar(image: str) -> tuple[str, int, int]:
    """(tar, start, size) of the name of a member; the tar is '' for any other file."""
    found = MEMBER.fullmatch(image)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def read_member(tar: str | Path, start: int, size: int) -> bytes:
    """`size` bytes of a tar from `start`. ValueError where it ends before; OSError where it cannot be read."""
    content = os.pread(_opened(str(tar)).fileno(), size, start)
    if len(content) != size:
        raise ValueError(
            f"{tar} ends before byte {start + size}: it was changed, run `beit3 prepare` again"
        )
    return content


@lru_cache(maxsize=OPEN_TARS)
def _opened(tar: str) -> BinaryIO:
    """Processes that are forked share the descriptor, which reading at a place does not move."""
    return open(tar, "rb", buffering=0)  # type: ignore[return-value]


@lru_cache(maxsize=16384)
def _open_tiny(path: str, modified: int) -> Tensor:
    """Files of a few KB stay decoded: opening them takes longer than a small network needs to look at them."""
    return _open(path)


def _open(path: str | Path) -> Tensor:
    tar, start, size = in_tar(str(path))
    try:
        data = read_member(tar, start, size) if tar else Path(path).read_bytes()
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


def header_fault(image: str | BinaryIO, size: tuple[int, int] | None = None) -> str:
    """'' for an image whose header can be read, and is of this width and height where they are given; else what is wrong with it."""
    try:
        with Image.open(image) as header:
            found = header.size if size is None else upright_size(header)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"
    if min(found) <= 0:
        return "is empty"
    return (
        ""
        if size in (None, found)
        else f"has {found[0]} x {found[1]} pixels, its annotations are of {size[0]} x {size[1]}"
    )


def upright_size(header: Image.Image) -> tuple[int, int]:
    """Width and height of an image, opened but not read, as `open_image` turns it by its EXIF orientation."""
    # Asked for EXIF it does not have, a PNG is read whole.
    quarter = "exif" in header.info and header.getexif().get(ExifTags.Base.Orientation) in (
        5,
        6,
        7,
        8,
    )
    return (header.height, header.width) if quarter else header.size


def flush(path: str | Path) -> None:
    """Make what was written to a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when it is written whole, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
