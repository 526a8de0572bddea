"""Reads folders in which each image has its caption in a text file beside it: 0.jpg and 0.txt.

img2dataset's `files` output and the trainers of diffusion models have this layout.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from beit3.data.prepare.formats.files import find_folder, name_kind, walk_files, walk_folders
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.split_names import Record, SplitRecord, assign_splits
from beit3.files import read_lines
from beit3.images import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
NUM_CHECKED_IMAGES = 1000
"""Images by which `are_most_captioned` decides."""


def read_sidecar_captions(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields (split, {id: "folder/0.jpg#0", image, text}) for the images at any depth.

    Splits come from the folders train, val and test, else 5 % of the images are held out. An image
    without a caption is {id, fault}. Files of other kinds and texts without an image are left out.
    """
    raw = find_folder(raw)
    for split, record in assign_splits(_read_pairs(raw), raw):
        if "text" in record:
            record["id"] += "#0"
        yield split, record


def is_sidecar_captions(raw: Path) -> bool:
    """Returns whether an image below `raw` has a caption beside it."""
    return any(_find_captioned(raw))


def are_most_captioned(raw: Path) -> bool:
    """Returns whether most of the first images below `raw` have a caption beside them."""
    found = [*islice(_find_captioned(raw), NUM_CHECKED_IMAGES)]
    return 2 * sum(found) > len(found)


def _find_captioned(raw: Path) -> Iterator[bool]:
    """Yields for each image below `raw`, by the names of files alone, whether it has a caption."""
    for _, names in walk_folders(raw):
        stems = {
            os.path.splitext(name)[0] for name in names if name.lower().endswith(CAPTION_SUFFIXES)
        }
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                yield stem in stems


def _read_pairs(raw: Path) -> Iterator[Record]:
    captions: dict[Path, list[Path]] = defaultdict(list)
    """Path without suffix -> files with its caption."""
    images: list[Path] = []
    for path in walk_files(raw):
        if is_image(path):
            images.append(path)
        elif path.suffix.lower() in CAPTION_SUFFIXES:
            captions[path.with_suffix("")].append(path)
        else:
            yield {"id": path.relative_to(raw).as_posix(), "left_out": name_kind(path)}
    for path in images:
        record = {"id": path.relative_to(raw).as_posix(), "image": str(path)}
        yield record | _read_caption(path, captions.get(path.with_suffix(""), []))
    stems = {path.with_suffix("") for path in images}
    for stem in captions.keys() - stems:
        for path in captions[stem]:
            kind = f"{name_kind(path)} without an image"
            yield {"id": path.relative_to(raw).as_posix(), "left_out": kind}


def _read_caption(image: Path, files: list[Path]) -> Record:
    """Returns the `text` of an image, or a `fault`."""
    if not files:
        return {"fault": f"no caption {image.stem}{CAPTION_SUFFIXES[0]} beside it"}
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        return {"fault": f"{names} are both its caption: keep one of them"}
    if not files[0].is_file():
        return {"fault": f"{files[0].name} is a pipe or a device, not a file"}
    try:
        lines = [line.strip() for line in read_lines(files[0]) if line.strip()]
    except ValueError as error:
        return {"fault": str(error)}
    if len(lines) > 1:
        return {
            "fault": f"{files[0].name} has {len(lines)} lines, which may be one caption or "
            f"{len(lines)}: write one line, or list several captions in a .jsonl table"
        }
    return {"text": "".join(lines)}
