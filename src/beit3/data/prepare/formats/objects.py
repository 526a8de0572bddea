"""Objects of images as records hold them: boxes, polygons and RLEs, cleaned, with every repair
counted.

An object is {id: int >= 1, box: [x, y, w, h] in pixels, label, area, crowd: bool, segmentation?}.
Boxes without a mask are clipped to the image, and dropped where they repeat another one. Where
there is a mask, the mask counts, and the box stays as evaluators have it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit3.data.prepare.formats.files import get_field
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.stores.rle import MAX_COORDINATE

Category = dict[str, Any]
"""{id, name} of a label."""
Instances = tuple[list[Category], Iterator[SplitRecord]]
"""The categories in the order of the labels, and pairs of (split, record)."""

ROUNDING_TOLERANCE = 0.01
"""Number of pixels by which a box may leave the image unnoticed: annotations have two decimals."""


@dataclass(frozen=True)
class Annotation:
    """An object of an image, as the file has it."""

    id: int
    row: Any
    location: str
    """ "<file> annotations[7]", for messages."""


@dataclass(frozen=True)
class ObjectCleaner:
    """Makes the objects of images.

    Attributes:
        labels: Category id -> label.
        repaired: Description of a repair -> how often it was made.
    """

    labels: Mapping[int, int]
    repaired: Counter[str]

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


def _compute_area(row: Any, box: Sequence[float]) -> float:
    """Returns the annotation's area, or that of the box if it has none or the box was clipped."""
    area = row.get("area")
    was_clipped = [float(value) for value in row["bbox"]] != [*box]
    is_valid = isinstance(area, int | float) and 0 < area <= MAX_COORDINATE**2
    return float(area) if is_valid and not was_clipped else box[2] * box[3]


def _is_rle(segmentation: Mapping[str, Any], width: int, height: int) -> bool:
    """Returns whether RLE is of this size and its runs, a list or a string, fill it."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return False
    if isinstance(counts, str):
        counts = _read_runs(counts)
    if not isinstance(counts, list):
        return False
    are_counts = all(isinstance(count, int) and count >= 0 for count in counts)
    return are_counts and sum(counts) == width * height


def _read_runs(text: str) -> list[int] | None:
    """Returns the runs of COCO's string, or None if it is none.

    A run is written in characters of five bits each, the lowest first, and from the fourth run on
    as the difference from the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for char in text:
        bits = ord(char) - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


def _are_coordinates(values: Sequence[Any]) -> bool:
    """Returns whether all values are finite numbers in the range in which masks are drawn."""
    return all(
        isinstance(value, int | float) and -MAX_COORDINATE <= value <= MAX_COORDINATE
        for value in values
    )
