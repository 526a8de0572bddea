"""Detection from records to predictions: unusual records, windows, test-time augmentation and
COCO's results format."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.data.stores.predictions import read_predictions
from beit3.data.stores.records import write_records
from beit3.data.stores.rle import encode_rle, rasterize
from beit3.recipe import DataConfig
from beit3.tasks.coco import CATEGORIES_FILE, Coco
from beit3.training.sources import open_source
from beit3.weights.store import save_weights
from tests.tasks.dense import (
    DATA_DIR,
    NUM_CLASSES,
    SIDE,
    add_noise,
    coco_config,
    make_object,
    make_record,
    make_task,
    write_image,
)

CATEGORIES = {3: "cat", 7: "dog", 80: "cup", 90: "brush"}
"""Category ids with gaps, as in COCO, and their names."""


@pytest.fixture(scope="module")
def coco() -> Coco:
    """A task of four categories with the dataset's ids."""
    task = make_task("coco", categories=tuple(CATEGORIES.values()), category_ids=tuple(CATEGORIES))
    return add_noise(task)


def with_settings(task: Coco, **fields: Any) -> Coco:
    """A task with the same weights and other settings."""
    changed = Coco(replace(task.config, **fields))
    changed.load_state_dict(task.state_dict())
    return changed.eval()


def make_batch(task: Coco, *records: dict, train: bool = False) -> dict[str, Any]:
    return task.collate([task.example(record, train) for record in records])


@torch.no_grad()
def predict(task: Coco, *records: dict) -> list[dict[str, Any]]:
    return task.eval().predict(make_batch(task, *records))


def run_step(task: Coco, *records: dict) -> dict[str, Tensor]:
    """The losses, after checking that every trained parameter has a finite gradient."""
    task.train().zero_grad()
    losses = task(make_batch(task, *records, train=True))["losses"]
    torch.stack(list(losses.values())).sum().backward()
    unused = tuple(task.unused_parameters)
    for name, parameter in task.trainable_parameters():
        if not name.startswith(unused):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(loss.isfinite() for loss in losses.values())
    assert losses.keys() == task.targets({"image": [0]}).keys()
    return losses


# Unusual records ----------------------------------------------------------------------------------


def test_images_without_objects_train_the_background(coco, tmp_path):
    record = make_record(tmp_path, "1", (64, 48), make_object(5, 5, 20, 20))
    empty = make_record(tmp_path, "2", (40, 60))
    batch = make_batch(coco, record, empty, train=True)
    assert batch["masks"].shape == (1, *batch["size"].amax(0))
    losses = run_step(coco, record, empty)
    assert losses["rpn_objectness"] > 0 and losses["mask"] > 0
    for name, loss in run_step(coco, empty, empty).items():
        assert (loss == 0) == (name.endswith("_box") or name == "mask"), name
    assert [prediction["id"] for prediction in predict(coco, empty, record)] == ["2", "1"]


def test_an_image_may_have_more_objects_than_are_sampled(coco, tmp_path):
    """64 objects, where the heads sample 32 proposals and evaluation keeps 20 detections."""
    objects = [
        make_object(i % 8 * 8, i // 8 * 8, 6, 6, label=i % NUM_CLASSES, id=i + 1) for i in range(64)
    ]
    record = make_record(tmp_path, "1", (64, 64), *objects)
    config = coco.config.detector
    assert len(objects) > max(config.roi_samples, config.detections_per_image)
    run_step(coco, record)
    (prediction,) = predict(coco, record)
    assert len(prediction["objects"]) == config.detections_per_image
    scores = [item["score"] for item in prediction["objects"]]
    assert scores == sorted(scores, reverse=True)


def test_crowd_regions_are_not_trained_on_but_evaluated(coco, tmp_path):
    crowd = make_object(2, 2, 60, 60, label=1, crowd=True)
    first, second = make_object(3, 3, 20, 20, id=2), make_object(40, 40, 20, 20, label=1, id=3)
    record = make_record(tmp_path, "1", (64, 64), crowd, first)
    assert coco.example(record, True)["labels"].tolist() == [0] and run_step(coco, record)
    run_step(coco, make_record(tmp_path, "2", (64, 64), crowd))

    def detect(item, score):
        mask = encode_rle(rasterize(item["segmentation"], 64, 64))
        return {"box": item["box"], "label": item["label"], "score": score, "mask": mask}

    # A detection within a crowd region is no mistake. Without the region it is one, and it has a
    # higher score than the correct detections.
    in_crowd = detect(crowd, 0.9) | {"box": [10.0, 10.0, 30.0, 30.0]}
    detections = [in_crowd, detect(first, 0.5), detect(second, 0.5)]
    predictions = [{"id": "1", "objects": detections}]
    with_crowd = record | {"objects": [crowd, first, second]}
    assert Coco.score(predictions, [with_crowd])["box_ap"] == 1
    without_crowd = record | {"objects": [first, second]}
    assert Coco.score(predictions, [without_crowd])["box_ap"] == pytest.approx(0.75)


def test_objects_without_segmentation_are_left_out_of_mask_training(coco, tmp_path):
    """An image with only such objects is refused, because it would train them as background."""
    box_only = make_object(5, 5, 20, 20, with_polygon=False)
    with_polygon = make_object(30, 30, 20, 20, label=1, id=2)
    mixed = make_record(tmp_path, "1", (64, 64), box_only, with_polygon)
    boxes_only = make_record(tmp_path, "2", (64, 64), box_only)
    assert coco.example(mixed, True)["labels"].tolist() == [1]
    message = (
        "record 2 has boxes without segmentations: train on boxes alone, "
        "--task.detector.masks False"
    )
    with pytest.raises(ValueError, match=message):
        coco.example(boxes_only, True)

    box_task = make_task("coco", detector=replace(coco_config().detector, masks=False))
    example = box_task.example(mixed, True)
    assert sorted(example["labels"].tolist()) == [0, 1] and "masks" not in example
    assert "mask" not in run_step(box_task, mixed, boxes_only)
    box_predictions = predict(box_task, mixed, boxes_only)
    for prediction in box_predictions:
        assert not any("mask" in item for item in prediction["objects"])
    # One annotated object has no segmentation, so that only boxes can be scored.
    for predictions in (box_predictions, predict(coco, mixed, boxes_only)):
        scores = Coco.score(predictions, [mixed, boxes_only])
        assert all(name.startswith("box_") for name in scores)


COVERS_ONE_PIXEL = [(10, 10, 1, 1), (63, 63, 1, 1)]
COVERS_NO_PIXEL = [(20.2, 20.2, 0.01, 0.01), (0, 5.2, 64, 0.1)]


@pytest.mark.parametrize(
    ("box", "num_visible"),
    [*((box, 2) for box in COVERS_ONE_PIXEL), *((box, 1) for box in COVERS_NO_PIXEL)],
)
def test_tiny_objects_are_visible_from_one_pixel(coco, tmp_path, box, num_visible):
    task = with_settings(coco, scale=(1.0, 1.0), flip=0.0)
    objects = make_object(*box), make_object(30, 30, 12, 12, id=2)
    record = make_record(tmp_path, "1", (SIDE, SIDE), *objects)
    boxes = task.example(record, True)["boxes"]
    assert len(boxes) == num_visible and (boxes[:, 2:] > boxes[:, :2]).all()
    run_step(task, record)


@pytest.mark.parametrize("size", [(1, 1), (1500, 2), (2, 1500), (1, 64), (1600, 1200)])
def test_images_may_have_any_size(coco, tmp_path, size):
    """Predictions are in the pixels of the image itself and within it."""
    width, height = size
    record = make_record(tmp_path, "1", size, make_object(0, 0, width, height))
    run_step(coco, record)
    (prediction,) = predict(with_settings(coco, test_sizes=(96,), test_flip=True), record)
    assert (prediction["height"], prediction["width"]) == (height, width)
    assert prediction["objects"]
    for item in prediction["objects"]:
        x, y, w, h = item["box"]
        assert min(x, y) >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3
        assert item["mask"]["size"] == [height, width]


def test_invalid_records_are_refused(coco, tmp_path, root):
    record = make_record(tmp_path, "17", (64, 64), make_object(3, 3, 20, 20, label=NUM_CLASSES))
    with pytest.raises(ValueError, match=r"record 17 has labels \[4\], .* 4 categories"):
        coco.example(record, True)
    unannotated = {key: value for key, value in record.items() if key != "objects"}
    message = "record 17 has no field 'objects': train on a split with annotations"
    with pytest.raises(ValueError, match=message):
        coco.example(unannotated, True)
    predictions = predict(coco, unannotated)
    with pytest.raises(ValueError, match="some of these records hold no objects to compare with"):
        Coco.score(predictions, [unannotated])
    wrong_rle = {"segmentation": {"size": [3, 3], "counts": "04"}}
    with pytest.raises(ValueError, match="size"):
        coco.example(record | {"objects": [make_object(3, 3, 20, 20) | wrong_rle]}, True)


def test_inconsistent_settings_are_refused(coco, tmp_path):
    for fields, message in (
        ({"test_sizes": (100,)}, "image size 100 px is no multiple of the 8 px patch"),
        ({"image": replace(coco.config.image, resize="squash")}, "give fit"),
        ({"categories": ("a", "b")}, "2 categories for 4 classes"),
        ({"window": -1}, "window -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Coco(replace(coco.config, **fields))
    with pytest.raises(ValueError, match="coco/main/train.jsonl"):
        Coco.configure(coco.config, tmp_path)
    (tmp_path / "coco/main").mkdir(parents=True)
    (tmp_path / "coco/main/train.jsonl").write_text("{}\n")
    message = f"no categories at .*{CATEGORIES_FILE}: run beit3 prepare coco again"
    with pytest.raises(ValueError, match=message):
        Coco.configure(coco.config, tmp_path)


# Windows and test-time augmentation ---------------------------------------------------------------


@torch.no_grad()
def test_a_window_as_large_as_the_map_equals_global_attention(coco, tmp_path):
    records = make_record(tmp_path, "1", (64, 40)), make_record(tmp_path, "2", (30, 64))
    batch = make_batch(coco, *records)
    expected = coco.eval().outputs(batch)
    for window, is_equal in ((SIDE // 8, True), (3, False)):
        outputs = with_settings(coco, window=window, num_global=1).outputs(batch)
        assert all(torch.equal(outputs[key], expected[key]) for key in expected) == is_equal


def test_views_of_several_sizes_are_merged(coco, tmp_path):
    """A size that is listed twice is used once."""
    records = [
        make_record(tmp_path, "1", (64, 48), make_object(5, 5, 20, 20)),
        make_record(tmp_path, "2", (40, 60)),
    ]
    single = predict(coco, *records)
    assert predict(with_settings(coco, test_sizes=(SIDE, SIDE)), *records) == single
    assert with_settings(coco, test_sizes=(96, SIDE, 96)).sizes == (SIDE, 96)
    merged = predict(with_settings(coco, test_sizes=(96,), test_flip=True), *records)
    assert merged != single and [prediction["id"] for prediction in merged] == ["1", "2"]
    for prediction in merged:
        assert len(prediction["objects"]) == coco.config.detector.detections_per_image
        for item in prediction["objects"]:
            assert 0 < item["score"] <= 1
            assert item["mask"]["size"] == [prediction["height"], prediction["width"]]


def test_flipped_views_make_predictions_invariant_to_flips(coco, tmp_path):
    """An image and its flipped copy get the same scores, and flipped boxes."""
    pixels = np.asarray(Image.open(write_image(tmp_path / "1.png", SIDE, SIDE)))
    records = [
        {"id": "original", "image": Image.fromarray(pixels)},
        {"id": "flipped", "image": Image.fromarray(pixels[:, ::-1].copy())},
    ]
    original, flipped = predict(with_settings(coco, test_flip=True), *records)
    for item, flipped_item in zip(original["objects"], flipped["objects"], strict=True):
        x, y, w, h = item["box"]
        assert flipped_item["score"] == pytest.approx(item["score"], rel=1e-4)
        assert flipped_item["label"] == item["label"]
        assert flipped_item["box"] == pytest.approx([SIDE - x - w, y, w, h], abs=0.01)
    original, flipped = predict(coco, *records)
    best_scores = [prediction["objects"][0]["score"] for prediction in (original, flipped)]
    assert best_scores[0] != pytest.approx(best_scores[1], rel=1e-4)  # not without flipped views


def test_predictors_take_images_of_any_kind(coco, tmp_path):
    """A path, an image in memory, gray and 16 bits; objects have names and the dataset's ids."""
    save_weights(coco, tmp_path / "weights")
    predictor = beit3.load(tmp_path / "weights")
    (prediction,) = predictor(write_image(tmp_path / "x.png", 60, 40))
    assert (prediction["height"], prediction["width"]) == (40, 60) and json.dumps(prediction)
    objects = prediction["objects"]
    for item in objects:
        assert item["name"] == list(CATEGORIES.values())[item["label"]]
        assert item["category"] == list(CATEGORIES)[item["label"]]
        assert rasterize(item["mask"], 40, 60).shape == (40, 60)
    assert predictor(Image.open(tmp_path / "x.png"))[0]["objects"] == objects
    gray = predictor(write_image(tmp_path / "gray.png", 60, 40, "L"))[0]["objects"]
    deep = predictor(write_image(tmp_path / "deep.png", 60, 40, "I;16"))[0]["objects"]
    assert deep == gray != objects
    with pytest.raises(ValueError, match="absent.png"):
        predictor(str(tmp_path / "absent.png"))


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def raw_files(tmp_path):
    """COCO's files of two images, with gaps in the category ids, a crowd and an empty image."""
    images = [
        {"id": 42, "file_name": "a.png", "width": 64, "height": 48},
        {"id": 7, "file_name": "b.png", "width": 40, "height": 40},
    ]
    crowd_rle = {"size": [48, 64], "counts": [48 * 30, 48 * 4, 48 * 30]}
    annotations = [
        make_annotation(11, (4, 4, 20, 16), category_id=3),
        make_annotation(12, (30, 10, 15, 30), category_id=90),
        make_annotation(13, (30, 0, 4, 48), category_id=90)
        | {"iscrowd": 1, "segmentation": crowd_rle},
    ]
    categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "raw/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        folder = tmp_path / f"raw/{split}2017"
        folder.mkdir()
        for image in images:
            write_image(folder / image["file_name"], image["width"], image["height"])
        file = tmp_path / f"raw/annotations/instances_{split}2017.json"
        file.write_text(json.dumps(content))
    return tmp_path / "raw"


def make_annotation(id, box, *, category_id):
    item = make_object(*box)
    annotation = {"id": id, "image_id": 42, "category_id": category_id, "iscrowd": 0}
    return annotation | {"bbox": item["box"]} | {k: item[k] for k in ("area", "segmentation")}


def test_files_become_records_predictions_and_results(
    raw_files, tmp_path, run_cli, run_failing_cli
):
    """`prepare`, `eval` with predictions and results, and `score`, by the command line."""
    report = json.loads(run_cli("prepare", "coco", "--raw", raw_files, "--root", tmp_path))
    assert report["records"] == {"train": 2, "val": 2} and report["categories"] == NUM_CLASSES
    categories_file = tmp_path / "coco/main" / CATEGORIES_FILE
    categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
    assert json.loads(categories_file.read_text()) == categories

    weights, predictions = tmp_path / "weights", tmp_path / "predictions.jsonl"
    save_weights(add_noise(Coco(Coco.configure(coco_config(), tmp_path))), weights)
    evaluate = ["eval", weights, "--data.root", tmp_path, "--predictions", predictions]
    scores = json.loads(run_cli(*evaluate))
    assert len(scores) == 24 and {"box_ap", "mask_ar_large"} <= set(scores)
    rescored = json.loads(run_cli("score", "coco", predictions, "--data.root", tmp_path))
    assert rescored == pytest.approx(scores)

    run_cli(*evaluate, "--submission", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {7, 42}
    assert {result["category_id"] for result in results} <= set(CATEGORIES)
    num_objects = sum(len(prediction["objects"]) for prediction in read_predictions(predictions))
    assert num_objects == len(results)

    # Weights of other categories would name objects wrongly.
    for category in categories:
        category["name"] = category["name"].upper()
    categories_file.write_text(json.dumps(categories))
    assert "class 0 is 'cat' to the weights and 'CAT' in" in run_failing_cli(*evaluate)


def test_annotations_as_results_score_1_by_the_official_code(raw_files, tmp_path, run_cli):
    official = pytest.importorskip(
        "pycocotools.coco", reason="pycocotools, the official code, is not installed"
    )
    run_cli("prepare", "coco", "--raw", raw_files, "--root", tmp_path)
    truth = official.COCO(str(raw_files / "annotations/instances_val2017.json"))
    results = make_perfect_results(tmp_path)
    assert len(truth.loadRes(results).anns) == len(results)
    assert compute_official_ap(truth, results) == pytest.approx({"bbox": 1.0, "segm": 1.0})


def make_perfect_results(root) -> list[dict[str, Any]]:
    """COCO results that equal the annotated objects."""
    lines = (root / "coco/main/val.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    predictions = []
    for record in records:
        size = record["height"], record["width"]
        objects = [
            {
                "box": item["box"],
                "score": 1.0,
                "label": item["label"],
                "category": list(CATEGORIES)[item["label"]],
                "mask": encode_rle(rasterize(item["segmentation"], *size)),
            }
            for item in record["objects"]
            if not item["crowd"]
        ]
        predictions.append({"id": record["id"], "objects": objects})
    assert Coco.score(predictions, records)["mask_ap"] == 1.0
    return Coco.submission(predictions, records)


def compute_official_ap(truth: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    scores = {}
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores[kind] = float(evaluation.stats[0])
    return scores


def test_submissions_need_the_datasets_numbers(coco, tmp_path):
    record = make_record(tmp_path, "a", (64, 64))
    with pytest.raises(ValueError, match="id 'a' is no number of the public dataset"):
        Coco.submission(predict(coco, record), [record])
    record["id"] = "1"
    predictions = predict(with_settings(coco, categories=(), category_ids=()), record)
    assert "name" not in predictions[0]["objects"][0]
    with pytest.raises(ValueError, match="these weights have no category ids"):
        Coco.submission(predictions, [record])


def test_the_embedded_world_can_be_evaluated(root, tmp_path, run_cli):
    task = add_noise(Coco(Coco.configure(coco_config(), root)))
    save_weights(task, tmp_path / "weights")
    results = tmp_path / "results.json"
    printed = run_cli("eval", tmp_path / "weights", "--data.root", root, "--submission", results)
    assert not printed and json.loads(results.read_text())
    assert task.config.categories == ("circle", "square", "triangle", "cross", "bar")
    assert task.config.category_ids == (1, 2, 3, 4, 5)


def test_real_coco_images_can_be_trained_on_and_evaluated(tmp_path, run_cli):
    raw = DATA_DIR / "coco_mini"
    if not raw.exists():
        pytest.skip(f"the real sample {raw} is not available")
    report = json.loads(run_cli("prepare", "coco", "--raw", raw, "--root", tmp_path))
    assert report["categories"] == 80 and report["records"]["train"] >= 75
    task = add_noise(Coco(Coco.configure(coco_config(), tmp_path)))
    assert task.config.category_ids[-1] == 90
    lines = (tmp_path / "coco/main/train.jsonl").read_text().splitlines()[:16]
    records = [json.loads(line) for line in lines]
    assert sum(len(record["objects"]) for record in records) > 60
    for record in records:
        record["image"] = str(tmp_path / record["image"])
    run_step(task, *records[:6])
    for record in records:
        example = task.example(record, True)
        num_visible = len(example["boxes"])
        assert num_visible == len(example["labels"]) == len(example["masks"])
        assert num_visible <= len(record["objects"])
    assert 0 <= Coco.score(predict(task, *records[:4]), records[:4])["box_ap"] < 0.2


def test_training_leaves_out_images_without_objects(root, tmp_path, capsys):
    """An image with crowd regions alone is one of them; val and other uses keep them."""
    records = [
        make_record(tmp_path, "empty", (64, 64)),
        make_record(tmp_path, "crowd", (64, 64), make_object(1, 1, 9, 9, crowd=True)),
        make_record(tmp_path, "full", (64, 64), make_object(1, 1, 9, 9)),
    ]
    recipe = replace(Coco.recipes["demo"], data=DataConfig())
    for split in ("train", "val"):
        write_records(tmp_path / "coco" / "main" / f"{split}.jsonl", records)
    train = open_source(tmp_path, Coco, "main", recipe)
    assert [record["id"] for record in train] == ["full"]
    assert "2 records of" in capsys.readouterr().err
    assert len(open_source(tmp_path, Coco, "main", recipe, "val")) == 3
    write_records(tmp_path / "coco" / "main" / "train.jsonl", records[:2])
    with pytest.raises(ValueError, match="only records that are left out of training"):
        open_source(tmp_path, Coco, "main", recipe)
