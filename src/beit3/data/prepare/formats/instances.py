"""Reads objects in images: COCO's instances_*.json and image_info_test*.json, and Objects365's
zhiyuan_objv2_*.json.

There is one record per image:

    {id: str, image, width, height, objects: [
        {id: int >= 1, box: [x, y, w, h] in pixels, label, area, crowd: bool, segmentation?}]}

Labels number the sorted category ids from 0. `segmentation` is COCO's: polygons [[x, y, x, y, ...]]
or RLE {size: [h, w], counts}. Crowd regions stay, which evaluation needs and training leaves out,
and so do images without objects. An image_info file lists images whose objects only the evaluation
server has; their records have none.

Known defects of Objects365 are repaired and counted. Boxes without a mask are clipped to the image,
and dropped where they repeat another one. Where there is a mask, the mask counts, and the box stays
as evaluators have it.

A file is parsed as a whole: 1 GB of boxes takes 3.7 GB of memory while it is read and 2.7 GB until
its last record, so that `prepare` takes about 30 GB for the 8 GB of Objects365.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_files,
    find_folder,
    get_field,
    make_unknown_error,
)
from beit3.data.prepare.formats.split_names import (
    SplitRecord,
    choose_split,
    infer_split,
    infer_subset,
)
from beit3.data.stores.rle import MAX_COORDINATE
from beit3.files import read_json

Category = dict[str, Any]
Instances = tuple[list[Category], Iterator[SplitRecord]]

FILE_PATTERNS = ("instances_*.json", "image_info_test*.json", "zhiyuan_objv2_*.json")
MAX_ID = 2**53 - 1
"""Evaluators keep ids in float64 arrays."""
ROUNDING_TOLERANCE = 0.01
"""Number of pixels by which a box may leave the image unnoticed: annotations have two decimals."""


@dataclass(frozen=True)
class InstanceFile:
    """A parsed file."""

    path: Path
    content: Any


@dataclass(frozen=True)
class Annotation:
    """An object of an image, as the file has it."""

    id: int
    row: Any
    location: str
    """ "<file> annotations[7]", for messages."""


def read_instances(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads the COCO or Objects365 files in `raw` or in the folders directly below it.

    Without a val file, 5 % of the images are held out.

    Args:
        raw: Folder of the raw dataset.
        repaired: Counts repairs by their description, while the records are read.

    Returns:
        The categories [{id, name}] in the order of the labels, and pairs of (split, record).

    Raises:
        ValueError: There is no file, there are two of one split, two categories share an id, or a
            part is not of the format.
    """
    raw = find_folder(raw)
    files = {
        split: InstanceFile(file, read_json(file)) for split, file in _find_splits(raw).items()
    }
    categories = _read_categories(list(files.values()))
    labels = {category["id"]: label for label, category in enumerate(categories)}
    repair_counts = Counter() if repaired is None else repaired

    def read_pairs() -> Iterator[SplitRecord]:
        has_val = "val" in files
        for split in list(files):  # each file is dropped from memory after its last record
            reader = InstanceReader(files.pop(split), labels, repair_counts)
            yield from reader.read_pairs(raw, split, has_val)

    return categories, read_pairs()


# Files and categories -----------------------------------------------------------------------------


def _find_splits(raw: Path) -> dict[str, Path]:
    """Returns split -> file; raises ValueError for none, or for two of one split."""
    files: dict[str, Path] = {}
    for file in (file for pattern in FILE_PATTERNS for file in find_files(raw, pattern)):
        split = "test-dev" if "test-dev" in file.stem else infer_split(file, raw) or "train"
        if split in files:
            raise ValueError(f"{files[split]} and {file} are both {split}: keep one of them")
        files[split] = file
    if not files:
        coco, objects365 = " or ".join(FILE_PATTERNS[:2]), FILE_PATTERNS[2]
        raise make_unknown_error(raw, f"{coco} (COCO), {objects365} (Objects365)")
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


def _find_image(image_finder: ImageFinder, name: str) -> str:
    """Returns the path of an image.

    The names of Objects365 begin with images/v1/ or images/v2/, which its folders often lack.
    """
    path = PurePosixPath(re.sub(r"^images/v[12]/", "", name))
    folder = "" if len(path.parts) < 2 else path.parent.as_posix()
    return image_finder.find(path.name, folder=folder)


# Records ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstanceReader:
    """Makes the records of one file.

    Attributes:
        file: The parsed file.
        labels: Category id -> label.
        repaired: Description of a repair -> how often it was made.
    """

    file: InstanceFile
    labels: Mapping[int, int]
    repaired: Counter[str]

    def read_pairs(self, raw: Path, split: str, has_val: bool) -> Iterator[SplitRecord]:
        """Yields (split, record) for each image; an id that repeats is a fault."""
        file, content = self.file.path, self.file.content
        images = get_field(content, "images", list, file)
        has_objects = not file.name.startswith("image_info")
        rows = get_field(content, "annotations", list, file) if has_objects else []
        indices_by_image = self.group_by_image(images, rows)
        ids = self.choose_ids(rows)
        image_finder = ImageFinder(raw, *_list_image_folders(file, split))
        for number, image in enumerate(images):
            location = f"{file} images[{number}]"
            image_id = get_field(image, "id", int, location)
            name = get_field(image, "file_name", str, location)
            width, height = _read_size(image, location)
            indices = indices_by_image.pop(image_id, None)
            if indices is None:
                fault = f"{file.name} lists another image of this id"
                yield split, {"id": str(image_id), "fault": fault}
                continue
            record = {
                "id": str(image_id),
                "image": _find_image(image_finder, name),
                "width": width,
                "height": height,
            }
            if has_objects:
                annotations = [
                    Annotation(ids[index], rows[index], f"{file} annotations[{index}]")
                    for index in indices
                ]
                record["objects"] = self.make_objects(annotations, width, height)
            yield choose_split(split, name, has_val=has_val), record

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
        self.count_repair("annotations of images that are not listed, dropped", num_unlisted)
        return indices

    def choose_ids(self, rows: Sequence[Any]) -> Sequence[int]:
        """Returns the annotations' ids, or 1, 2, ... for all where one is below 1 or repeats.

        Evaluators read an id below 1 as "no match".
        """
        ids = [row.get("id") for row in rows]
        valid_ids = {id for id in ids if isinstance(id, int) and 1 <= id <= MAX_ID}
        if len(valid_ids) == len(ids):
            return ids
        self.count_repair(
            "annotation ids below 1 or repeated, for which all were numbered from 1",
            len(ids) - len(valid_ids),
        )
        return range(1, len(ids) + 1)

    def make_objects(
        self, annotations: Iterable[Annotation], width: int, height: int
    ) -> list[dict[str, Any]]:
        """Returns the objects of an image of `width` x `height` pixels."""
        objects: list[dict[str, Any]] = []
        seen_boxes: set[tuple[int, bool, tuple[float, ...]]] = set()
        for annotation in annotations:
            instance = self.make_object(annotation, width, height)
            if instance is None:
                continue
            has_mask = bool(annotation.row.get("segmentation"))
            key = instance["label"], instance["crowd"], tuple(instance["box"])
            if not has_mask and key in seen_boxes:
                self.count_repair("boxes that repeat another, dropped")
                continue
            seen_boxes.add(key)
            objects.append(instance)
        return objects

    def make_object(self, annotation: Annotation, width: int, height: int) -> dict[str, Any] | None:
        """Returns an object, or None for one that is dropped."""
        row, location = annotation.row, annotation.location
        category_id, crowd = get_field(row, "category_id", int, location), row.get("iscrowd", 0)
        if category_id not in self.labels:
            self.count_repair("annotations of categories that are not listed, dropped")
            return None
        if crowd not in (0, 1):
            raise ValueError(f"{location} has iscrowd {str(crowd)[:20]!r}: write 0 or 1")
        segmentation = row.get("segmentation") or None
        mask = None
        if segmentation is not None:
            mask = self.clean_mask(segmentation, location, width, height)
        box = self.clean_box(row, location, width, height, clip=segmentation is None)
        if box is None or (segmentation is not None and mask is None):
            return None
        instance = {
            "id": annotation.id,
            "box": box,
            "label": self.labels[category_id],
            "area": _compute_area(row, box),
            "crowd": bool(crowd),
        }
        return instance if mask is None else instance | {"segmentation": mask}

    def clean_box(
        self, row: Any, location: str, width: int, height: int, *, clip: bool
    ) -> list[float] | None:
        """Returns [x, y, w, h], clipped to the image if `clip`; None for an empty box."""
        box = get_field(row, "bbox", list, location)
        if len(box) != 4 or not _are_coordinates(box):
            raise ValueError(
                f"{location} has bbox {str(box)[:60]}: give x, y, width and height in pixels"
            )
        x, y, w, h = map(float, box)
        if clip and w > 0 and h > 0:
            left, right = max(x, 0.0), min(x + w, float(width))
            top, bottom = max(y, 0.0), min(y + h, float(height))
            overhang = max(left - x, top - y, x + w - right, y + h - bottom)
            if overhang > ROUNDING_TOLERANCE:
                x, y, w, h = left, top, right - left, bottom - top
                self.count_repair("boxes beyond the image, clipped to it")
        if w > 0 and h > 0:
            return [x, y, w, h]
        self.count_repair("empty boxes, dropped")
        return None

    def clean_mask(self, segmentation: Any, location: str, width: int, height: int) -> Any:
        """Returns the valid polygons, or RLE of the image's size; None where nothing is left."""
        if isinstance(segmentation, dict):
            if _is_rle(segmentation, width, height):
                return {"size": [height, width], "counts": segmentation["counts"]}
            self.count_repair("masks that do not fill their image, dropped with their objects")
            return None
        if not isinstance(segmentation, list) or not all(
            isinstance(polygon, list) and _are_coordinates(polygon) for polygon in segmentation
        ):
            raise ValueError(
                f"{location} has a segmentation that is neither polygons of numbers nor RLE: "
                f"{str(segmentation)[:60]}"
            )
        polygons = [
            polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0
        ]
        self.count_repair(
            "polygons of fewer than three points or half a point, dropped",
            len(segmentation) - len(polygons),
        )
        self.count_repair("objects without a polygon left, dropped", int(not polygons))
        return polygons or None

    def count_repair(self, description: str, times: int = 1) -> None:
        """Counts a repair, if it was made at all."""
        if times:
            self.repaired[description] += times


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


def _compute_area(row: Any, box: Sequence[float]) -> float:
    """Returns the annotation's area, or that of the box if it has none or the box was clipped."""
    area = row.get("area")
    was_clipped = [float(value) for value in row["bbox"]] != [*box]
    is_valid = isinstance(area, int | float) and 0 < area <= MAX_COORDINATE**2
    return float(area) if is_valid and not was_clipped else box[2] * box[3]


def _is_rle(segmentation: Mapping[str, Any], width: int, height: int) -> bool:
    """Returns whether RLE is of this size.

    Runs in a list must fill it; those in a string are checked when they are decoded.
    """
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        are_counts = all(isinstance(count, int) and count >= 0 for count in counts)
        return are_counts and sum(counts) == width * height
    return isinstance(counts, str) and counts != ""


def _are_coordinates(values: Sequence[Any]) -> bool:
    """Returns whether all values are finite numbers in the range in which masks are drawn."""
    return all(
        isinstance(value, int | float) and -MAX_COORDINATE <= value <= MAX_COORDINATE
        for value in values
    )
