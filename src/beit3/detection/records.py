"""Objects between records (JSON) and tensors: annotations to train on, batches, detections.

A record's object is {"box": [x, y, w, h] in pixels, "label", "crowd", "segmentation": polygons or
an RLE}. Boxes in tensors are x1 y1 x2 y2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3.data.views.jitter import ObjectAnnotations
from beit3.detection.inference import Detections
from beit3.detection.matching import Target


def has_objects(record: Mapping[str, Any]) -> bool:
    """Returns whether a record has an object that is trained on, which crowd regions are not.

    It is also true of records with a wrong field `objects` or none, which `read_objects` refuses.
    """
    objects = record.get("objects")
    if not isinstance(objects, list):
        return True
    return any(not isinstance(item, dict) or not item.get("crowd") for item in objects)


def read_objects(record: Mapping[str, Any], *, num_classes: int, masks: bool) -> ObjectAnnotations:
    """Returns a record's objects for training.

    Crowd regions are left out, and with `masks` also objects without a segmentation.

    Raises:
        ValueError: If the record has no field `objects`, none of its objects has a segmentation
            although `masks` is set, or a label is not one of `num_classes`.
    """
    if "objects" not in record:
        raise ValueError(
            f"record {record['id']} has no field 'objects': train on a split with annotations"
        )
    objects = [item for item in record["objects"] if not item["crowd"]]
    if masks and objects:
        objects = [item for item in objects if item.get("segmentation")]
        if not objects:
            raise ValueError(
                f"record {record['id']} has boxes without segmentations: train on boxes alone, "
                "--task.detector.masks False"
            )
    labels = torch.tensor([int(item["label"]) for item in objects], dtype=torch.int64)
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"record {record['id']} has labels {labels.tolist()[:20]}, but there are {num_classes} "
            "categories: run beit3 prepare coco again"
        )
    boxes = torch.tensor([item["box"] for item in objects], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    segmentations = [item["segmentation"] for item in objects] if masks else None
    return ObjectAnnotations(boxes, labels, segmentations)


def collate_objects(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates the objects of several examples.

    Returns `boxes` [N, 4], `labels` [N], the number of objects of each example as `counts` [B], and
    if the examples have masks, `masks` [N, H, W], where H, W is the largest size of an image.
    """
    batch = {key: torch.cat([example[key] for example in examples]) for key in ("boxes", "labels")}
    counts = [len(example["labels"]) for example in examples]
    batch["counts"] = torch.tensor(counts)
    if "masks" in examples[0]:
        height, width = torch.stack([example["size"] for example in examples]).amax(0).tolist()
        batch["masks"] = torch.zeros(sum(counts), height, width, dtype=torch.uint8)
        for padded, example in zip(batch["masks"].split(counts), examples, strict=True):
            masks = example["masks"]
            padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return batch


def split_targets(batch: Mapping[str, Tensor], *, masks: bool) -> list[Target]:
    """Returns the objects of each image of a batch that `collate_objects` made."""
    counts = batch["counts"].tolist()
    mask_parts: Sequence[Tensor | None] = [None] * len(counts)
    if masks:
        mask_parts = batch["masks"].split(counts)
    parts = zip(
        batch["boxes"].split(counts), batch["labels"].split(counts), mask_parts, strict=True
    )
    return [Target(*part) for part in parts]


def format_detections(
    detections: Detections, *, categories: Sequence[str], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the detections of one image as JSON objects, best first.

    Each has `box` [x, y, w, h], `label` and `score`, `name` and `category` if the categories are
    known, and `mask`, an RLE, if the detector predicts masks.
    """
    boxes = detections.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    objects = []
    for index, (box, label, score) in enumerate(zip(boxes.tolist(), labels, scores, strict=True)):
        item = {"box": box, "label": label, "score": score}
        if categories:
            item["name"] = categories[label]
        if category_ids:
            item["category"] = category_ids[label]
        if detections.masks is not None:
            item["mask"] = detections.masks[index]
        objects.append(item)
    return objects


def format_coco_results(prediction: Mapping[str, Any], image_id: int) -> list[dict[str, Any]]:
    """Returns the objects of a prediction in COCO's results format.

    Raises ValueError if they have no category ids.
    """
    results = []
    for item in prediction["objects"]:
        if "category" not in item:
            raise ValueError(
                "these weights have no category ids: fine-tune them on records of `beit3 prepare "
                "coco`"
            )
        result = {
            "image_id": image_id,
            "category_id": item["category"],
            "bbox": item["box"],
            "score": item["score"],
        }
        if "mask" in item:
            result["segmentation"] = item["mask"]
        results.append(result)
    return results
