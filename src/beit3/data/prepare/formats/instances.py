"""Objects in images: COCO's instances_*.json and image_info_test*.json, Objects365's
zhiyuan_objv2_*.json -> one record per image.

{id: str, image, width, height, objects: [{id: int >= 1, box: [x, y, w, h] pixels, label, area,
crowd: bool, segmentation?}]}.
Labels count the sorted category ids from 0. segmentation is COCO's: polygons [[x, y, x, y, ...]] or
RLE {size: [h, w], counts}.
Crowd regions stay, which evaluation needs and training leaves out, and so do images without
objects. An image_info file lists
images whose objects only the evaluation server knows; their records have none.

What is known to be wrong in Objects365 is put right and counted. Boxes without a mask are clipped
to the image, and dropped
where they repeat another; where there is a mask, it is the truth, and the box stays as the
evaluators know it.

A file is parsed whole: a GB of boxes takes 3.7 GB of memory while it is read, and 2.7 GB until its
last record, so 8 GB of
Objects365 take about 30 GB once, to `prepare` them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from beit3.data.prepare.formats.files import (
    Listing,
    Pair,
    field,
    folder,
    found,
    named_split,
    nothing_known,
    or_held_out,
    subset,
)
from beit3.data.stores.rle import MAX_COORDINATE
from beit3.files import read_json

Category = dict[str, Any]
Instances = tuple[list[Category], Iterator[Pair]]

FILES = ("instances_*.json", "image_info_test*.json", "zhiyuan_objv2_*.json")
LARGEST_ID = 2**53 - 1
"""Evaluators keep ids in float64 arrays."""
ROUNDING = 0.01
"""Pixels by which a box may leave the image unnoticed: annotations are rounded to two decimals."""


def instances(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """([{id, name}] in the order of the labels, the pairs) of the COCO or Objects365 files in or
    right below `raw`.

    `repaired` takes what was put right while the pairs are read: what -> how often. Without a val
    file, 5 % of the images
    are held out. ValueError for no file, two of one split, categories of two names, or a part that
    is not of the format.
    """
    raw = folder(raw)
    files = {split: _File(file, read_json(file)) for split, file in _files(raw).items()}
    categories = _categories(list(files.values()))
    labels = {category["id"]: label for label, category in enumerate(categories)}
    counts = Counter() if repaired is None else repaired

    def pairs() -> Iterator[Pair]:
        has_val = "val" in files
        for split in list(files):
            yield from _Reader(files.pop(split), labels, counts).pairs(raw, split, has_val)

    return categories, pairs()


@dataclass(frozen=True)
class _File:
    path: Path
    content: Any


@dataclass(frozen=True)
class _Reader:
    """Records of one file; `repaired` counts what was put right in it."""

    file: _File
    labels: Mapping[int, int]
    repaired: Counter[str]

    def pairs(self, raw: Path, split: str, has_val: bool) -> Iterator[Pair]:
        file = self.file.path
        images = field(self.file.content, "images", list, file)
        labelled = not file.name.startswith("image_info")
        annotations = field(self.file.content, "annotations", list, file) if labelled else []
        by_image = self.by_image(images, annotations)
        ids = self.ids(annotations)
        listing = Listing(raw, *_places(file, split))
        for number, image in enumerate(images):
            where = f"{file} images[{number}]"
            key, name = field(image, "id", int, where), field(image, "file_name", str, where)
            width, height = field(image, "width", int, where), field(image, "height", int, where)
            if not (0 < width <= MAX_COORDINATE and 0 < height <= MAX_COORDINATE):
                raise ValueError(
                    f"{where} is {str(width)[:20]} x {str(height)[:20]} pixels: give its width "
                    "and height"
                )
            mine = by_image.pop(key, None)
            if mine is None:
                yield (
                    split,
                    {"id": str(key), "fault": f"{file.name} lists another image of this id"},
                )
                continue
            record = {
                "id": str(key),
                "image": _image(listing, name),
                "width": width,
                "height": height,
            }
            if labelled:
                rows = ((ids[at], annotations[at], f"{file} annotations[{at}]") for at in mine)
                record["objects"] = self.objects(rows, width, height)
            yield or_held_out(split, name, has_val=has_val), record

    def by_image(self, images: Sequence[Any], annotations: Sequence[Any]) -> dict[int, list[int]]:
        """Image id -> places of its annotations, [] where it has none; those of images that are not
        listed are counted."""
        file = self.file.path
        places: dict[int, list[int]] = {
            field(image, "id", int, f"{file} images[{at}]"): [] for at, image in enumerate(images)
        }
        unknown = 0
        for at, row in enumerate(annotations):
            key = field(row, "image_id", int, f"{file} annotations[{at}]")
            if key in places:
                places[key].append(at)
            else:
                unknown += 1
        if annotations and unknown == len(annotations):
            raise ValueError(
                f"{file} has {unknown} annotations, all of images that it does not list: check "
                "that it is whole"
            )
        self.count("annotations of images that are not listed, dropped", unknown)
        return places

    def ids(self, annotations: Sequence[Any]) -> Sequence[int]:
        """The annotations' ids; 1, 2, ... for all of them where one is below 1 or repeats, which
        evaluators take for no match."""
        given = [row.get("id") for row in annotations]
        good = {id for id in given if isinstance(id, int) and 1 <= id <= LARGEST_ID}
        if len(good) == len(given):
            return given
        self.count(
            "annotation ids below 1 or repeated, for which all were numbered from 1",
            len(given) - len(good),
        )
        return range(1, len(given) + 1)

    def objects(
        self, rows: Iterator[tuple[int, Any, str]], width: int, height: int
    ) -> list[dict[str, Any]]:
        """The objects of one image from (id, annotation, where it stands)."""
        objects: list[dict[str, Any]] = []
        boxes_seen: set[tuple[int, bool, tuple[float, ...]]] = set()
        for id, row, where in rows:
            category, crowd = field(row, "category_id", int, where), row.get("iscrowd", 0)
            if category not in self.labels:
                self.count("annotations of categories that are not listed, dropped")
                continue
            if crowd not in (0, 1):
                raise ValueError(f"{where} has iscrowd {str(crowd)[:20]!r}: write 0 or 1")
            given = row.get("segmentation") or None
            mask = self.mask(given, where, width, height)
            box = self.box(row, where, width, height, clip=given is None)
            if (given is not None and mask is None) or box is None:
                continue
            key = category, bool(crowd), tuple(box)
            if given is None and key in boxes_seen:
                self.count("boxes that repeat another, dropped")
                continue
            boxes_seen.add(key)
            made = {
                "id": id,
                "box": box,
                "label": self.labels[category],
                "area": _area(row, box),
                "crowd": bool(crowd),
            }
            objects.append(made | ({} if mask is None else {"segmentation": mask}))
        return objects

    def box(
        self, row: Any, where: str, width: int, height: int, *, clip: bool
    ) -> list[float] | None:
        """[x, y, w, h], within the image if `clip`; None for an empty one."""
        given = field(row, "bbox", list, where)
        if len(given) != 4 or not _are_numbers(given):
            raise ValueError(
                f"{where} has bbox {str(given)[:60]}: give x, y, width and height in pixels"
            )
        x, y, w, h = map(float, given)
        if clip and w > 0 and h > 0:
            left, top, right, bottom = (
                max(x, 0.0),
                max(y, 0.0),
                min(x + w, float(width)),
                min(y + h, float(height)),
            )
            if max(left - x, top - y, x + w - right, y + h - bottom) > ROUNDING:
                x, y, w, h = left, top, right - left, bottom - top
                self.count("boxes beyond the image, clipped to it")
        if w > 0 and h > 0:
            return [x, y, w, h]
        self.count("empty boxes, dropped")
        return None

    def mask(self, given: Any, where: str, width: int, height: int) -> Any:
        """The polygons that enclose something, or the RLE of an image of this size; None where
        nothing is left."""
        if given is None:
            return None
        if isinstance(given, dict):
            if _is_rle(given, width, height):
                return {"size": [height, width], "counts": given["counts"]}
            self.count("masks that do not fill their image, dropped with their objects")
            return None
        if not isinstance(given, list) or not all(
            isinstance(polygon, list) and _are_numbers(polygon) for polygon in given
        ):
            raise ValueError(
                f"{where} has a segmentation that is neither polygons of numbers nor RLE: "
                f"{str(given)[:60]}"
            )
        polygons = [polygon for polygon in given if len(polygon) >= 6 and len(polygon) % 2 == 0]
        self.count(
            "polygons of fewer than three points or half a point, dropped",
            len(given) - len(polygons),
        )
        self.count("objects without a polygon left, dropped", int(not polygons))
        return polygons or None

    def count(self, what: str, times: int = 1) -> None:
        if times:
            self.repaired[what] += times


def _files(raw: Path) -> dict[str, Path]:
    """Split -> its file; ValueError for none, or two of one split."""
    files: dict[str, Path] = {}
    for file in (file for pattern in FILES for file in found(raw, pattern)):
        split = "test-dev" if "test-dev" in file.stem else named_split(file, raw) or "train"
        if split in files:
            raise ValueError(f"{files[split]} and {file} are both {split}: keep one of them")
        files[split] = file
    if not files:
        raise nothing_known(raw, f"{' or '.join(FILES[:2])} (COCO), {FILES[2]} (Objects365)")
    return files


def _categories(files: Sequence[_File]) -> list[Category]:
    """[{id, name}] by id, of all files together."""
    names: dict[int, str] = {}
    for file in files:
        own: set[int] = set()
        for number, category in enumerate(field(file.content, "categories", list, file.path)):
            where = f"{file.path} categories[{number}]"
            id, name = (
                field(category, "id", int, where),
                " ".join(field(category, "name", str, where).split()),
            )
            if not name or not name.isprintable():
                raise ValueError(
                    f"{where} is called {name[:60]!r}: give it a name that can be printed"
                )
            if id in own or names.setdefault(id, name) != name:
                raise ValueError(
                    f"{where}, {name[:60]}, has the id {id} of {names[id][:60]}: give each "
                    "category an id of its own"
                )
            own.add(id)
    if not names:
        raise ValueError(f"{files[0].path} lists no categories: check that it is whole")
    return [{"id": id, "name": names[id]} for id in sorted(names)]


def _places(file: Path, split: str) -> list[str]:
    """Folders of the images of a file: train2017 or train, test2017 also for test-dev, images/...,
    and as Objects365's parts unpack."""
    names = list(dict.fromkeys((subset(file), subset(file).replace("-dev", ""), split)))
    places = [*names, *(f"images/{name}" for name in names), "images", ""]
    parts = [
        f"{outer}images/{version}"
        for outer in ("", *(f"{name}/" for name in names))
        for version in ("v1", "v2")
    ]
    return places + (parts if file.name.startswith("zhiyuan") else [])


def _image(listing: Listing, name: str) -> str:
    """Path of an image: Objects365's names begin with images/v1/ or images/v2/, its folders often
    do not."""
    path = PurePosixPath(re.sub(r"^images/v[12]/", "", name))
    return listing.find(path.name, folder="" if len(path.parts) < 2 else path.parent.as_posix())


def _area(row: Any, box: Sequence[float]) -> float:
    """The annotation's area; that of the box where it has none, or was clipped."""
    area = row.get("area")
    clipped = [float(side) for side in row["bbox"]] != [*box]
    known = isinstance(area, int | float) and 0 < area <= MAX_COORDINATE**2
    return float(area) if known and not clipped else box[2] * box[3]


def _is_rle(given: Mapping[str, Any], width: int, height: int) -> bool:
    """Whether RLE is of this size; runs in a list must fill it, those in a string are checked by
    who decodes them."""
    counts = given.get("counts")
    if given.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        return (
            all(isinstance(count, int) and count >= 0 for count in counts)
            and sum(counts) == width * height
        )
    return isinstance(counts, str) and counts != ""


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers that can be pixels, as far as masks are drawn."""
    return all(
        isinstance(value, int | float) and -MAX_COORDINATE <= value <= MAX_COORDINATE
        for value in values
    )
