"""COCO scores against the official example, pycocotools on random detections and cases by hand."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from beit3.metrics.detection import COCO_METRICS, compute_coco_ap
from tests.golden import find_fixture

SIDE = 128

# Official example


@pytest.mark.parametrize(
    "kind, official_kind, results", [("box", "bbox", "fakebbox"), ("mask", "segm", "fakesegm")]
)
def test_the_official_example_is_reproduced(kind, official_kind, results):
    folder = find_fixture("coco_eval")
    instances = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = json.loads((folder / f"instances_val2014_{results}100_results.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())[official_kind]
    records = [read_record(image, instances["annotations"]) for image in instances["images"]]
    shape_key = {"box": "bbox", "mask": "segmentation"}[kind]
    predictions = []
    for record in records:
        objects = [
            {kind: d[shape_key], "label": d["category_id"], "score": d["score"]}
            for d in detections
            if str(d["image_id"]) == record["id"]
        ]
        # Images without a prediction do not change the scores, nor does the order of the records.
        if objects:
            predictions.append({"id": record["id"], "objects": objects})
    scores = compute_coco_ap(predictions, records[::-1], kind=kind)
    assert [scores[name] for name in COCO_METRICS] == pytest.approx(
        list(expected["stats"].values()), rel=0, abs=1e-9
    )
    per_class = {int(label): ap for label, ap in expected["per_category_AP"].items()}
    assert len(per_class) == 70
    assert scores["per_class"] == pytest.approx(per_class, rel=0, abs=1e-9)


def read_record(image, annotations):
    objects = [
        {
            "box": annotation["bbox"],
            "label": annotation["category_id"],
            "area": annotation["area"],
            "crowd": bool(annotation["iscrowd"]),
            "segmentation": annotation["segmentation"],
        }
        for annotation in annotations
        if annotation["image_id"] == image["id"]
    ]
    size = {"width": image["width"], "height": image["height"]}
    return {"id": str(image["id"]), **size, "objects": objects}


# Official evaluator


def make_random_case(seed):
    """Predictions and records of 8 images.

    Some images have crowds or no objects. Detections are near objects, of the wrong class,
    duplicated, tied in their scores, or more than 100 in an image.
    """
    rng = np.random.default_rng(seed)
    predictions, records = [], []
    for index in range(8):
        objects = [
            make_random_object(rng, crowd=rng.random() < 0.2) for _ in range(rng.choice([0, 1, 6]))
        ]
        detections = [
            shift_object(item, rng) for item in objects for _ in range(rng.integers(0, 4))
        ]
        num_false = rng.choice([0, 3, 250 if seed % 2 else 5])
        detections += [make_random_object(rng) for _ in range(num_false)]
        detections = [
            item | {"score": float(rng.integers(1, 6) / 5 if seed % 3 else rng.random())}
            for item in detections
        ]
        detections.sort(key=lambda item: -item["score"])
        key = f"{seed}{index}"
        records.append({"id": key, "width": SIDE, "height": SIDE, "objects": objects})
        predictions.append({"id": key, "objects": detections})
    return predictions, records


def make_random_object(rng, crowd=False):
    size = rng.uniform(2, rng.choice([30, SIDE]), 2)
    return make_ellipse([*(rng.random(2) * (SIDE - size)), *size], int(rng.integers(0, 3)), crowd)


def shift_object(item, rng):
    box = np.array(item["box"]) + rng.normal(0, 0.08, 4) * item["box"][2]
    label = item["label"] if rng.random() < 0.9 else 5  # no record has label 5
    return make_ellipse([*box[:2], *np.maximum(box[2:], 1)], label, False)


def make_ellipse(box, label, crowd):
    """An object whose mask is an ellipse: a polygon, or run lengths for a crowd."""
    x, y, w, h = map(float, box)
    angles = np.linspace(0, 2 * np.pi, 13)[:-1]
    polygon = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
    pixels = (np.arange(SIDE) + 0.5 - y) / h * 2 - 1, (np.arange(SIDE) + 0.5 - x) / w * 2 - 1
    mask = (pixels[0][:, None] ** 2 + pixels[1] ** 2) < 1
    rle = {"size": [SIDE, SIDE], "counts": count_runs(mask)}
    return {
        "box": [x, y, w, h],
        "label": label,
        "crowd": crowd,
        "area": w * h * 0.7,
        "segmentation": rle if crowd else [polygon.flatten().tolist()],
    }


def count_runs(mask):
    flat = np.concatenate([[False], mask.T.flatten(), [False]])
    return np.diff(np.concatenate([[0], np.nonzero(np.diff(flat))[0], [mask.size]])).tolist()


def add_masks(predictions, mask_api):
    """Adds to predicted objects their segmentation as an RLE."""
    for prediction in predictions:
        for item in prediction["objects"]:
            rle = mask_api.merge(mask_api.frPyObjects(item["segmentation"], SIDE, SIDE))
            item["mask"] = {"size": rle["size"], "counts": rle["counts"].decode()}


def compute_with_pycocotools(predictions, records, kind):
    """The twelve scores of pycocotools."""
    from pycocotools.cocoeval import COCOeval

    truth = make_coco(records, records, describe_annotation)
    describe = describe_box_result if kind == "box" else describe_mask_result
    results = make_coco(predictions, records, describe)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results.createIndex()
        evaluation = COCOeval(truth, results, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def make_coco(sources, records, describe):
    from pycocotools.coco import COCO

    annotations = []
    for source in sources:
        for item in source["objects"]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": int(source["id"]),
                "category_id": item["label"],
                "bbox": item["box"],
            }
            annotations.append(annotation | describe(item))
    coco = COCO()
    images = [{"id": int(record["id"]), "width": SIDE, "height": SIDE} for record in records]
    categories = [{"id": label} for label in range(6)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    return coco


def describe_annotation(item):
    crowd = int(item["crowd"])
    return {"area": item["area"], "iscrowd": crowd, "segmentation": item["segmentation"]}


def describe_box_result(item):
    return {"area": item["box"][2] * item["box"][3], "iscrowd": 0, "score": item["score"]}


def describe_mask_result(item):
    from pycocotools import mask

    area = float(mask.area(item["mask"]))
    return {"area": area, "segmentation": item["mask"], "iscrowd": 0, "score": item["score"]}


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(1, 7))
def test_scores_equal_pycocotools(kind, seed):
    mask_api = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools, the official evaluator, is not installed"
    )
    predictions, records = make_random_case(seed)
    add_masks(predictions, mask_api)
    scores = compute_coco_ap(predictions, records, kind=kind)
    expected = compute_with_pycocotools(predictions, records, kind)
    assert [scores[name] for name in COCO_METRICS] == pytest.approx(expected, rel=0, abs=1e-9)
    assert 0.01 < scores["ap"] < 0.99 and set(scores["per_class"]) <= {0, 1, 2}
    defined = [ap for ap in scores["per_class"].values() if ap >= 0]
    assert np.mean(defined) == pytest.approx(scores["ap"])
    if seed % 2:
        assert max(len(prediction["objects"]) for prediction in predictions) > 100


# Cases by hand, empty cases, refusals


def make_object(x, label=0, score=None, side=20.0, **fields):
    item = {"box": [float(x), 10.0, side, side], "label": label, "area": side * side}
    return item | {"crowd": False} | ({} if score is None else {"score": score}) | fields


def make_records(*objects_per_image):
    return [
        {"id": f"p{index}", "width": SIDE, "height": SIDE, "objects": list(objects)}
        for index, objects in enumerate(objects_per_image)
    ]


def make_predictions(*objects_per_image):
    return [
        {"id": f"p{index}", "objects": list(objects)}
        for index, objects in enumerate(objects_per_image)
    ]


def test_scores_equal_those_by_hand():
    records = make_records([make_object(0), make_object(50, label=1)], [])
    predictions = make_predictions(
        [make_object(0, score=0.9), make_object(50, label=1, score=0.1)], []
    )
    exact = compute_coco_ap(predictions, records, kind="box")
    assert exact["ap"] == exact["ap_small"] == exact["ar_1"] == 1
    assert exact["ap_large"] == exact["ar_medium"] == -1
    # An IoU of .8 / 1.2 = 2/3 is right up to a threshold of .65, which is 4 of the 10 thresholds.
    # The other class is missed.
    predictions = make_predictions([make_object(4, score=0.9)], [])
    near = compute_coco_ap(predictions, records, kind="box")
    assert near["ap50"] == 0.5 and near["ap75"] == 0 and near["ap"] == pytest.approx(0.2)
    assert near["per_class"] == {0: pytest.approx(0.4), 1: 0}
    # A detection of a higher score in the image without objects halves precision at every recall.
    predictions = make_predictions([make_object(0, score=0.5)], [make_object(0, score=0.9)])
    false = compute_coco_ap(predictions, make_records([make_object(0)], []), kind="box")
    assert false["ap"] == pytest.approx(0.5) and false["ar_1"] == 1


def test_equal_scores_are_ordered_by_image_then_by_position():
    right, wrong = make_object(0, score=0.5), make_object(80, score=0.5)
    for first, second, ap in ((right, wrong, 1.0), (wrong, right, 0.5)):
        predictions = make_predictions([first, second])
        scores = compute_coco_ap(predictions, make_records([make_object(0)]), kind="box")
        assert scores["ap"] == pytest.approx(ap)
        # The order of the images is that of the records, not of the predictions.
        predictions = make_predictions([first], [second])
        objects = ([make_object(0)], [])
        records = make_records(*(objects if first is right else objects[::-1]))
        scores = compute_coco_ap(predictions[::-1], records, kind="box")
        assert scores["ap"] == pytest.approx(ap)
    # Ids that are numbers are sorted as numbers: 9 is before 10.
    numbered = [record | {"id": str(10 - index)} for index, record in enumerate(records)]
    predictions = [{"id": "10", "objects": [wrong]}, {"id": "9", "objects": [right]}]
    assert compute_coco_ap(predictions, numbered, kind="box")["ap"] == pytest.approx(1.0)


def test_missing_detections_score_0_and_missing_objects_are_undefined(capsys):
    square = [[0, 10, 20, 10, 20, 30, 0, 30]]
    for kind in ("box", "mask"):
        records = make_records([make_object(0, segmentation=square)], [])
        for predictions in ([], make_predictions([], [])):
            scores = compute_coco_ap(predictions, records, kind=kind)
            assert scores["ap"] == scores["ar_100"] == 0
            assert scores["ap_large"] == -1 and scores["per_class"] == {0: 0}
        empty = compute_coco_ap(make_predictions([], []), make_records([], []), kind=kind)
        assert [empty[name] for name in COCO_METRICS] == [-1] * 12 and empty["per_class"] == {}
    predictions = make_predictions([make_object(0, score=0.9)])
    crowd = compute_coco_ap(predictions, make_records([make_object(0, crowd=True)]), kind="box")
    assert crowd["ap"] == -1 and crowd["per_class"] == {0: -1}
    assert capsys.readouterr() == ("", "")


def test_only_the_best_100_detections_of_a_class_and_image_count():
    records = make_records([make_object(0)])
    wrong, right = [make_object(60, score=0.5)] * 100, make_object(0, score=0.4)

    def score(*detections):
        return compute_coco_ap(make_predictions(detections), records, kind="box")

    assert score(*wrong, right)["ar_100"] == 0
    assert score(*wrong[1:], right)["ar_100"] == 1
    assert score(*wrong, right | {"score": 0.6})["ap"] == pytest.approx(1.0)


def test_records_and_predictions_are_not_modified():
    predictions, records = make_random_case(2)
    before = json.dumps([predictions, records])
    first = compute_coco_ap(predictions, records, kind="box")
    assert compute_coco_ap(predictions, records, kind="box") == first
    assert json.dumps([predictions, records]) == before


DETECTION = make_object(0, score=1.0)
SMALL_MASK = {"size": [1, 1], "counts": "1"}


@pytest.mark.parametrize(
    "predictions, records, kind, message",
    [
        (make_predictions([], []), make_records([]), "box", "names record p1"),
        (make_predictions([]) * 2, make_records([]), "box", "two predictions for record p0"),
        ([], make_records([]) * 2, "box", "same id"),
        (
            make_predictions([make_object(0, score=float("nan"))]),
            make_records([]),
            "box",
            "record p0 has a score of nan",
        ),
        (
            make_predictions([]),
            make_records([make_object(0)]),
            "mask",
            "record p0 has an object without a segmentation",
        ),
        (
            make_predictions([DETECTION]),
            make_records([]),
            "mask",
            r"without a mask of size \[128, 128\]",
        ),
        (
            make_predictions([DETECTION | {"mask": SMALL_MASK}]),
            make_records([]),
            "mask",
            "record p0",
        ),
    ],
)
def test_invalid_inputs_are_refused(predictions, records, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        compute_coco_ap(predictions, records, kind=kind)
    assert "\n" not in str(error.value)


def test_pycocotools_is_not_replaced():
    """faster_coco_eval can replace pycocotools; the comparison above would then prove nothing."""
    code = """
import sys
from beit3.metrics.detection import compute_coco_ap
item = {"box": [0, 0, 5, 5], "label": 0, "area": 25, "crowd": False}
compute_coco_ap([], [{"id": "1", "width": 9, "height": 9, "objects": [item]}], kind="box")
assert "faster_coco_eval" in sys.modules and not {"pycocotools", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
