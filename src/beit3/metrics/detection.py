"""COCO's average precision and recall of boxes or masks. Predictions and records in, figures out: 0 to 1, -1 = undefined.

A record is {"id", "width", "height", "objects": [{"box": [x, y, w, h], "label", "area", "crowd", "segmentation"}]}, a
prediction {"id", "objects": [{"box", "label", "score", "mask": RLE}]}; boxes in pixels. The arithmetic is faster_coco_eval's,
whose figures are pycocotools' to 1e-15.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""COCO's twelve, in its order. Small is below 32 x 32 pixels of area, large from 96 x 96; `ar_10`: with 10 of a class per picture."""

Kind = Literal["box", "mask"]
Item = Mapping[str, Any]


def coco_ap(predictions: Sequence[Item], records: Sequence[Item], *, kind: Kind) -> dict[str, Any]:
    """The twelve `FIGURES`, and `per_class`: label -> AP, of the labels that the records show.

    All records count, those without a prediction as without detections, and of each class the best 100 of a picture. -1 stands
    where the records show no such object. Of equal scores the first counts first: pictures by their number where all ids are
    numbers, as COCO has them, else in the records' order; objects in the prediction's.
    ValueError for predictions that name no record or one twice, and for objects that lack what the comparison needs.
    """
    numbers = _numbers([str(record["id"]) for record in records])
    known = {str(record["id"]): record for record in records}
    found = list(_found(predictions, known, numbers, kind))
    truth = [item for key, record in known.items() for item in _truth(record, numbers[key], kind)]
    labels = sorted({item["category_id"] for item in truth})
    if not labels:
        return dict.fromkeys(FIGURES, -1.0) | {"per_class": {}}
    images = [
        {"id": numbers[key], "width": record.get("width"), "height": record.get("height")}
        for key, record in known.items()
    ]
    evaluation = _evaluated(images, labels, truth, found, kind)
    precision = evaluation.eval["precision"][
        :, :, :, 0, -1
    ]  # [thresholds, recalls, C]: of any area, among 100
    figures: dict[str, Any] = dict(zip(FIGURES, map(float, evaluation.stats), strict=True))
    return figures | {
        "per_class": {label: _mean(precision[:, :, place]) for place, label in enumerate(labels)}
    }


def _evaluated(
    images: list[Any], labels: Sequence[int], truth: list[Any], found: list[Any], kind: Kind
) -> Any:
    """The evaluation, run over all images."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise ValueError(
            "COCO's figures need faster-coco-eval, which is not there: pip install faster-coco-eval"
        ) from None
    sides = []
    for items in (truth, found):
        numbered = [
            item | {"id": number} for number, item in enumerate(items, 1)
        ]  # 0 would mean unmatched
        sides.append(
            COCO(
                {
                    "images": images,
                    "categories": [{"id": label} for label in labels],
                    "annotations": numbered,
                }
            )
        )
    evaluation = COCOeval_faster(*sides, iouType="bbox" if kind == "box" else "segm")
    evaluation.run()
    return evaluation


def _truth(record: Item, number: int, kind: Kind) -> Iterator[dict[str, Any]]:
    """A record's objects as COCO's annotations of image `number`."""
    for item in record["objects"]:
        annotation = {
            "image_id": number,
            "category_id": int(item["label"]),
            "bbox": item["box"],
            "area": item["area"],
        }
        annotation["iscrowd"] = int(item["crowd"])
        if kind == "mask":
            if "segmentation" not in item:
                raise ValueError(
                    f"record {record['id']} has an object without a segmentation: only boxes can be compared"
                )
            annotation["segmentation"] = item["segmentation"]
        yield annotation


def _found(
    predictions: Sequence[Item], known: Mapping[str, Item], numbers: Mapping[str, int], kind: Kind
) -> Iterator[dict[str, Any]]:
    """All predicted objects as COCO's results; a box's area is that of the box, a mask's that of its pixels."""
    seen: set[str] = set()
    for prediction in predictions:
        key = str(prediction["id"])
        if key in seen:
            raise ValueError(f"two predictions for record {key}: each must have one")
        if key not in known:
            raise ValueError(f"a prediction names record {key}, which is not in this split")
        seen.add(key)
        for item in prediction["objects"]:
            if not math.isfinite(item["score"]):
                raise ValueError(
                    f"the prediction for record {key} has a score of {item['score']}: give finite numbers"
                )
            result = {
                "image_id": numbers[key],
                "category_id": int(item["label"]),
                "score": float(item["score"]),
                "iscrowd": 0,
            }
            yield result | (_boxed(item) if kind == "box" else _masked(item, known[key]))


def _boxed(item: Item) -> dict[str, Any]:
    return {"bbox": list(map(float, item["box"])), "area": float(item["box"][2] * item["box"][3])}


def _masked(item: Item, record: Item) -> dict[str, Any]:
    from faster_coco_eval import mask

    size = [record["height"], record["width"]]
    if "mask" not in item or list(item["mask"]["size"]) != size:
        raise ValueError(
            f"the prediction for record {record['id']} has an object without a mask of size {size}: compare boxes alone"
        )
    return {"segmentation": item["mask"], "area": float(mask.area(item["mask"]))}


def _numbers(ids: Sequence[str]) -> dict[str, int]:
    """Ids -> 1, 2, ... in the order in which equal scores are taken."""
    ordered = sorted(ids, key=int) if all(key.isdecimal() for key in ids) else ids
    numbers = {key: number for number, key in enumerate(ordered, 1)}
    if len(numbers) < len(ids):
        raise ValueError("two records have the same id: give every record its own")
    return numbers


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined, -1 where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
