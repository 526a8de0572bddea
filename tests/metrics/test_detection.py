"""COCO's figures: the official example, the official evaluator on random detections, and what is empty or refused."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from beit3.metrics.detection import FIGURES, coco_ap
from tests.golden import golden

SIDE = 128


# The official example ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, official, results", [("box", "bbox", "fakebbox"), ("mask", "segm", "fakesegm")]
)
def test_the_official_example(kind, official, results):
    folder = golden("coco_eval")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    found = json.loads((folder / f"instances_val2014_{results}100_results.json").read_text())
    wanted = json.loads((folder / "expected.json").read_text())[official]
    names = {"box": "bbox", "mask": "segmentation"}
    records = [
        {
            "id": str(image["id"]),
            "width": image["width"],
            "height": image["height"],
            "objects": [
                {
                    "box": a["bbox"],
                    "label": a["category_id"],
                    "area": a["area"],
                    "crowd": bool(a["iscrowd"]),
                    "segmentation": a["segmentation"],
                }
                for a in truth["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in truth["images"]
    ]
    predictions = [
        {
            "id": record["id"],
            "objects": [
                {kind: a[names[kind]], "label": a["category_id"], "score": a["score"]}
                for a in found
                if str(a["image_id"]) == record["id"]
            ],
        }
        for record in records
    ]
    # Neither the order of the records nor pictures without a prediction change anything.
    figures = coco_ap(
        [prediction for prediction in predictions if prediction["objects"]],
        records[::-1],
        kind=kind,
    )
    assert [figures[name] for name in FIGURES] == pytest.approx(
        list(wanted["stats"].values()), rel=0, abs=1e-9
    )
    per_class = {int(label): ap for label, ap in wanted["per_category_AP"].items()}
    assert (
        figures["per_class"] == pytest.approx(per_class, rel=0, abs=1e-9) and len(per_class) == 70
    )


# The official evaluator ----------------------------------------------------------------------------------------------


def random_case(seed):
    """Pictures with crowds, or with nothing; detections near objects, of the wrong class, twice, tied, or more than 100."""
    rng = np.random.default_rng(seed)
    predictions, records = [], []
    for place in range(8):
        truth = [random_object(rng, crowd=rng.random() < 0.2) for _ in range(rng.choice([0, 1, 6]))]
        found = [shifted(item, rng) for item in truth for _ in range(rng.integers(0, 4))]
        found += [random_object(rng) for _ in range(rng.choice([0, 3, 250 if seed % 2 else 5]))]
        found = [
            item | {"score": float(rng.integers(1, 6) / 5 if seed % 3 else rng.random())}
            for item in found
        ]
        records.append({"id": f"{seed}{place}", "width": SIDE, "height": SIDE, "objects": truth})
        predictions.append(
            {"id": f"{seed}{place}", "objects": sorted(found, key=lambda item: -item["score"])}
        )
    return predictions, records


def random_object(rng, crowd=False):
    size = rng.uniform(2, rng.choice([30, SIDE]), 2)
    return described([*(rng.random(2) * (SIDE - size)), *size], int(rng.integers(0, 3)), crowd)


def shifted(item, rng):
    moved = np.array(item["box"]) + rng.normal(0, 0.08, 4) * item["box"][2]
    label = item["label"] if rng.random() < 0.9 else 5  # a class that no record shows
    return described([*moved[:2], *np.maximum(moved[2:], 1)], label, False)


def described(box, label, crowd):
    """An ellipse in a box: a polygon for what is single, runs for a crowd."""
    x, y, w, h = map(float, box)
    angles = np.linspace(0, 2 * np.pi, 13)[:-1]
    polygon = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
    pixels = (np.arange(SIDE) + 0.5 - y) / h * 2 - 1, (np.arange(SIDE) + 0.5 - x) / w * 2 - 1
    inside = (pixels[0][:, None] ** 2 + pixels[1] ** 2) < 1
    segmentation = (
        {"size": [SIDE, SIDE], "counts": runs(inside)} if crowd else [polygon.flatten().tolist()]
    )
    return {
        "box": [x, y, w, h],
        "label": label,
        "crowd": crowd,
        "area": w * h * 0.7,
        "segmentation": segmentation,
    }


def runs(mask):
    flat = np.concatenate([[False], mask.T.flatten(), [False]])
    return np.diff(np.concatenate([[0], np.nonzero(np.diff(flat))[0], [mask.size]])).tolist()


def with_masks(predictions, api):
    """Predicted objects with their segmentation as RLE."""
    for prediction in predictions:
        for item in prediction["objects"]:
            rle = api.merge(api.frPyObjects(item["segmentation"], SIDE, SIDE))
            item["mask"] = {"size": rle["size"], "counts": rle["counts"].decode()}


def official(predictions, records, kind):
    """The twelve figures of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    for side, sources in ((truth, records), (found, predictions)):
        annotations = []
        for source in sources:
            for item in source["objects"]:
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": int(source["id"]),
                    "category_id": item["label"],
                    "bbox": item["box"],
                }
                if side is truth:
                    annotation |= {
                        "area": item["area"],
                        "iscrowd": int(item["crowd"]),
                        "segmentation": item["segmentation"],
                    }
                elif kind == "box":
                    annotation |= {
                        "area": item["box"][2] * item["box"][3],
                        "iscrowd": 0,
                        "score": item["score"],
                    }
                else:
                    from pycocotools import mask

                    annotation |= {
                        "area": float(mask.area(item["mask"])),
                        "segmentation": item["mask"],
                    }
                    annotation |= {"iscrowd": 0, "score": item["score"]}
                annotations.append(annotation)
        side.dataset = {
            "images": [
                {"id": int(record["id"]), "width": SIDE, "height": SIDE} for record in records
            ],
            "categories": [{"id": label} for label in range(6)],
            "annotations": annotations,
        }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(1, 7))
def test_equals_pycocotools(kind, seed):
    api = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools, the official evaluator, is not installed"
    )
    predictions, records = random_case(seed)
    with_masks(predictions, api)
    figures = coco_ap(predictions, records, kind=kind)
    assert [figures[name] for name in FIGURES] == pytest.approx(
        official(predictions, records, kind), rel=0, abs=1e-9
    )
    assert 0.01 < figures["ap"] < 0.99 and set(figures["per_class"]) <= {0, 1, 2}
    defined = [ap for ap in figures["per_class"].values() if ap >= 0]
    assert np.mean(defined) == pytest.approx(figures["ap"])
    if seed % 2:
        assert max(len(prediction["objects"]) for prediction in predictions) > 100


# By hand, empty, refused ---------------------------------------------------------------------------------------------


def item(x, label=0, score=None, side=20.0, **more):
    described = {
        "box": [float(x), 10.0, side, side],
        "label": label,
        "area": side * side,
        "crowd": False,
    }
    return described | ({} if score is None else {"score": score}) | more


def records(*shown):
    return [
        {"id": f"p{place}", "width": SIDE, "height": SIDE, "objects": list(objects)}
        for place, objects in enumerate(shown)
    ]


def predictions(*found):
    return [{"id": f"p{place}", "objects": list(objects)} for place, objects in enumerate(found)]


def test_by_hand():
    shown = records([item(0), item(50, label=1)], [])
    exact = coco_ap(
        predictions([item(0, score=0.9), item(50, label=1, score=0.1)], []), shown, kind="box"
    )
    assert (
        exact["ap"] == exact["ap_small"] == exact["ar_1"] == 1
        and exact["ap_large"] == exact["ar_medium"] == -1
    )
    # IoU .8 / 1.2 = 2/3: right up to a threshold of .65, which is 4 of the 10; the other class is missed.
    near = coco_ap(predictions([item(4, score=0.9)], []), shown, kind="box")
    assert near["ap50"] == 0.5 and near["ap75"] == 0 and near["ap"] == pytest.approx(0.2)
    assert near["per_class"] == {0: pytest.approx(0.4), 1: 0}
    # A better detection in the picture without objects is wrong: precision is half at every recall.
    false = coco_ap(
        predictions([item(0, score=0.5)], [item(0, score=0.9)]), records([item(0)], []), kind="box"
    )
    assert false["ap"] == pytest.approx(0.5) and false["ar_1"] == 1


def test_equal_scores_go_by_picture_then_place():
    right, wrong = item(0, score=0.5), item(80, score=0.5)
    for first, second, ap in ((right, wrong, 1.0), (wrong, right, 0.5)):
        assert coco_ap(predictions([first, second]), records([item(0)]), kind="box")[
            "ap"
        ] == pytest.approx(ap)
        spread = predictions([first], [second])
        shown = records(*([[item(0)], []] if first is right else [[], [item(0)]]))
        assert coco_ap(spread[::-1], shown, kind="box")["ap"] == pytest.approx(ap), (
            "the predictions' order is not the pictures'"
        )
    numbered = [record | {"id": str(10 - place)} for place, record in enumerate(shown)]
    found = [{"id": "10", "objects": [wrong]}, {"id": "9", "objects": [right]}]
    assert coco_ap(found, numbered, kind="box")["ap"] == pytest.approx(1.0), "9 comes before 10"


def test_nothing_found_and_nothing_there(capsys):
    for kind in ("box", "mask"):
        shown = records([item(0, segmentation=[[0, 10, 20, 10, 20, 30, 0, 30]])], [])
        for found in ([], predictions([], [])):
            none = coco_ap(found, shown, kind=kind)
            assert (
                none["ap"] == none["ar_100"] == 0
                and none["ap_large"] == -1
                and none["per_class"] == {0: 0}
            )
        empty = coco_ap(predictions([], []), records([], []), kind=kind)
        assert [empty[name] for name in FIGURES] == [-1] * 12 and empty["per_class"] == {}
    crowd = coco_ap(
        predictions([item(0, score=0.9)]), records([item(0) | {"crowd": True}]), kind="box"
    )
    assert crowd["ap"] == -1 and crowd["per_class"] == {0: -1}
    assert capsys.readouterr() == ("", "")


def test_more_than_a_hundred():
    """Beyond the best 100 of a class in a picture nothing counts, wherever it stands in the list."""
    low, right = [item(60, score=0.5)] * 100, item(0, score=0.4)
    assert coco_ap(predictions([*low, right]), records([item(0)]), kind="box")["ar_100"] == 0
    assert coco_ap(predictions([*low[1:], right]), records([item(0)]), kind="box")["ar_100"] == 1
    assert coco_ap(predictions([*low, right | {"score": 0.6}]), records([item(0)]), kind="box")[
        "ap"
    ] == pytest.approx(1.0)


def test_records_and_predictions_are_left_alone():
    found, shown = random_case(2)
    before = json.dumps([found, shown])
    assert (
        coco_ap(found, shown, kind="box") == coco_ap(found, shown, kind="box")
        and json.dumps([found, shown]) == before
    )


@pytest.mark.parametrize(
    "found, shown, kind, words",
    [
        (predictions([], []), records([]), "box", "names record p1"),
        (predictions([]) * 2, records([]), "box", "two predictions for record p0"),
        ([], records([]) * 2, "box", "same id"),
        (
            predictions([item(0, score=float("nan"))]),
            records([]),
            "box",
            "record p0 has a score of nan",
        ),
        (
            predictions([]),
            records([item(0)]),
            "mask",
            "record p0 has an object without a segmentation",
        ),
        (
            predictions([item(0, score=1.0)]),
            records([]),
            "mask",
            r"without a mask of size \[128, 128\]",
        ),
        (
            predictions([item(0, score=1.0, mask={"size": [1, 1], "counts": "1"})]),
            records([]),
            "mask",
            "record p0",
        ),
    ],
)
def test_refused(found, shown, kind, words):
    with pytest.raises(ValueError, match=words) as error:
        coco_ap(found, shown, kind=kind)
    assert "\n" not in str(error.value)


def test_pycocotools_is_not_replaced():
    """faster_coco_eval can put itself in its place, which would make the comparison above one with itself."""
    code = """
import sys
from beit3.metrics.detection import coco_ap
shown = {"box": [0, 0, 5, 5], "label": 0, "area": 25, "crowd": False}
coco_ap([], [{"id": "1", "width": 9, "height": 9, "objects": [shown]}], kind="box")
assert "faster_coco_eval" in sys.modules and not {"pycocotools", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
