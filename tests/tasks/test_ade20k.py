"""A label for every pixel, from files to predictions: hard label maps, windows, views, real
folders."""

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.metrics.segmentation import summarize_confusion
from beit3.segmentation.inference import count_passes
from beit3.tasks.ade20k import (
    CLASSES_FILE,
    Ade20k,
    decode_label_map,
    encode_label_map,
    sum_confusion,
)
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


def changed(task: Ade20k, **fields: Any) -> Ade20k:
    """The same weights under other settings."""
    other = Ade20k(replace(task.config, **fields))
    other.load_state_dict(task.state_dict())
    return other.eval()


@torch.no_grad()
def predicted(task: Ade20k, *rows: dict) -> list[dict[str, Any]]:
    return task.eval().predict(task.collate([task.example(row, False) for row in rows]))


def step(task: Ade20k, *rows: dict) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Losses and counts, after a backward pass that must leave every gradient finite and none out.
    Statistics stay."""
    state = {name: value.clone() for name, value in task.state_dict().items()}
    task.train().zero_grad()
    batch = task.collate([task.example(row, True) for row in rows])
    losses, counts = task(batch)["losses"], task.targets(batch)
    torch.stack(list(losses.values())).sum().backward()
    known = [
        p.grad
        for name, p in task.trainable_parameters()
        if not any(name.startswith(each) for each in task.unused_parameters)
    ]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in known)
    assert losses.keys() == counts.keys() and all(value.isfinite() for value in losses.values())
    task.eval().load_state_dict(state)
    return losses, counts


# Hard label maps ----------------------------------------------------------------------------------


def test_eight_and_sixteen_bits_and_palettes_are_the_same_labels(ade20k, tmp_path):
    """To the bit: training views, and the score."""
    values = make_label_blocks(80, 60)
    forms = {"eight": {}, "sixteen": {}, "palette": {"palette": True}}
    rows = [
        make_labeled_record(
            tmp_path, name, values.astype(np.uint16) if name == "sixteen" else values, **form
        )
        for name, form in forms.items()
    ]
    views = [ade20k.example(row | {"id": "same"}, True) for row in rows]
    assert (
        all(torch.equal(view["label_map"], views[0]["label_map"]) for view in views)
        and len(views[0]["label_map"].unique()) > 1
    )
    found = predicted(ade20k, rows[0])[0]
    assert len({Ade20k.score([found | {"id": row["id"]}], [row])["miou"] for row in rows}) == 1


def test_ignored_pixels_count_nowhere(ade20k, tmp_path):
    """An image of nothing else is no target; beside others it changes nothing of theirs but what
    queries are worth."""
    some, none = (
        make_labeled_record(tmp_path, "a", make_label_blocks(64, 64)),
        make_labeled_record(tmp_path, "b", np.full((64, 64), 255, np.uint8)),
    )
    losses, counts = step(ade20k, none, none)
    queries = ade20k.config.head.num_queries
    assert (
        counts == {"mask": 0, "dice": 0, "class": 2 * queries * 100}
        and losses["mask"] == losses["dice"] == 0 < losses["class"]
    )
    assert step(ade20k, some, none)[1]["mask"] == step(ade20k, some)[1]["mask"] > 0
    rows = predicted(ade20k, some, none)
    assert Ade20k.score(rows, [some, none]) == Ade20k.score(rows[:1], [some])
    with pytest.raises(ValueError, match="no pixel has a class, all are ignored"):
        Ade20k.score(rows[1:], [none])


def test_more_classes_than_queries(ade20k, tmp_path):
    """Four classes on a picture, two queries: as many masks are learnt, and counted."""
    small = add_noise(make_task("ade20k", head=replace(ade20k.config.head, num_queries=2)))
    row = make_labeled_record(tmp_path, "a", make_label_blocks(64, 64))
    counts = step(small, row)[1]
    assert (
        counts["mask"] == 2 < len(np.unique(make_label_blocks(64, 64))) and counts["class"] == 2000
    )
    assert predicted(small, row)[0]["map"]


@pytest.mark.parametrize("size", [(1, 1), (900, 2), (2, 900), (1, 64), (700, 500)])
def test_pictures_of_any_size(ade20k, tmp_path, size):
    """Predictions are of the picture's own size; windows are as many as were announced."""
    width, height = size
    row = make_labeled_record(tmp_path, "a", make_label_blocks(width, height))
    step(ade20k, row)
    calls, scores = [], ade20k.scores
    ade20k.scores = lambda pixels: calls.append(1) or scores(pixels)  # type: ignore[method-assign]
    try:
        (found,) = predicted(ade20k, row)
    finally:
        del ade20k.scores
    assert len(calls) == count_passes(height, width, ade20k.config.views)
    assert decode_label_map(found).shape == (height, width) == (found["height"], found["width"])
    assert 0 <= Ade20k.score([found], [row])["aacc"] <= 1


def test_what_is_wrong_in_files_is_named(ade20k, tmp_path):
    row = make_labeled_record(tmp_path, "a", make_label_blocks(40, 30))
    beyond = make_labeled_record(tmp_path, "b", np.full((30, 40), NUM_CLASSES, np.uint8))
    with pytest.raises(ValueError, match="b_labels.png holds 4, beyond its 4 classes"):
        ade20k.example(beyond, True)
    with pytest.raises(ValueError, match="b_labels.png holds 4, beyond its 4 classes"):
        Ade20k.score([predicted(ade20k, row)[0] | {"id": "b"}], [beyond])
    other = row | {
        "label_map": make_labeled_record(tmp_path, "c", make_label_blocks(30, 30))["label_map"]
    }
    with pytest.raises(ValueError, match="c_labels.png is 30 x 30, its image .*a.png 40 x 30"):
        ade20k.example(other, True)
    with pytest.raises(ValueError, match="the prediction of a is 30 x 40, its label map 30 x 30"):
        Ade20k.score(predicted(ade20k, other), [other])
    with pytest.raises(ValueError, match="x.png is .* of mode RGB"):
        ade20k.example(row | {"label_map": write_image(tmp_path / "x.png", 40, 30)}, True)
    bare = {key: value for key, value in row.items() if key != "label_map"}
    with pytest.raises(
        ValueError, match="record a has no label map: train on a split that has them"
    ):
        ade20k.example(bare, True)
    with pytest.raises(ValueError, match="some of these records hold no label map"):
        Ade20k.score(predicted(ade20k, bare), [bare])


def test_records_of_other_classes_are_refused(ade20k, tmp_path):
    """At training and at evaluation."""
    row = make_labeled_record(tmp_path, "a", make_label_blocks(40, 30)) | {
        "labels": {"num_classes": 11}
    }
    for train in (True, False):
        with pytest.raises(
            ValueError, match="11 classes in the records, 4 here: give records of the same classes"
        ):
            ade20k.example(row, train)
    with pytest.raises(ValueError, match="2 class names for 4 classes"):
        Ade20k(replace(ade20k.config, classes=("a", "b")))
    with pytest.raises(ValueError, match="ade20k/main/train.jsonl"):
        Ade20k.configure(ade20k.config, tmp_path)
    (tmp_path / "ade20k/main").mkdir(parents=True)
    (tmp_path / "ade20k/main/train.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=f"no class names at .*{CLASSES_FILE}: run beit3 prepare ade20k again"
    ):
        Ade20k.configure(ade20k.config, tmp_path)


def test_the_meaning_of_numbers(tmp_path):
    """0 as no class, another number for ignored pixels, a lookup: one matrix, by hand."""
    truth = np.array([[0, 1], [2, 3]], np.uint8)
    found = {"id": "a", "map": encode_label_map(torch.tensor([[1, 0], [1, 2]]))}
    for meaning, wanted in (
        ({"num_classes": 3, "reduce_zero": True}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ({"num_classes": 3, "ignore": 3}, [[0, 1, 0], [1, 0, 0], [0, 1, 0]]),
        ({"num_classes": 3, "lookup": [255, 2, 255, 0]}, [[0, 0, 1], [0, 0, 0], [1, 0, 0]]),
    ):
        row = make_labeled_record(tmp_path, "a", truth) | {"labels": meaning}
        assert sum_confusion([found], [row]).tolist() == wanted, meaning
    assert (
        summarize_confusion(
            sum_confusion(
                [found],
                [make_labeled_record(tmp_path, "a", truth, reduce_zero=True, num_classes=3)],
            )
        )["miou"]
        == 1.0
    )


def test_predictions_as_pngs():
    for largest, mode in ((3, "L"), (255, "L"), (256, "I;16"), (40_000, "I;16")):
        labels = torch.randint(0, largest + 1, (5, 7))
        labels[0, 0] = largest
        text = encode_label_map(labels)
        assert Image.open(io.BytesIO(base64.b64decode(text))).mode == mode
        assert np.array_equal(decode_label_map({"id": "a", "map": text}), labels.numpy())
    for wrong in ("x", "aGk=", "", {}, None, 3):
        with pytest.raises(
            ValueError, match="the map of prediction a is no PNG of labels in base64: predict again"
        ):
            decode_label_map({"id": "a", "map": wrong})


# Windows and views --------------------------------------------------------------------------------


def test_one_window_is_the_network_alone(ade20k, tmp_path):
    """A picture of the window's size: the best of its scores, enlarged."""
    row = make_labeled_record(tmp_path, "a", make_label_blocks(SIDE, SIDE))
    batch = {"image": torch.stack([ade20k.example(row, False)["image"]])}
    with torch.no_grad():
        scores = ade20k.eval().outputs(batch)["scores"]
    best = torch.nn.functional.interpolate(
        scores, size=(SIDE, SIDE), mode="bilinear", align_corners=False
    ).argmax(1)[0]
    assert np.array_equal(
        decode_label_map(predicted(ade20k, row)[0]), best.numpy()
    ) and scores.shape == (
        1,
        NUM_CLASSES,
        SIDE // 2,
        SIDE // 2,
    )


def test_scales_and_mirrored_views(ade20k, tmp_path):
    """The scale 1 alone is what it was; more views give whole maps, and mirroring makes blind to
    mirroring."""
    pixels = np.asarray(Image.open(write_image(tmp_path / "a.png", 96, SIDE)))
    plain, mirrored = (
        changed(ade20k, views=make_inference_config(flip=flip)) for flip in (False, True)
    )
    rows = [
        {"id": str(place), "image": Image.fromarray(each)}
        for place, each in enumerate((pixels, pixels[:, ::-1].copy()))
    ]
    assert predicted(
        changed(ade20k, views=make_inference_config(scales=(1.0,), windows=3)), *rows
    ) == predicted(plain, *rows)
    left, right = (decode_label_map(row) for row in predicted(mirrored, *rows))
    assert (left == right[:, ::-1]).mean() > 0.999
    left, right = (decode_label_map(row) for row in predicted(plain, *rows))
    assert (left == right[:, ::-1]).mean() < 0.99, "without, it is not"
    several = [
        decode_label_map(row)
        for row in predicted(
            changed(ade20k, views=make_inference_config(scales=(0.75, 1.0, 1.5), flip=True)), *rows
        )
    ]
    assert all(each.shape == (SIDE, 96) and each.max() < NUM_CLASSES for each in several)


def test_what_is_filled_up_says_nothing(ade20k, tmp_path):
    """A training view smaller than its square: whatever the padding's bytes, the network sees
    zeros, the mean color."""
    row = make_labeled_record(tmp_path, "a", make_label_blocks(80, 24))
    low = changed(ade20k, train_view=replace(ade20k.config.train_view, long=SIDE))
    batch = low.collate([low.example(row, True)])
    ((height, width),) = batch["size"].tolist()
    assert (
        height < SIDE
        and (batch["label_map"][0, height:] == 255).all()
        and (batch["label_map"][0, :, width:] == 255).all()
    )
    noisy = batch["image"].clone()
    noisy[:, :, height:], noisy[:, :, :, width:] = 77, 99
    with torch.no_grad():
        pixels = low.normalize_images(batch | {"image": noisy})
    assert (
        torch.equal(pixels, low.normalize_images(batch))
        and not pixels[:, :, height:].any()
        and pixels[:, :, :height, :width].any()
    )


def test_raw_inputs_of_any_kind(ade20k, tmp_path):
    """A path, a picture in memory, grey and 16 bits."""
    save_weights(ade20k, tmp_path / "w")
    ask = beit3.load(tmp_path / "w")
    (one,) = ask(write_image(tmp_path / "x.png", 60, 40))
    assert decode_label_map(one).shape == (40, 60) and json.dumps(one)
    assert ask(Image.open(tmp_path / "x.png"))[0]["map"] == one["map"]
    grey = ask(write_image(tmp_path / "grey.png", 60, 40, "L"))[0]["map"]
    assert ask(write_image(tmp_path / "deep.png", 60, 40, "I;16"))[0]["map"] == grey
    with pytest.raises(ValueError, match="absent.png"):
        ask(str(tmp_path / "absent.png"))


# Files --------------------------------------------------------------------------------------------


def test_the_embedded_world_through_the_command_line(raw, tmp_path, run_cli, run_failing_cli):
    """`prepare`, `eval` with predictions, `score`; there is no server to send anything to."""
    report = json.loads(run_cli("prepare", "ade20k", "--raw", raw / "ade20k", "--root", tmp_path))
    task = add_noise(Ade20k(Ade20k.configure(ade20k_config(), tmp_path)))
    assert report["classes"] == len(task.config.classes) == task.config.num_classes > 2
    save_weights(task, tmp_path / "w")
    verb = ["eval", tmp_path / "w", "--data.root", tmp_path, "--predictions", tmp_path / "p.jsonl"]
    scores = json.loads(run_cli(*verb))
    assert set(scores) == {"miou", "aacc", "macc"}
    assert (
        json.loads(run_cli("score", "ade20k", tmp_path / "p.jsonl", "--data.root", tmp_path))
        == scores
    )
    assert "no evaluation server" in run_failing_cli(*verb, "--submission", tmp_path / "r.json")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(line | {"map": "aGk="}) + "\n" for line in lines)
    )
    assert f"the map of prediction {lines[0]['id']} is no PNG" in run_failing_cli(
        "score", "ade20k", tmp_path / "p.jsonl", "--data.root", tmp_path
    )
    # Weights of other names would call things by wrong ones.
    names = [f"{name}!" for name in task.config.classes]
    (tmp_path / "ade20k/main" / CLASSES_FILE).write_text(json.dumps(names))
    assert (
        f"class 0 is {task.config.classes[0]!r} to the weights and {names[0]!r} in"
        in run_failing_cli(*verb)
    )


def test_weights_of_detection_are_not_scored_here(tmp_path, root, run_failing_cli):
    save_weights(make_task("coco", model=replace(MODEL, depth=4)), tmp_path / "w")
    assert "the head of ade20k is untrained" in run_failing_cli(
        "eval", tmp_path / "w", "--data.root", root, "--task", "ade20k"
    )


@pytest.mark.parametrize(
    ("name", "split", "classes"), [("camvid_mini", "train", 11), ("ade20k_sample", "val", 150)]
)
def test_real_folders(tmp_path, run_cli, name, split, classes):
    """The whole reader through the command line, training views, and a picture through windows at
    its own size."""
    if not (DATA_DIR / name).exists():
        pytest.skip(f"real sample not at hand: {DATA_DIR / name}")
    report = json.loads(run_cli("prepare", "ade20k", "--raw", DATA_DIR / name, "--root", tmp_path))
    assert (
        report["classes"] == classes and report["records"][split] >= 3 and not report["passed_over"]
    )
    names = tuple(json.loads((tmp_path / "ade20k/main" / CLASSES_FILE).read_text()))
    task = add_noise(make_task("ade20k", classes=names, num_classes=classes))
    records = [
        json.loads(line)
        for line in (tmp_path / f"ade20k/main/{split}.jsonl").read_text().splitlines()
    ][:3]
    for record in records:
        record |= {key: str(tmp_path / record[key]) for key in ("image", "label_map")}
    counts = step(task, *records)[1]
    assert counts["mask"] >= 3
    rows = predicted(task, *records[:2])
    assert 0 <= Ade20k.score(rows, records[:2])["miou"] < 0.3
    assert [decode_label_map(row).shape for row in rows] == [
        Image.open(record["image"]).size[::-1] for record in records[:2]
    ]
