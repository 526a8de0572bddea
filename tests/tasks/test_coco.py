"""Objects from records to predictions: hard pictures, windows, views, COCO's result format."""

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
from beit3.data.stores.rle import encode_rle, rasterize
from beit3.tasks.coco import CATEGORIES_FILE, Coco
from beit3.weights.store import save_weights
from tests.tasks.dense import DATA, LABELS, SIDE, coco_config, made, picture, scene, stirred, thing

IDS = {3: "cat", 7: "dog", 80: "cup", 90: "brush"}
"""Category ids with gaps, as COCO's."""


@pytest.fixture(scope="module")
def coco() -> Coco:
    """Of all four categories, with the data set's ids."""
    return stirred(made("coco", categories=tuple(IDS.values()), category_ids=tuple(IDS)))


def changed(task: Coco, **fields: Any) -> Coco:
    """The same weights under other settings."""
    other = Coco(replace(task.config, **fields))
    other.load_state_dict(task.state_dict())
    return other.eval()


def batch_of(task: Coco, *rows: dict, train: bool = False) -> dict[str, Any]:
    return task.collate([task.example(row, train) for row in rows])


@torch.no_grad()
def predicted(task: Coco, *rows: dict) -> list[dict[str, Any]]:
    return task.eval().predict(batch_of(task, *rows))


def step(task: Coco, *rows: dict) -> dict[str, Tensor]:
    """Losses, after a backward pass that must leave every gradient finite and none out."""
    task.train().zero_grad()
    losses = task(batch_of(task, *rows, train=True))["losses"]
    torch.stack(list(losses.values())).sum().backward()
    known = [
        p.grad
        for name, p in task.trainable_parameters()
        if not any(name.startswith(each) for each in task.unused_parameters)
    ]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in known)
    assert (
        all(value.isfinite() for value in losses.values())
        and losses.keys() == task.targets({"image": [0]}).keys()
    )
    return losses


# Hard records -------------------------------------------------------------------------------------


def test_pictures_without_objects(coco, tmp_path):
    """They teach what is background; where no picture has an object there is nothing to place or to
    outline."""
    some, none = scene(tmp_path, "1", (64, 48), thing(5, 5, 20, 20)), scene(tmp_path, "2", (40, 60))
    assert batch_of(coco, some, none, train=True)["masks"].shape == (
        1,
        *batch_of(coco, some, none, train=True)["size"].amax(0),
    )
    losses = step(coco, some, none)
    assert losses["rpn_objectness"] > 0 and losses["mask"] > 0
    losses = step(coco, none, none)
    assert all(
        (value == 0) == (name.endswith("_box") or name == "mask") for name, value in losses.items()
    )
    assert [row["id"] for row in predicted(coco, none, some)] == ["2", "1"]


def test_more_objects_than_are_learnt_from(coco, tmp_path):
    """64 on one picture, where the heads take 32 proposals and evaluation keeps 20."""
    many = scene(
        tmp_path,
        "1",
        (64, 64),
        *[thing(at % 8 * 8, at // 8 * 8, 6, 6, label=at % LABELS, id=at + 1) for at in range(64)],
    )
    assert len(many["objects"]) > max(
        coco.config.detector.roi_samples, coco.config.detector.detections_per_image
    )
    step(coco, many)
    (row,) = predicted(coco, many)
    assert len(row["objects"]) == coco.config.detector.detections_per_image
    scores = [each["score"] for each in row["objects"]]
    assert scores == sorted(scores, reverse=True)


def test_crowd_regions_teach_nothing_and_stay_for_evaluation(coco, tmp_path):
    crowd, one = thing(2, 2, 60, 60, label=1, crowd=True), thing(3, 3, 20, 20, id=2)
    row = scene(tmp_path, "1", (64, 64), crowd, one)
    assert coco.example(row, True)["labels"].tolist() == [0] and step(coco, row)
    step(coco, scene(tmp_path, "2", (64, 64), crowd))
    # A detection inside a crowd region is no mistake: without the region it is one, and better than
    # the right one.
    mask = encode_rle(rasterize(crowd["segmentation"], 64, 64))
    wrong = {"box": [10.0, 10.0, 30.0, 30.0], "label": 1, "score": 0.9, "mask": mask}
    right = {
        "box": one["box"],
        "label": 0,
        "score": 0.5,
        "mask": encode_rle(rasterize(one["segmentation"], 64, 64)),
    }
    also = thing(40, 40, 20, 20, label=1, id=3)
    found = {
        "box": also["box"],
        "label": 1,
        "score": 0.5,
        "mask": encode_rle(rasterize(also["segmentation"], 64, 64)),
    }
    predictions, objects = [{"id": "1", "objects": [wrong, right, found]}], [one, also]
    assert Coco.score(predictions, [row | {"objects": [crowd, *objects]}])["box_ap"] == 1
    assert Coco.score(predictions, [row | {"objects": objects}])["box_ap"] == pytest.approx(0.75)


def test_objects_without_outlines(coco, tmp_path):
    """Where masks are learnt they teach nothing beside others, and alone are refused: an image of
    boxes would teach background."""
    bare, outlined = thing(5, 5, 20, 20, outline=False), thing(30, 30, 20, 20, label=1, id=2)
    mixed, boxes = (
        scene(tmp_path, "1", (64, 64), bare, outlined),
        scene(tmp_path, "2", (64, 64), bare),
    )
    assert coco.example(mixed, True)["labels"].tolist() == [1]
    with pytest.raises(
        ValueError,
        match="record 2 has boxes without outlines: learn boxes alone, --task.detector.masks False",
    ):
        coco.example(boxes, True)
    alone = made("coco", detector=replace(coco_config().detector, masks=False))
    example = alone.example(mixed, True)
    assert (
        sorted(example["labels"].tolist()) == [0, 1]
        and "masks" not in example
        and "mask" not in step(alone, mixed, boxes)
    )
    rows = predicted(alone, mixed, boxes)
    assert not any("mask" in each for row in rows for each in row["objects"])
    for found in (rows, predicted(coco, mixed, boxes)):  # of the truth one has no outline
        assert all(name.startswith("box_") for name in Coco.score(found, [mixed, boxes]))


ONE, NONE = [(10, 10, 1, 1), (63, 63, 1, 1)], [(20.2, 20.2, 0.01, 0.01), (0, 5.2, 64, 0.1)]


@pytest.mark.parametrize(
    ("box", "count"), [*((box, 2) for box in ONE), *((box, 1) for box in NONE)]
)
def test_tiny_boxes(coco, tmp_path, box, count):
    """One pixel is learnt; an outline that covers none is not seen."""
    still = changed(coco, scale=(1.0, 1.0), flip=0.0)
    row = scene(tmp_path, "1", (SIDE, SIDE), thing(*box), thing(30, 30, 12, 12, id=2))
    seen = still.example(row, True)
    assert len(seen["boxes"]) == count and (seen["boxes"][:, 2:] > seen["boxes"][:, :2]).all()
    step(still, row)


@pytest.mark.parametrize("size", [(1, 1), (1500, 2), (2, 1500), (1, 64), (1600, 1200)])
def test_pictures_of_any_size(coco, tmp_path, size):
    """Predictions are of the picture's own size, within it."""
    width, height = size
    row = scene(tmp_path, "1", size, thing(0, 0, width, height))
    step(coco, row)
    (found,) = predicted(changed(coco, test_sizes=(96,), test_flip=True), row)
    assert (found["height"], found["width"]) == (height, width) and found["objects"]
    for each in found["objects"]:
        x, y, w, h = each["box"]
        assert (
            min(x, y) >= 0
            and x + w <= width + 1e-3
            and y + h <= height + 1e-3
            and each["mask"]["size"] == [height, width]
        )


def test_what_is_wrong_in_records_is_named(coco, tmp_path, root):
    row = scene(tmp_path, "17", (64, 64), thing(3, 3, 20, 20, label=LABELS))
    with pytest.raises(ValueError, match=r"labels \[4\] is none of the 4 categories"):
        coco.example(row, True)
    bare = {key: value for key, value in row.items() if key != "objects"}
    with pytest.raises(
        ValueError, match="record 17 says nothing of objects: train on a split that has them"
    ):
        coco.example(bare, True)
    rows = predicted(coco, bare)
    with pytest.raises(ValueError, match="some of these records hold no objects to compare with"):
        Coco.score(rows, [bare])
    torn = row | {
        "objects": [thing(3, 3, 20, 20) | {"segmentation": {"size": [3, 3], "counts": "04"}}]
    }
    with pytest.raises(ValueError, match="size"):
        coco.example(torn, True)


def test_settings_that_do_not_fit_are_refused(coco, tmp_path):
    for fields, said in (
        ({"test_sizes": (100,)}, "a square of 100 px is no multiple of the 8 px patch"),
        ({"image": replace(coco.config.image, resize="squash")}, "give fit"),
        ({"categories": ("a", "b")}, "2 categories for 4 classes"),
        ({"window": -1}, "window -1"),
    ):
        with pytest.raises(ValueError, match=said):
            Coco(replace(coco.config, **fields))
    with pytest.raises(ValueError, match="coco/main/train.jsonl"):
        Coco.configure(coco.config, tmp_path)
    (tmp_path / "coco/main").mkdir(parents=True)
    (tmp_path / "coco/main/train.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=f"no categories at .*{CATEGORIES_FILE}: run beit3 prepare coco again"
    ):
        Coco.configure(coco.config, tmp_path)


# Windows and views --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_window_as_large_as_the_grid_changes_nothing(coco, tmp_path):
    batch = batch_of(coco, scene(tmp_path, "1", (64, 40)), scene(tmp_path, "2", (30, 64)))
    plain = coco.eval().outputs(batch)
    for window, same in ((SIDE // 8, True), (3, False)):
        found = changed(coco, window=window, num_global=1).outputs(batch)
        assert all(torch.equal(found[key], plain[key]) for key in plain) == same


def test_views_are_merged(coco, tmp_path):
    """A size named twice is seen once; mirrored or larger views change little, of weights that know
    nothing yet."""
    rows = [scene(tmp_path, "1", (64, 48), thing(5, 5, 20, 20)), scene(tmp_path, "2", (40, 60))]
    plain = predicted(coco, *rows)
    assert predicted(changed(coco, test_sizes=(SIDE, SIDE)), *rows) == plain
    assert changed(coco, test_sizes=(96, SIDE, 96)).sizes == (SIDE, 96)
    merged = predicted(changed(coco, test_sizes=(96,), test_flip=True), *rows)
    assert merged != plain and [row["id"] for row in merged] == ["1", "2"]
    for row in merged:
        assert len(row["objects"]) == coco.config.detector.detections_per_image
        assert all(
            0 < each["score"] <= 1 and each["mask"]["size"] == [row["height"], row["width"]]
            for each in row["objects"]
        )


def test_mirrored_views_make_it_blind_to_mirroring(coco, tmp_path):
    """A picture and its mirror image have the same scores, and mirrored boxes."""
    path = picture(tmp_path / "1.png", SIDE, SIDE)
    pixels = np.asarray(Image.open(path))
    rows = [
        {"id": str(place), "image": Image.fromarray(each)}
        for place, each in enumerate((pixels, pixels[:, ::-1].copy()))
    ]
    one, two = predicted(changed(coco, test_flip=True), *rows)
    for left, right in zip(one["objects"], two["objects"], strict=True):
        x, y, w, h = left["box"]
        assert (
            right["score"] == pytest.approx(left["score"], rel=1e-4)
            and right["label"] == left["label"]
        )
        assert right["box"] == pytest.approx([SIDE - x - w, y, w, h], abs=0.01)
    plain = predicted(coco, *rows)
    assert plain[0]["objects"][0]["score"] != pytest.approx(
        plain[1]["objects"][0]["score"], rel=1e-4
    ), "without, it is not"


def test_raw_inputs_of_any_kind(coco, tmp_path):
    """A path, a picture in memory, grey and 16 bits: boxes with names and the data set's ids."""
    save_weights(coco, tmp_path / "w")
    ask = beit3.load(tmp_path / "w")
    (one,) = ask(picture(tmp_path / "x.png", 60, 40))
    assert (one["height"], one["width"]) == (40, 60) and json.dumps(one)
    for each in one["objects"]:
        assert (
            each["name"] == list(IDS.values())[each["label"]]
            and each["category"] == list(IDS)[each["label"]]
        )
        assert rasterize(each["mask"], 40, 60).shape == (40, 60)
    assert ask(Image.open(tmp_path / "x.png"))[0]["objects"] == one["objects"]
    grey = ask(picture(tmp_path / "grey.png", 60, 40, "L"))[0]["objects"]
    assert (
        ask(picture(tmp_path / "deep.png", 60, 40, "I;16"))[0]["objects"] == grey != one["objects"]
    )
    with pytest.raises(ValueError, match="absent.png"):
        ask(str(tmp_path / "absent.png"))


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """COCO's files of two pictures, with category ids that have gaps, a crowd region as RLE and a
    picture without objects."""
    runs = {"size": [48, 64], "counts": [48 * 30, 48 * 4, 48 * 30]}
    images = [
        {"id": 42, "file_name": "a.png", "width": 64, "height": 48},
        {"id": 7, "file_name": "b.png", "width": 40, "height": 40},
    ]
    rows = [thing(4, 4, 20, 16), thing(30, 10, 15, 30), thing(30, 0, 4, 48)]
    rows = [
        {key: value for key, value in row.items() if key not in ("label", "crowd", "box")}
        | {"bbox": row["box"]}
        for row in rows
    ]
    kinds, crowds = (3, 90, 90), (0, 0, 1)
    rows = [
        row | {"id": at + 11, "image_id": 42, "category_id": kinds[at], "iscrowd": crowds[at]}
        for at, row in enumerate(rows)
    ]
    rows[2]["segmentation"] = runs
    whole = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": id, "name": name} for id, name in IDS.items()],
    }
    (tmp_path / "raw/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"raw/{split}2017").mkdir()
        for image in images:
            picture(
                tmp_path / f"raw/{split}2017" / image["file_name"], image["width"], image["height"]
            )
        other = [row | {"file_name": row["file_name"]} for row in images]
        (tmp_path / f"raw/annotations/instances_{split}2017.json").write_text(
            json.dumps(whole | {"images": other})
        )
    return tmp_path / "raw"


def test_from_files_to_the_servers_results_and_back(files, tmp_path, run_cli, run_failing_cli):
    """`prepare`, `eval` with predictions and results, `score`; the truth as predictions gets full
    marks by the official code."""
    report = json.loads(run_cli("prepare", "coco", "--raw", files, "--root", tmp_path))
    assert report["records"] == {"train": 2, "val": 2} and report["categories"] == LABELS
    assert json.loads((tmp_path / "coco/main" / CATEGORIES_FILE).read_text()) == [
        {"id": id, "name": name} for id, name in IDS.items()
    ]
    task = stirred(Coco(Coco.configure(coco_config(), tmp_path)))
    save_weights(task, tmp_path / "w")
    verb = ["eval", tmp_path / "w", "--data.root", tmp_path, "--predictions", tmp_path / "p.jsonl"]
    scores = json.loads(run_cli(*verb))
    assert len(scores) == 24 and {"box_ap", "mask_ar_large"} <= set(scores)
    assert json.loads(
        run_cli("score", "coco", tmp_path / "p.jsonl", "--data.root", tmp_path)
    ) == pytest.approx(scores)
    run_cli(*verb, "--submission", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["image_id"] for row in results} == {7, 42} and {
        row["category_id"] for row in results
    } <= set(IDS)
    assert sum(len(row["objects"]) for row in read_predictions(tmp_path / "p.jsonl")) == len(
        results
    )
    official = pytest.importorskip(
        "pycocotools.coco", reason="pycocotools, the official code, is not installed"
    )
    truth = official.COCO(str(files / "annotations/instances_val2017.json"))
    assert len(truth.loadRes(results).anns) == len(results)
    assert official_ap(truth, perfect(tmp_path)) == pytest.approx({"bbox": 1.0, "segm": 1.0})
    # Weights of other categories would call things by wrong names.
    (tmp_path / "coco/main" / CATEGORIES_FILE).write_text(
        json.dumps([{"id": id, "name": name.upper()} for id, name in IDS.items()])
    )
    assert "class 0 is 'cat' to the weights and 'CAT' in" in run_failing_cli(*verb)


def perfect(root) -> list[dict[str, Any]]:
    """COCO's results of predictions that are the records' own objects."""
    records = [json.loads(line) for line in (root / "coco/main/val.jsonl").read_text().splitlines()]
    predictions = []
    for record in records:
        size = record["height"], record["width"]
        objects = [
            {
                "box": each["box"],
                "score": 1.0,
                "label": each["label"],
                "category": list(IDS)[each["label"]],
                "mask": encode_rle(rasterize(each["segmentation"], *size)),
            }
            for each in record["objects"]
            if not each["crowd"]
        ]
        predictions.append({"id": record["id"], "objects": objects})
    assert Coco.score(predictions, records)["mask_ap"] == 1.0
    return Coco.submission(predictions, records)


def official_ap(truth: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    found = {}
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        found[kind] = float(evaluation.stats[0])
    return found


def test_results_need_numbers_that_the_server_knows(coco, tmp_path):
    rows = [scene(tmp_path, "a", (64, 64))]
    with pytest.raises(ValueError, match="id 'a' is no number of the public dataset"):
        Coco.submission(predicted(coco, *rows), rows)
    nameless = changed(coco, categories=(), category_ids=())
    found = predicted(nameless, rows[0] | {"id": "1"})
    assert "name" not in found[0]["objects"][0]
    with pytest.raises(ValueError, match="these weights know no category ids"):
        Coco.submission(found, [rows[0] | {"id": "1"}])


def test_the_embedded_world(root, tmp_path, run_cli):
    """Its own records, scored by weights that know nothing."""
    task = stirred(Coco(Coco.configure(coco_config(), root)))
    save_weights(task, tmp_path / "w")
    scores = json.loads(
        run_cli("eval", tmp_path / "w", "--data.root", root, "--submission", tmp_path / "r.json")
        or "{}"
    )
    assert scores == {} and json.loads((tmp_path / "r.json").read_text())
    assert task.config.categories == (
        "circle",
        "square",
        "triangle",
        "cross",
        "bar",
    ) and task.config.category_ids == (1, 2, 3, 4, 5)


def test_real_coco(tmp_path, run_cli):
    """The whole reader through the command line; every training view and a batch of evaluation."""
    if not (DATA / "coco_mini").exists():
        pytest.skip(f"real sample not at hand: {DATA / 'coco_mini'}")
    report = json.loads(run_cli("prepare", "coco", "--raw", DATA / "coco_mini", "--root", tmp_path))
    assert report["categories"] == 80 and report["records"]["train"] >= 75
    task = stirred(Coco(Coco.configure(coco_config(), tmp_path)))
    records = [
        json.loads(line) for line in (tmp_path / "coco/main/train.jsonl").read_text().splitlines()
    ][:16]
    for record in records:
        record["image"] = str(tmp_path / record["image"])
    assert (
        task.config.category_ids[-1] == 90
        and sum(len(record["objects"]) for record in records) > 60
    )
    step(task, *records[:6])
    for record in records:
        seen = task.example(record, True)
        assert (
            len(seen["boxes"])
            == len(seen["labels"])
            == len(seen["masks"])
            <= len(record["objects"])
        )
    assert 0 <= Coco.score(predicted(task, *records[:4]), records[:4])["box_ap"] < 0.2
