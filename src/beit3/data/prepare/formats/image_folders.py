"""Folders of images at any depth, without labels or captions."""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import find_folder, name_kind, walk_files
from beit3.data.prepare.formats.split_names import Record
from beit3.images import SUFFIXES


def read_image_folder(raw: str | Path) -> Iterator[Record]:
    """Yields {id: path relative to `raw`, image} for every image below `raw`, in sorted order.

    Other files are {id, left_out: suffix}. `split_names.assign_splits` tells their splits.
    """
    raw = find_folder(raw)
    for path in walk_files(raw):
        record_id = path.relative_to(raw).as_posix()
        if is_image(path):
            yield {"id": record_id, "image": str(path)}
        else:
            yield {"id": record_id, "left_out": name_kind(path)}


def holds_images(raw: Path) -> bool:
    """Returns whether there is an image below `raw`."""
    return any(is_image(path) for path in walk_files(raw))


def is_image(path: Path) -> bool:
    """Returns whether a file's name ends like an image's."""
    return path.suffix.lower() in SUFFIXES
