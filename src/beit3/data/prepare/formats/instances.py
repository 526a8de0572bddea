"""Reads objects in images from COCO's instances_*.json and image_info_test*.json, from Objects365's
zhiyuan_objv2_*.json, and from other files of COCO's format.

There is one record per image:

    {id: str, image, width, height, objects: [
        {id: int >= 1, box: [x, y, w, h] in pixels, label, area, crowd: bool, segmentation?}]}

Labels number the sorted category ids from 0. `segmentation` is COCO's: polygons [[x, y, x, y, ...]]
or RLE {size: [h, w], counts}. Crowd regions stay, which evaluation needs and training leaves out,
and so do images without objects. An image_info file lists images whose objects only the evaluation
server has; their records have none.

Known defects, as those of Objects365, are repaired and counted (objects.py).

A file is parsed as a whole: 1 GB of boxes takes 3.7 GB of memory while it is read and 2.7 GB until
its last record, so that `prepare` takes about 30 GB for the 8 GB of Objects365.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from beit3.data.prepare.formats.files import ImageFinder, find_files, find_folder, get_field
from beit3.data.prepare.formats.objects import Annotation, Category, Instances, ObjectCleaner
from beit3.data.prepare.formats.split_names import (
    SplitRecord,
    choose_split,
    infer_split,
    infer_subset,
    make_split_error,
)
from beit3.data.stores.rle import MAX_COORDINATE
from beit3.files import read_json

FILE_PATTERNS = ("instances_*.json", "image_info_test*.json", "zhiyuan_objv2_*.json")
MAX_ID = 2**53 - 1
"""Evaluators keep ids in float64 arrays."""


@dataclass(frozen=True)
class InstanceFile:
    """A parsed file of COCO's format."""

    path: Path
    content: Any
    split: str
    image_folders: Sequence[str]
    """Folders below the raw folder that may hold the images."""
    has_objects: bool = True


def is_coco_instances(raw: Path) -> bool:
    """Returns whether there is a file of COCO's or Objects365's objects."""
    return any(find_files(raw, pattern) for pattern in FILE_PATTERNS)


def read_coco_instances(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads the COCO or Objects365 files in `raw` or in the folders directly below it.

    Without a val file, 5 % of the images are held out.

    Args:
        raw: Folder of the raw dataset.
        repaired: Counts repairs by their description, while the records are read.

    Returns:
        The categories [{id, name}] in the order of the labels, and pairs of (split, record).

    Raises:
        ValueError: There are two files of one split, two categories share an id, or a part is not
            of the format.
    """
    raw = find_folder(raw)
    files = [
        InstanceFile(
            path,
            read_json(path),
            split,
            _list_image_folders(path, split),
            has_objects=not path.name.startswith("image_info"),
        )
        for split, path in _find_splits(raw).items()
    ]
    return read_instance_files(raw, files, repaired)


def read_instance_files(
    raw: Path, files: list[InstanceFile], repaired: Counter[str] | None
) -> Instances:
    """Returns the categories of all files and their records.

    The list `files` is emptied: each file is dropped from memory after its last record.
    """
    categories = _read_categories(files)
    labels = {category["id"]: label for label, category in enumerate(categories)}
    cleaner = ObjectCleaner(labels, Counter() if repaired is None else repaired)
    has_val = any(file.split == "val" for file in files)

    def read_pairs() -> Iterator[SplitRecord]:
        while files:
            yield from InstanceReader(files.pop(0), cleaner).read_pairs(raw, has_val)

    return categories, read_pairs()


# Files and categories -----------------------------------------------------------------------------


def _find_splits(raw: Path) -> dict[str, Path]:
    """Returns split -> file; raises ValueError for two of one split."""
    files: dict[str, Path] = {}
    for file in (file for pattern in FILE_PATTERNS for file in find_files(raw, pattern)):
        split = "test-dev" if "test-dev" in file.stem else infer_split(file, raw) or "train"
        if split in files:
            raise make_split_error(files[split], file, raw, split)
        files[split] = file
    return files


def _read_categories(files: Sequence[InstanceFile]) -> list[Category]:
    """Returns [{id, name}] by id, of all files together."""
    names: dict[int, str] = {}
    for file in files:
        file_ids: set[int] = set()
        for number, category in enumerate(get_field(file.content, "categories", list, file.path)):
            location = f"{file.path} categories[{number}]"
            id = get_field(category, "id", int, location)
            name = " ".join(get_field(category, "name", str, location).split())
            if not name or not name.isprintable():
                raise ValueError(
                    f"{location} is called {name[:60]!r}: give it a name that can be printed"
                )
            if id in file_ids or names.setdefault(id, name) != name:
                raise ValueError(
                    f"{location}, {name[:60]}, has the id {id} of {names[id][:60]}: give each "
                    "category an id of its own"
                )
            file_ids.add(id)
    if not names:
        raise ValueError(f"{files[0].path} lists no categories: check that it is complete")
    return [{"id": id, "name": names[id]} for id in sorted(names)]


def _list_image_folders(file: Path, split: str) -> list[str]:
    """Returns the folders that may hold the images of a file.

    They are train2017 or train (test2017 also for test-dev), the same in images/, and the folders
    as which the parts of Objects365 unpack.
    """
    subset = infer_subset(file)
    names = list(dict.fromkeys((subset, subset.replace("-dev", ""), split)))
    folders = [*names, *(f"images/{name}" for name in names), "images", ""]
    if file.name.startswith("zhiyuan"):
        for parent in ("", *(f"{name}/" for name in names)):
            folders += [f"{parent}images/v1", f"{parent}images/v2"]
    return folders


def _read_image_name(image: Any, location: str) -> str:
    """Returns the path of an image as its file names it.

    That is `file_name`, or the last two parts of `coco_url` in files that have only that.
    """
    if isinstance(image, dict) and "file_name" not in image and "coco_url" in image:
        url = get_field(image, "coco_url", str, location)
        return "/".join(url.rstrip("/").split("/")[-2:])
    return get_field(image, "file_name", str, location)


# Records ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstanceReader:
    """Makes the records of one file."""

    file: InstanceFile
    cleaner: ObjectCleaner
    image_sources: dict[str, str] = field(default_factory=dict)
    """Path of an image -> name by which the file has it."""

    def read_pairs(self, raw: Path, has_val: bool) -> Iterator[SplitRecord]:
        """Yields (split, record) for each image; an id that repeats is a fault."""
        path, content, split = self.file.path, self.file.content, self.file.split
        images = get_field(content, "images", list, path)
        rows = get_field(content, "annotations", list, path) if self.file.has_objects else []
        indices_by_image = self.group_by_image(images, rows)
        ids = self.choose_ids(rows)
        image_finder = ImageFinder(raw, *self.file.image_folders)
        for number, image in enumerate(images):
            location = f"{path} images[{number}]"
            image_id = get_field(image, "id", int, location)
            name = _read_image_name(image, location)
            width, height = _read_size(image, location)
            indices = indices_by_image.pop(image_id, None)
            if indices is None:
                fault = f"{path.name} lists another image of this id"
                yield split, {"id": str(image_id), "fault": fault}
                continue
            try:
                image_path = self.find_image(image_finder, name)
            except ValueError as error:
                yield split, {"id": str(image_id), "fault": str(error)}
                continue
            record = {"id": str(image_id), "image": image_path, "width": width, "height": height}
            if self.file.has_objects:
                annotations = [
                    Annotation(ids[index], rows[index], f"{path} annotations[{index}]")
                    for index in indices
                ]
                record["objects"] = self.cleaner.make_objects(annotations, width, height)
            yield choose_split(split, name, has_val=has_val), record

    def find_image(self, image_finder: ImageFinder, name: str) -> str:
        """Returns the path of an image.

        Names may begin with folders that are not there, as images/v1/ in Objects365, and have
        backslashes where they were written on Windows.

        Raises:
            ValueError: Another image, of another name, lies at the same path.
        """
        relative = re.sub(r"^images/v[12]/", "", name.replace("\\", "/"))
        image = PurePosixPath(relative)
        folder = "" if len(image.parts) < 2 else image.parent.as_posix().lstrip("/")
        if ".." in image.parts:
            folder = ""
        path = image_finder.find(image.name, unquote(image.name), folder=folder)
        if self.image_sources.setdefault(path, name) != name:
            raise ValueError(
                f"{name} and {self.image_sources[path]} are both found as {path}: keep the images "
                "in the folders that the file names"
            )
        return path

    def group_by_image(self, images: Sequence[Any], rows: Sequence[Any]) -> dict[int, list[int]]:
        """Returns image id -> indices of its annotations, [] for an image without any.

        Annotations of images that are not listed are counted as repairs.
        """
        file = self.file.path
        indices: dict[int, list[int]] = {}
        for number, image in enumerate(images):
            indices[get_field(image, "id", int, f"{file} images[{number}]")] = []
        num_unlisted = 0
        for index, row in enumerate(rows):
            image_id = get_field(row, "image_id", int, f"{file} annotations[{index}]")
            if image_id in indices:
                indices[image_id].append(index)
            else:
                num_unlisted += 1
        if rows and num_unlisted == len(rows):
            raise ValueError(
                f"{file} has {num_unlisted} annotations, all of images that it does not list: "
                "check that it is complete"
            )
        self.cleaner.count_repair(
            "annotations of images that are not listed, dropped", num_unlisted
        )
        return indices

    def choose_ids(self, rows: Sequence[Any]) -> Sequence[int]:
        """Returns the annotations' ids, or 1, 2, ... for all where one is below 1 or repeats.

        Evaluators read an id below 1 as "no match".
        """
        ids = [row.get("id") for row in rows]
        valid_ids = {id for id in ids if isinstance(id, int) and 1 <= id <= MAX_ID}
        if len(valid_ids) == len(ids):
            return ids
        self.cleaner.count_repair(
            "annotation ids below 1 or repeated, for which all were numbered from 1",
            len(ids) - len(valid_ids),
        )
        return range(1, len(ids) + 1)


def _read_size(image: Any, location: str) -> tuple[int, int]:
    """Returns (width, height) in pixels."""
    width = get_field(image, "width", int, location)
    height = get_field(image, "height", int, location)
    if not (0 < width <= MAX_COORDINATE and 0 < height <= MAX_COORDINATE):
        raise ValueError(
            f"{location} is {str(width)[:20]} x {str(height)[:20]} pixels: give its width and "
            "height"
        )
    return width, height
