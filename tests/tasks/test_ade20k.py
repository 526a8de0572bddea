"""Tests of semantic segmentation from files to predictions: unusual label maps, windows, views,
and real folders."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import beit3
from beit3.metrics.segmentation import summarize_confusion
from beit3.segmentation.inference import count_passes
from beit3.segmentation.records import decode_label_map, encode_label_map
from beit3.tasks.ade20k import CLASSES_FILE, Ade20k, sum_confusion
from beit3.weights.store import save_weights
from tests.tasks.dense import (
    DATA_DIR,
    MODEL,
    NUM_CLASSES,
    SIDE,
    add_noise,
    ade20k_config,
    make_inference_config,
    make_label_blocks,
    make_labeled_record,
    make_task,
    write_image,
)

NAMES = ("wall", "sky", "tree", "road")


@pytest.fixture(scope="module")
def ade20k() -> Ade20k:
    return add_noise(make_task("ade20k", classes=NAMES))


def copy_task(task: Ade20k, **fields: Any) -> Ade20k:
    """Returns a task with the same weights and other settings."""
    copy = Ade20k(replace(task.config, **fields))
    copy.load_state_dict(task.state_dict())
    return copy.eval()


@torch.no_grad()
def predict(task: Ade20k, *records: dict) -> list[dict[str, Any]]:
    examples = [task.example(record, False) for record in records]
    return task.eval().predict(task.collate(examples))


def compute_losses(task: Ade20k, *records: dict) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns losses and target counts of a training step.

    Checks that every used parameter gets a finite gradient. The task's buffers stay as they were.
    """
    state = {name: value.clone() for name, value in task.state_dict().items()}
    task.train().zero_grad()
    batch = task.collate([task.example(record, True) for record in records])
    losses, counts = task(batch)["losses"], task.targets(batch)
    torch.stack(list(losses.values())).sum().backward()
    unused = tuple(task.unused_parameters)
    for name, parameter in task.trainable_parameters():
        if not name.startswith(unused):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert losses.keys() == counts.keys()
    assert all(loss.isfinite() for loss in losses.values())
    task.eval().load_state_dict(state)
    return losses, counts


# Unusual label maps -------------------------------------------------------------------------------


def test_eight_bits_sixteen_bits_and_palettes_give_the_same_labels(ade20k, tmp_path):
    labels = make_label_blocks(80, 60)
    records = [
        make_labeled_record(tmp_path, "eight", labels),
        make_labeled_record(tmp_path, "sixteen", labels.astype(np.uint16)),
        make_labeled_record(tmp_path, "palette", labels, palette=True),
    ]
    label_maps = [ade20k.example({**record, "id": "0"}, True)["label_map"] for record in records]
    assert len(label_maps[0].unique()) > 1
    assert all(torch.equal(label_map, label_maps[0]) for label_map in label_maps)
    (prediction,) = predict(ade20k, records[0])
    scores = [
        Ade20k.score([{**prediction, "id": record["id"]}], [record])["miou"] for record in records
    ]
    assert len(set(scores)) == 1


def test_ignored_pixels_count_in_no_loss_and_no_score(ade20k, tmp_path):
    """An image of ignored pixels alone has no masks. Beside another image it adds only queries."""
    labeled = make_labeled_record(tmp_path, "a", make_label_blocks(64, 64))
    ignored = make_labeled_record(tmp_path, "b", np.full((64, 64), 255, np.uint8))
    losses, counts = compute_losses(ade20k, ignored, ignored)
    num_queries = ade20k.config.head.num_queries
    assert counts == {"mask": 0, "dice": 0, "class": 2 * num_queries * 100}
    assert losses["mask"] == losses["dice"] == 0 < losses["class"]
    num_masks = compute_losses(ade20k, labeled)[1]["mask"]
    assert compute_losses(ade20k, labeled, ignored)[1]["mask"] == num_masks > 0
    predictions = predict(ade20k, labeled, ignored)
    scores = Ade20k.score(predictions, [labeled, ignored])
    assert scores == Ade20k.score(predictions[:1], [labeled])
    with pytest.raises(ValueError, match="no pixel has a class, all are ignored"):
        Ade20k.score(predictions[1:], [ignored])


def test_an_image_may_have_more_classes_than_there_are_queries(ade20k, tmp_path):
    """With four classes and two queries, two masks are learned and counted."""
    task = add_noise(make_task("ade20k", head=replace(ade20k.config.head, num_queries=2)))
    labels = make_label_blocks(64, 64)
    record = make_labeled_record(tmp_path, "a", labels)
    counts = compute_losses(task, record)[1]
    assert counts["mask"] == 2 < len(np.unique(labels))
    assert counts["class"] == 2000
    assert predict(task, record)[0]["map"]


@pytest.mark.parametrize("size", [(1, 1), (900, 2), (2, 900), (1, 64), (700, 500)])
def test_images_may_have_any_size(ade20k, tmp_path, size):
    """Predictions have the image's own size, and the network makes `count_passes` passes."""
    width, height = size
    record = make_labeled_record(tmp_path, "a", make_label_blocks(width, height))
    compute_losses(ade20k, record)
    with patch.object(ade20k, "compute_scores", wraps=ade20k.compute_scores) as compute_scores:
        (prediction,) = predict(ade20k, record)
    assert compute_scores.call_count == count_passes(height, width, ade20k.config.views)
    assert (prediction["height"], prediction["width"]) == (height, width)
    assert decode_label_map(prediction).shape == (height, width)
    assert 0 <= Ade20k.score([prediction], [record])["aacc"] <= 1


def test_errors_name_the_file_or_the_record(ade20k, tmp_path):
    record = make_labeled_record(tmp_path, "a", make_label_blocks(40, 30))
    (prediction,) = predict(ade20k, record)

    beyond = make_labeled_record(tmp_path, "b", np.full((30, 40), NUM_CLASSES, np.uint8))
    with pytest.raises(ValueError, match="b_labels.png holds 4, beyond its 4 classes"):
        ade20k.example(beyond, True)
    with pytest.raises(ValueError, match="b_labels.png holds 4, beyond its 4 classes"):
        Ade20k.score([{**prediction, "id": "b"}], [beyond])

    square = make_labeled_record(tmp_path, "c", make_label_blocks(30, 30))
    mismatched = {**record, "label_map": square["label_map"]}
    with pytest.raises(ValueError, match="c_labels.png is 30 x 30, its image .*a.png 40 x 30"):
        ade20k.example(mismatched, True)
    with pytest.raises(ValueError, match="the prediction of a is 30 x 40, its label map 30 x 30"):
        Ade20k.score([prediction], [mismatched])

    rgb = write_image(tmp_path / "x.png", 40, 30)
    with pytest.raises(ValueError, match="x.png is .* of mode RGB"):
        ade20k.example({**record, "label_map": rgb}, True)

    unlabeled = {key: value for key, value in record.items() if key != "label_map"}
    with pytest.raises(ValueError, match="record a has no label map: train on a split that has"):
        ade20k.example(unlabeled, True)
    with pytest.raises(ValueError, match="some of these records hold no label map"):
        Ade20k.score([prediction], [unlabeled])


@pytest.mark.parametrize("train", [True, False])
def test_records_of_other_classes_are_refused(ade20k, tmp_path, train):
    record = make_labeled_record(tmp_path, "a", make_label_blocks(40, 30))
    record["labels"] = {"num_classes": 11}
    with pytest.raises(ValueError, match="11 classes in the records, 4 in the weights: give"):
        ade20k.example(record, train)


def test_class_names_must_be_present_and_as_many_as_classes(ade20k, tmp_path):
    with pytest.raises(ValueError, match="2 class names for 4 classes"):
        Ade20k(replace(ade20k.config, classes=("a", "b")))
    with pytest.raises(ValueError, match="ade20k/main/train.jsonl"):
        Ade20k.configure(ade20k.config, tmp_path)
    directory = tmp_path / "ade20k/main"
    directory.mkdir(parents=True)
    (directory / "train.jsonl").write_text("{}\n")
    message = f"no class names at .*{CLASSES_FILE}: run beit3 prepare ade20k again"
    with pytest.raises(ValueError, match=message):
        Ade20k.configure(ade20k.config, tmp_path)


@pytest.mark.parametrize(
    ("options", "confusion"),
    [
        ({"num_classes": 3, "reduce_zero": True}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ({"num_classes": 3, "ignore": 3}, [[0, 1, 0], [1, 0, 0], [0, 1, 0]]),
        ({"num_classes": 3, "lookup": [255, 2, 255, 0]}, [[0, 0, 1], [0, 0, 0], [1, 0, 0]]),
    ],
)
def test_labels_options_decide_what_the_numbers_of_a_map_mean(tmp_path, options, confusion):
    """The expected confusion matrices are counted by hand."""
    labels = np.array([[0, 1], [2, 3]], np.uint8)
    record = make_labeled_record(tmp_path, "a", labels) | {"labels": options}
    prediction = {"id": "a", "map": encode_label_map(torch.tensor([[1, 0], [1, 2]]))}
    matrix = sum_confusion([prediction], [record])
    assert matrix.tolist() == confusion
    if "reduce_zero" in options:
        assert summarize_confusion(matrix)["miou"] == 1.0


# Windows and views --------------------------------------------------------------------------------


def test_one_window_predicts_the_best_of_the_enlarged_scores(ade20k, tmp_path):
    record = make_labeled_record(tmp_path, "a", make_label_blocks(SIDE, SIDE))
    batch = {"image": ade20k.example(record, False)["image"][None]}
    with torch.no_grad():
        scores = ade20k.eval().outputs(batch)["scores"]
    assert scores.shape == (1, NUM_CLASSES, SIDE // 2, SIDE // 2)
    enlarged = F.interpolate(scores, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = decode_label_map(predict(ade20k, record)[0])
    assert np.array_equal(labels, enlarged.argmax(1)[0].numpy())


def make_flipped_records(folder: Any) -> list[dict[str, Any]]:
    """Makes a record of an image and a record of its mirror image."""
    pixels = np.asarray(Image.open(write_image(folder / "a.png", 96, SIDE)))
    return [
        {"id": "original", "image": Image.fromarray(pixels)},
        {"id": "flipped", "image": Image.fromarray(pixels[:, ::-1].copy())},
    ]


def test_the_scale_1_alone_and_more_windows_at_once_change_nothing(ade20k, tmp_path):
    records = make_flipped_records(tmp_path)
    default = copy_task(ade20k, views=make_inference_config())
    explicit = copy_task(ade20k, views=make_inference_config(scales=(1.0,), windows=3))
    assert predict(explicit, *records) == predict(default, *records)


@pytest.mark.parametrize("flip", [True, False])
def test_flipped_views_make_predictions_symmetric(ade20k, tmp_path, flip):
    task = copy_task(ade20k, views=make_inference_config(flip=flip))
    predictions = predict(task, *make_flipped_records(tmp_path))
    original, flipped = (decode_label_map(prediction) for prediction in predictions)
    agreement = (original == flipped[:, ::-1]).mean()
    assert agreement > 0.999 if flip else agreement < 0.99


def test_several_scales_give_a_map_of_the_images_size(ade20k, tmp_path):
    views = make_inference_config(scales=(0.75, 1.0, 1.5), flip=True)
    for prediction in predict(copy_task(ade20k, views=views), *make_flipped_records(tmp_path)):
        labels = decode_label_map(prediction)
        assert labels.shape == (SIDE, 96) and labels.max() < NUM_CLASSES


def test_padding_of_training_crops_is_zero_for_the_network(ade20k, tmp_path):
    """Whatever bytes the padding holds, the network gets zeros, the mean color."""
    record = make_labeled_record(tmp_path, "a", make_label_blocks(80, 24))
    task = copy_task(ade20k, train_view=replace(ade20k.config.train_view, long=SIDE))
    batch = task.collate([task.example(record, True)])
    ((height, width),) = batch["size"].tolist()
    assert height < SIDE
    assert (batch["label_map"][0, height:] == 255).all()
    assert (batch["label_map"][0, :, width:] == 255).all()
    noisy = batch["image"].clone()
    noisy[:, :, height:] = 77
    noisy[:, :, :, width:] = 99
    with torch.no_grad():
        pixels = task.normalize_images({**batch, "image": noisy})
    assert torch.equal(pixels, task.normalize_images(batch))
    assert not pixels[:, :, height:].any()
    assert pixels[:, :, :height, :width].any()


def test_the_predictor_takes_paths_images_gray_and_sixteen_bits(ade20k, tmp_path):
    save_weights(ade20k, tmp_path / "w")
    predictor = beit3.load(tmp_path / "w")
    (prediction,) = predictor(write_image(tmp_path / "x.png", 60, 40))
    assert decode_label_map(prediction).shape == (40, 60)
    assert json.dumps(prediction)
    assert predictor(Image.open(tmp_path / "x.png"))[0]["map"] == prediction["map"]
    gray_map = predictor(write_image(tmp_path / "gray.png", 60, 40, "L"))[0]["map"]
    assert predictor(write_image(tmp_path / "deep.png", 60, 40, "I;16"))[0]["map"] == gray_map
    with pytest.raises(ValueError, match="absent.png"):
        predictor(str(tmp_path / "absent.png"))


# Files --------------------------------------------------------------------------------------------


def test_the_command_line_prepares_evaluates_and_scores(raw, tmp_path, run_cli, run_failing_cli):
    """Runs `prepare`, `eval` with predictions and `score` on the embedded world."""
    report = json.loads(run_cli("prepare", "ade20k", "--raw", raw / "ade20k", "--root", tmp_path))
    task = add_noise(Ade20k(Ade20k.configure(ade20k_config(), tmp_path)))
    assert report["classes"] == len(task.config.classes) == task.config.num_classes > 2
    save_weights(task, tmp_path / "w")
    predictions_path = tmp_path / "p.jsonl"
    evaluate = ["eval", tmp_path / "w", "--data.root", tmp_path, "--predictions", predictions_path]
    score = ["score", "ade20k", predictions_path, "--data.root", tmp_path]
    scores = json.loads(run_cli(*evaluate))
    assert set(scores) == {"miou", "aacc", "macc"}
    assert json.loads(run_cli(*score)) == scores
    error = run_failing_cli(*evaluate, "--submission", tmp_path / "r.json")
    assert "no evaluation server" in error

    predictions = [json.loads(line) for line in predictions_path.read_text().splitlines()]
    broken = [{**prediction, "map": "aGk="} for prediction in predictions]
    predictions_path.write_text("".join(json.dumps(line) + "\n" for line in broken))
    error = run_failing_cli(*score)
    assert f"the map of prediction {predictions[0]['id']} is no PNG" in error

    # Records with other names than the weights are refused.
    names = [f"{name}!" for name in task.config.classes]
    (tmp_path / "ade20k/main" / CLASSES_FILE).write_text(json.dumps(names))
    error = run_failing_cli(*evaluate)
    assert f"class 0 is {task.config.classes[0]!r} to the weights and {names[0]!r} in" in error


def test_weights_of_detection_cannot_be_evaluated(tmp_path, root, run_failing_cli):
    save_weights(make_task("coco", model=replace(MODEL, depth=4)), tmp_path / "w")
    error = run_failing_cli("eval", tmp_path / "w", "--data.root", root, "--task", "ade20k")
    assert "the head of ade20k is untrained" in error


@pytest.mark.parametrize(
    ("name", "split", "num_classes"), [("camvid_mini", "train", 11), ("ade20k_sample", "val", 150)]
)
def test_real_folders_are_prepared_trained_on_and_predicted(
    tmp_path, run_cli, name, split, num_classes
):
    if not (DATA_DIR / name).exists():
        pytest.skip(f"real sample not at hand: {DATA_DIR / name}")
    report = json.loads(run_cli("prepare", "ade20k", "--raw", DATA_DIR / name, "--root", tmp_path))
    assert report["classes"] == num_classes
    assert report["records"][split] >= 3 and not report["passed_over"]
    directory = tmp_path / "ade20k/main"
    names = tuple(json.loads((directory / CLASSES_FILE).read_text()))
    task = add_noise(make_task("ade20k", classes=names, num_classes=num_classes))
    lines = (directory / f"{split}.jsonl").read_text().splitlines()[:3]
    records = [json.loads(line) for line in lines]
    for record in records:
        for key in ("image", "label_map"):
            record[key] = str(tmp_path / record[key])
    assert compute_losses(task, *records)[1]["mask"] >= 3
    predictions = predict(task, *records[:2])
    assert 0 <= Ade20k.score(predictions, records[:2])["miou"] < 0.3
    for prediction, record in zip(predictions, records, strict=False):
        width, height = Image.open(record["image"]).size
        assert decode_label_map(prediction).shape == (height, width)
