"""Reads Pascal VOC's objects: Annotations/*.xml, JPEGImages/ and the lists in ImageSets/Main.

Boxes are xmin, ymin, xmax, ymax, which count pixels from 1 and include the last one. Labels number
the sorted names of all objects, or VOC's 20 classes for its own images. Objects marked as difficult
become crowd regions: training leaves them out, and evaluation neither demands nor punishes them.
Parts of objects are not read.

An XML file that cannot be read makes its image a fault. Document types are refused, because
entities can make a small file endless.
"""

import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.files import ImageFinder, MissingImagePath, walk_files
from beit3.data.prepare.formats.objects import Annotation, Instances, ObjectCleaner
from beit3.data.prepare.formats.split_names import Record, SplitRecord, choose_split
from beit3.data.prepare.formats.voc import (
    IMAGE_FOLDERS,
    VOC_CLASSES,
    choose_voc_folder,
    find_voc_folders,
    find_voc_image,
    is_original,
    read_split_lists,
)
from beit3.data.stores.rle import MAX_COORDINATE
from beit3.images import open_with_pillow, read_upright_size

ANNOTATION_FOLDERS = ("Annotations", "annotations")
MAX_FILE_BYTES = 16 << 20
"""Largest XML file that is read; those of crowded images have 100 kB."""
BOX_FIELDS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """An object of an XML file."""

    name: str
    box: list[float]
    """x, y, width and height in pixels from 0."""
    difficult: bool


class VocImage(NamedTuple):
    """The content of an XML file."""

    size: tuple[int, int] | None
    """Width and height; None where the file has none."""
    objects: list[VocObject]


def is_voc_objects(raw: Path) -> bool:
    """Returns whether there is a folder of VOC's XML files."""
    folders = find_voc_folders(raw, ANNOTATION_FOLDERS)
    return any(_list_xml_files(folder) for folder in folders)


def read_voc_objects(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads `raw`, or the folder of one year below it.

    Without lists in ImageSets/Main every XML file is train, and without a val list 5 % are held
    out. `repaired` counts repairs. Raises ValueError for two years, and where no object has a name.
    """
    folder = choose_voc_folder(raw, ANNOTATION_FOLDERS)
    repair_counts = Counter() if repaired is None else repaired
    files = _list_xml_files(folder)
    splits = read_split_lists(folder, "Main") or dict.fromkeys(files, "train")
    num_unlisted = len(files.keys() - splits.keys())
    if num_unlisted:
        repair_counts["annotation files that no list names, passed over"] += num_unlisted
    images: dict[str, VocImage | ValueError] = {}
    for stem in splits:
        if stem in files:
            images[stem] = _read_or_fail(files[stem])
    contents = [image for image in images.values() if isinstance(image, VocImage)]
    names = sorted({item.name for image in contents for item in image.objects})
    if not names:
        faults = [str(image) for image in images.values() if isinstance(image, ValueError)]
        reason = f"; the first fault: {faults[0]}" if faults else ""
        raise ValueError(
            f"the {len(images)} files in {folder}/{_find_annotation_folder(folder)} name no "
            f"object: check that the dataset is complete{reason}"
        )
    if set(names) <= set(VOC_CLASSES) and is_original(folder, "Main", splits):
        names = [*VOC_CLASSES]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    category_ids = {name: number for number, name in enumerate(names, 1)}
    labels = {number: label for label, number in enumerate(category_ids.values())}
    cleaner = ObjectCleaner(labels, repair_counts)
    reader = VocReader(folder, splits, images, category_ids, cleaner)
    return categories, reader.read_pairs()


# XML ----------------------------------------------------------------------------------------------


class _TreeBuilder(ET.TreeBuilder):
    """Builds a tree of elements and refuses document types."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type: remove the DOCTYPE")


def parse_voc_xml(path: Path) -> VocImage:
    """Reads an XML file; raises ValueError that names it, the object and the remedy."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB: it is no annotation")
    try:
        parser = ET.XMLParser(target=_TreeBuilder())
        root = ET.fromstring(path.read_bytes(), parser)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not VOC's XML ({error}): get the file again") from None
    if root.tag != "annotation":
        raise ValueError(f"{path} is a {root.tag[:40]!r}, no annotation of VOC: remove it")
    objects = [
        _parse_object(item, f"{path} object {number}")
        for number, item in enumerate(root.iterfind("object"), 1)
    ]
    return VocImage(_parse_size(root), objects)


def _parse_object(item: ET.Element, location: str) -> VocObject:
    """Returns an object; raises ValueError that begins with `location`."""
    name = " ".join((item.findtext("name") or "").split())
    if not name or not name.isprintable():
        raise ValueError(f"{location} has no name that can be printed: give it one")
    box = item.find("bndbox")
    if box is None:
        raise ValueError(f"{location}, {name[:60]}, has no bndbox: give it one or remove it")
    left, top, right, bottom = (_parse_number(box, field, location) for field in BOX_FIELDS)
    difficult = (item.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{location} has difficult {difficult[:20]!r}: write 0 or 1")
    width, height = right - left + 1, bottom - top + 1
    if right < left or bottom < top:
        width = height = 0.0
    return VocObject(name, [left - 1, top - 1, width, height], difficult == "1")


def _parse_number(box: ET.Element, field: str, location: str) -> float:
    """Returns a side of a box in pixels."""
    text = (box.findtext(field) or "").strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < MAX_COORDINATE:
        raise ValueError(f"{location} has {field} {text[:20]!r}: give a number of pixels")
    return number


def _parse_size(root: ET.Element) -> tuple[int, int] | None:
    """Returns width and height; None where they are absent or not positive, as some tools write."""
    texts = [(root.findtext(f"size/{name}") or "").strip() for name in ("width", "height")]
    if not all(text.isdecimal() and len(text) < 7 and int(text) > 0 for text in texts):
        return None
    return int(texts[0]), int(texts[1])


def _read_or_fail(path: Path) -> VocImage | ValueError:
    """Returns the content of an XML file, or the error that it cannot be read."""
    try:
        return parse_voc_xml(path)
    except ValueError as error:
        return error


# Records ------------------------------------------------------------------------------------------


class VocReader(NamedTuple):
    """Makes the records of a dataset."""

    folder: Path
    splits: Mapping[str, str]
    images: Mapping[str, VocImage | ValueError]
    """Stem -> content of its XML file; a stem without a file is missing."""
    category_ids: Mapping[str, int]
    cleaner: ObjectCleaner

    def read_pairs(self) -> Iterator[SplitRecord]:
        """Yields (split, record) for each listed image."""
        has_val = "val" in self.splits.values()
        annotated_splits = {self.splits[stem] for stem in self.images}
        image_finder = ImageFinder(self.folder, *IMAGE_FOLDERS)
        next_id = 1
        for stem, split in self.splits.items():
            image = self.images.get(stem)
            record: Record = {"id": stem, "image": find_voc_image(image_finder, stem)}
            if isinstance(image, ValueError):
                record = {"id": stem, "fault": str(image)}
            elif image is not None:
                record |= self.make_fields(stem, image, record["image"], next_id)
                next_id += len(image.objects)
            elif split != "test" or split in annotated_splits:
                folder = self.folder / _find_annotation_folder(self.folder)
                record = {"id": stem, "fault": f"its annotations {folder / stem}.xml are missing"}
            yield choose_split(split, stem, has_val=has_val), record

    def make_fields(self, stem: str, image: VocImage, path: str, first_id: int) -> dict[str, Any]:
        """Returns width, height and objects of an image."""
        size = image.size or _measure_image(path)
        if size is None:
            return {}  # the image is missing or unreadable, which `prepare` reports
        file = f"{self.folder.name}/{stem}.xml"
        annotations = []
        for number, item in enumerate(image.objects):
            row = {
                "category_id": self.category_ids[item.name],
                "bbox": item.box,
                "iscrowd": int(item.difficult),
            }
            location = f"{file} object {number + 1}"
            annotations.append(Annotation(first_id + number, row, location))
        objects = self.cleaner.make_objects(annotations, *size)
        return {"width": size[0], "height": size[1], "objects": objects}


def _measure_image(path: str) -> tuple[int, int] | None:
    """Returns width and height of an image; None if it is missing or cannot be read."""
    if isinstance(path, MissingImagePath):
        return None
    try:
        with open_with_pillow(path, f"image {path}") as header:
            return read_upright_size(header)
    except ValueError:
        return None


def _list_xml_files(folder: Path) -> dict[str, Path]:
    """Returns stem, with the folders in front of it, -> XML file."""
    name = _find_annotation_folder(folder)
    paths = [path for path in walk_files(folder / name) if path.suffix.lower() == ".xml"]
    return {path.relative_to(folder / name).with_suffix("").as_posix(): path for path in paths}


def _find_annotation_folder(folder: Path) -> str:
    """Returns the name of the folder of XML files."""
    return next(
        (name for name in ANNOTATION_FOLDERS if (folder / name).is_dir()), ANNOTATION_FOLDERS[0]
    )
