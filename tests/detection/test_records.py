"""Objects of records as training targets and batches; detections as JSON and COCO results."""

import pytest
import torch

from beit3.detection.inference import Detections
from beit3.detection.records import (
    collate_objects,
    format_coco_results,
    format_detections,
    read_objects,
    split_targets,
)

POLYGON = [[2.0, 3, 12, 3, 12, 8, 2, 8]]


def make_object(label=0, crowd=False, segmentation=POLYGON):
    return {"box": [2, 3, 10, 5], "label": label, "crowd": crowd, "segmentation": segmentation}


def make_example(num_objects, size):
    return {
        "size": torch.tensor(size),
        "boxes": torch.rand(num_objects, 4),
        "labels": torch.arange(num_objects),
        "masks": torch.ones(num_objects, *size, dtype=torch.uint8),
    }


def test_crowds_and_objects_without_a_segmentation_are_left_out():
    objects = [make_object(), make_object(1, segmentation=None), make_object(2, crowd=True)]
    record = {"id": "1", "objects": objects}
    annotations = read_objects(record, num_classes=3, masks=True)
    assert annotations.labels.tolist() == [0] and annotations.segmentations == [POLYGON]
    assert annotations.boxes.tolist() == [[2, 3, 12, 8]]
    annotations = read_objects(record, num_classes=3, masks=False)
    assert annotations.labels.tolist() == [0, 1] and annotations.segmentations is None


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_are_refused(label):
    record = {"id": "1", "objects": [make_object(), make_object(label)]}
    with pytest.raises(ValueError, match=rf"record 1 has labels \[0, {label}\], .* 2 categories"):
        read_objects(record, num_classes=2, masks=True)


def test_collated_objects_are_split_into_targets_again():
    examples = [make_example(2, (4, 6)), make_example(0, (5, 3)), make_example(1, (2, 2))]
    batch = collate_objects(examples)
    assert batch["counts"].tolist() == [2, 0, 1]
    assert batch["masks"].shape == (3, 5, 6)
    assert batch["masks"].sum((1, 2)).tolist() == [24, 24, 4]
    for target, example in zip(split_targets(batch, masks=True), examples, strict=True):
        assert torch.equal(target.boxes, example["boxes"])
        assert torch.equal(target.labels, example["labels"])
        assert len(target.masks) == len(example["masks"])
    assert all(target.masks is None for target in split_targets(batch, masks=False))


def test_detections_become_json_and_coco_results():
    rle = {"size": [9, 9], "counts": "1"}
    detections = Detections(
        torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([0.5]), torch.tensor([1]), [rle]
    )
    objects = format_detections(detections, categories=("cat", "dog"), category_ids=(3, 7))
    item = {"box": [1, 2, 3, 6], "label": 1, "score": 0.5, "name": "dog", "category": 7}
    assert objects == [item | {"mask": rle}]
    result = {"image_id": 42, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert format_coco_results({"objects": objects}, 42) == [result | {"segmentation": rle}]
    assert format_coco_results({"objects": [item]}, 42) == [result]
    nameless = format_detections(detections, categories=(), category_ids=())
    assert nameless == [{"box": [1, 2, 3, 6], "label": 1, "score": 0.5, "mask": rle}]
    with pytest.raises(ValueError, match="no category ids"):
        format_coco_results({"objects": nameless}, 42)
