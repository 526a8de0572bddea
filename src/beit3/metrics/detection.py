"""COCO's average precision and recall of boxes or masks.

A record is {"id", "width", "height", "objects": [{"box": [x, y, w, h], "label", "area", "crowd",
"segmentation"}]}, a prediction {"id", "objects": [{"box", "label", "score", "mask": RLE}]}; boxes
are in pixels. Scores are from 0 to 1; -1 means undefined. faster_coco_eval computes them; its
numbers equal those of pycocotools to 1e-15.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

COCO_METRICS = (
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
"""COCO's twelve scores in its order.

Small objects have an area below 32 x 32 pixels, large ones from 96 x 96. `ar_10` is the recall with
10 detections per class and image.
"""

IouKind = Literal["box", "mask"]
Item = Mapping[str, Any]
"""A record, a prediction, or an object of either."""


def compute_coco_ap(
    predictions: Sequence[Item], records: Sequence[Item], *, kind: IouKind
) -> dict[str, Any]:
    """Computes the `COCO_METRICS` of predictions against records.

    All records count, those without a prediction as without detections; of each class the best 100
    detections of an image count. Of equal scores the first comes first: images by their number if
    all ids are numbers, as in COCO, else in the order of the records; objects in the order of the
    prediction.

    Args:
        predictions: One prediction per record.
        records: The annotated records of the split.
        kind: Whether overlaps are of boxes or of masks.

    Returns:
        The twelve scores, -1 where the records have no such object, and `per_class`, which maps the
        labels in the records to their AP.

    Raises:
        ValueError: If a prediction names an unknown record or one twice, or if an object lacks what
            the comparison needs.
    """
    records_by_id = {str(record["id"]): record for record in records}
    image_numbers = _number_images([str(record["id"]) for record in records])
    results = list(_list_results(predictions, records_by_id, image_numbers, kind))
    annotations = [
        annotation
        for key, record in records_by_id.items()
        for annotation in _list_annotations(record, image_numbers[key], kind)
    ]
    labels = sorted({annotation["category_id"] for annotation in annotations})
    if not labels:
        return dict.fromkeys(COCO_METRICS, -1.0) | {"per_class": {}}
    images = [
        {"id": image_numbers[key], "width": record.get("width"), "height": record.get("height")}
        for key, record in records_by_id.items()
    ]
    evaluation = _run_evaluation(images, labels, annotations, results, kind)
    # [thresholds, recalls, C] for objects of any area and 100 detections per image.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    scores: dict[str, Any] = dict(zip(COCO_METRICS, map(float, evaluation.stats), strict=True))
    scores["per_class"] = {
        label: _average_defined(precision[:, :, index]) for index, label in enumerate(labels)
    }
    return scores


def _run_evaluation(
    images: list[Any],
    labels: Sequence[int],
    annotations: list[Any],
    results: list[Any],
    kind: IouKind,
) -> Any:
    """Returns COCO's evaluation object after it has run."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise ValueError(
            "COCO's scores need faster-coco-eval, which is not installed: "
            "pip install faster-coco-eval"
        ) from None
    categories = [{"id": label} for label in labels]
    datasets = []
    for items in (annotations, results):
        # Ids start at 1, because COCO reads 0 as unmatched.
        numbered = [item | {"id": number} for number, item in enumerate(items, 1)]
        datasets.append(COCO({"images": images, "categories": categories, "annotations": numbered}))
    evaluation = COCOeval_faster(*datasets, iouType="bbox" if kind == "box" else "segm")
    evaluation.run()
    return evaluation


def _list_annotations(record: Item, image_number: int, kind: IouKind) -> Iterator[dict[str, Any]]:
    """Yields a record's objects as COCO annotations."""
    for item in record["objects"]:
        annotation = {
            "image_id": image_number,
            "category_id": int(item["label"]),
            "bbox": item["box"],
            "area": item["area"],
            "iscrowd": int(item["crowd"]),
        }
        if kind == "mask":
            if "segmentation" not in item:
                raise ValueError(
                    f"record {record['id']} has an object without a segmentation: "
                    "only boxes can be compared"
                )
            annotation["segmentation"] = item["segmentation"]
        yield annotation


def _list_results(
    predictions: Sequence[Item],
    records_by_id: Mapping[str, Item],
    image_numbers: Mapping[str, int],
    kind: IouKind,
) -> Iterator[dict[str, Any]]:
    """Yields all predicted objects as COCO results; the area is that of the box or of the mask."""
    predicted_ids: set[str] = set()
    for prediction in predictions:
        key = str(prediction["id"])
        if key in predicted_ids:
            raise ValueError(f"two predictions for record {key}: give one for each record")
        if key not in records_by_id:
            raise ValueError(f"a prediction names record {key}, which is not in this split")
        predicted_ids.add(key)
        for item in prediction["objects"]:
            if not math.isfinite(item["score"]):
                raise ValueError(
                    f"the prediction for record {key} has a score of {item['score']}: "
                    "give finite numbers"
                )
            result = {
                "image_id": image_numbers[key],
                "category_id": int(item["label"]),
                "score": float(item["score"]),
                "iscrowd": 0,
            }
            shape = _box_fields(item) if kind == "box" else _mask_fields(item, records_by_id[key])
            yield result | shape


def _box_fields(item: Item) -> dict[str, Any]:
    return {"bbox": list(map(float, item["box"])), "area": float(item["box"][2] * item["box"][3])}


def _mask_fields(item: Item, record: Item) -> dict[str, Any]:
    from faster_coco_eval import mask

    size = [record["height"], record["width"]]
    if "mask" not in item or list(item["mask"]["size"]) != size:
        raise ValueError(
            f"the prediction for record {record['id']} has an object without a mask of size "
            f"{size}: compare boxes alone"
        )
    try:
        area = float(mask.area(item["mask"]))
    except RuntimeError:  # the run lengths end early, or hold other characters
        raise ValueError(
            f"the prediction for record {record['id']} has a mask whose counts are no run lengths "
            "of COCO: predict again"
        ) from None
    return {"segmentation": item["mask"], "area": area}


def _number_images(ids: Sequence[str]) -> dict[str, int]:
    """Numbers the ids from 1, in the order in which images of equal scores count."""
    ordered = sorted(ids, key=int) if all(key.isdecimal() for key in ids) else ids
    numbers = {key: number for number, key in enumerate(ordered, 1)}
    if len(numbers) < len(ids):
        raise ValueError("two records have the same id: give every record its own")
    return numbers


def _average_defined(values: np.ndarray) -> float:
    """Returns the mean of the defined values, or -1 if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
