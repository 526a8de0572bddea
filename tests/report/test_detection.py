"""Cards show true and predicted objects; tables and charts have the scores of the metrics."""

import re
from dataclasses import replace

from beit3.metrics.detection import COCO_METRICS
from beit3.report.bars import MAX_BARS, draw_class_bars
from beit3.report.dense import HeldOutPredictions
from beit3.report.detection import (
    count_objects,
    render_class_precisions,
    render_metric_table,
    render_object_card,
)
from beit3.report.object_drawing import list_true_objects
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.run_panels import render_scores
from beit3.report.runs import read_runs
from beit3.task import Prediction
from beit3.tasks.coco import Coco
from tests.report.conftest import CATEGORIES, decode_images


def predict_true_objects(record: dict, score: float = 0.9) -> Prediction:
    """Returns the prediction of a perfect network."""
    objects = list_true_objects(record, CATEGORIES)
    return {"id": record["id"], "objects": [item | {"score": score} for item in objects]}


def filter_objects(prediction: Prediction, label: int) -> Prediction:
    objects = [item for item in prediction["objects"] if item["label"] == label]
    return prediction | {"objects": objects}


def remove_masks(prediction: Prediction) -> Prediction:
    objects = [
        {key: value for key, value in item.items() if key != "mask"}
        for item in prediction["objects"]
    ]
    return prediction | {"objects": objects}


def test_a_card_shows_true_objects_and_those_with_a_high_score(coco):
    run = read_runs([coco])[0]
    task, record = load_run_weights(run, Coco), open_run_records(run, "main", "val")[0]
    right, unsure = predict_true_objects(record), predict_true_objects(record, 0.2)
    html = render_object_card(task, record, ["a <b>", "c"], [right, unsure])
    truth, first, second = decode_images(html)
    assert truth.shape == (320, 320, 3) and (first != second).any()
    assert "truth: 2 objects" in html
    assert "a &lt;b&gt;</span>: 2 objects" in html and "c</span>: no objects" in html
    assert 'predicted objects: &lt;cross&gt;, bar"' in html
    assert 'predicted objects: none"' in html
    assert "predicted: 2 objects" in render_object_card(task, record, ["a"], [right])


def test_a_single_object_is_counted_in_the_singular():
    assert [count_objects([1] * count) for count in (0, 1, 2)] == [
        "no objects",
        "1 object",
        "2 objects",
    ]


def test_precisions_by_class_are_those_of_the_metric(coco):
    run = read_runs([coco])[0]
    task, records = load_run_weights(run, Coco), list(open_run_records(run, "main", "val"))
    right = [predict_true_objects(record) for record in records]
    only_crosses = [filter_objects(prediction, 0) for prediction in right]
    runs = [run, replace(run, label="b")]
    html = render_class_precisions(runs, HeldOutPredictions(task, records, [right, only_crosses]))
    for kind in ("box", "mask"):
        title = f"{kind} AP of each class in coco and b"
        assert f"{title}: &lt;cross&gt; 100% and 100%, bar 100% and 0%" in html
    without_masks = [remove_masks(prediction) for prediction in right]
    html = render_class_precisions([run], HeldOutPredictions(task, records, [without_masks]))
    assert "box AP" in html and "mask AP" not in html


def test_the_table_has_twelve_metrics_and_dashes_for_undefined_ones(coco):
    run = read_runs([coco])[0]
    scores = {f"box_{name}": index / 100 for index, name in enumerate(COCO_METRICS)}
    scores["box_ap_large"] = -1.0
    html = render_metric_table([replace(run, scores=scores)])
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td class="number">([^<]*)</td></tr>', html)
    assert len(rows) == 12 and rows[:2] == [("AP", "0.0"), ("AP50", "1.0")]
    assert rows[5] == ("AP large", "—") and rows[-1] == ("AR large", "11.0")
    assert "mask" not in html
    tiles = render_scores([replace(run, scores=scores | {"mask_ap": -1.0})])
    assert re.findall(r"<span>([^<]*)</span><b>([^<]*)", tiles) == [
        ("box AP", "0.0%"),
        ("box AP50", "1.0%"),
        ("mask AP", "—"),
    ]


def test_many_classes_are_several_charts_the_best_first():
    rows = [(f"$x{number}", [number / 100]) for number in range(MAX_BARS + 5)]
    first, second = draw_class_bars("IoU", rows, ["a"])
    assert f'aria-label="IoU: $x{MAX_BARS + 4} 44%' in first
    assert "$x0 0%" in second and "$x4</text>" in second
    assert draw_class_bars("IoU", [], ["a"]) == []
