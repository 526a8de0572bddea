"""Truth beside what is found, and figures by class that are those of the metrics."""

import json
import re
from dataclasses import replace

import numpy as np

from beit3.data.stores.records import write_records
from beit3.metrics.detection import COCO_METRICS
from beit3.report import dense
from beit3.report.curves import MAX_BARS, class_bars
from beit3.report.dense import Asked, ask, counted, figure_table, legend, object_card, scene_card
from beit3.report.drawing import color
from beit3.report.page import score_panel, write_report
from beit3.report.panel_inputs import records, weights
from beit3.report.panels import panels
from beit3.report.runs import read_runs
from beit3.task import Prediction
from beit3.tasks.ade20k import Ade20k, encode_label_map
from beit3.tasks.coco import Coco
from tests.report.conftest import SHAPES, images_of


def found_all(record: dict, score: float = 0.9) -> Prediction:
    """What a network that is right would say."""
    objects = dense.true_objects(record, SHAPES)
    return {"id": record["id"], "objects": [each | {"score": score} for each in objects]}


def test_all_panels_are_there_and_the_page_is_written(coco, ade20k, tmp_path):
    page = write_report([coco, ade20k], tmp_path / "page.html").read_text()
    for title in (
        "Detection and instance segmentation",
        "COCO&#x27;s twelve figures",
        "Objects",
        "Semantic segmentation",
        "Scenes",
    ):
        assert f">{title}</h" in page, title
    assert "Nothing to show" not in page and page.count("<h3>Classes</h3>") == 2
    assert page.count("<figure><figcaption>truth") == 16 and "8 held-out pictures" in page
    assert "&lt;cross&gt;" in page and "<cross>" not in page


def test_records_are_shuffled_alike_and_asked_by_all_runs(coco, monkeypatch):
    run = read_runs([coco])[0]
    monkeypatch.setattr(dense, "SECONDS", 0.0)
    monkeypatch.setattr(dense, "SHOWN", 4)
    asked = ask([run, run], Coco)
    keys = [record["id"] for record in asked.records]
    assert (
        len(keys) == 4
        and len(set(keys)) == 4
        and keys == [record["id"] for record in ask([run], Coco).records]
    )
    assert [[row["id"] for row in said] for said in asked.said] == [keys, keys]


def test_a_card_shows_the_truth_and_what_is_sure_enough(coco):
    run = read_runs([coco])[0]
    task, record = weights(run, Coco), records(run, "main", "val")[0]
    right, unsure = found_all(record), found_all(record, 0.2)
    html = object_card(task, record, ["a <b>", "c"], [right, unsure])
    truth, first, second = images_of(html)
    assert truth.shape == (320, 320, 3) and (first != second).any()
    assert (
        "truth: 2 objects" in html
        and "a &lt;b&gt;</span>: 2 objects" in html
        and "c</span>: no objects" in html
    )
    assert 'what was found: &lt;cross&gt;, bar"' in html and 'what was found: nothing"' in html
    assert (
        "found: 2 objects" in object_card(task, record, ["a"], [right])
        and counted([1]) == "1 object"
    )


def test_precisions_are_those_of_the_metric(coco):
    run = read_runs([coco])[0]
    found = list(records(run, "main", "val"))
    right = [found_all(record) for record in found]
    half = [
        each | {"objects": [one for one in each["objects"] if one["label"] == 0]} for each in right
    ]
    html = dense._precisions(
        [run, replace(run, label="b")], Asked(weights(run, Coco), found, [right, half])
    )
    for kind in ("box", "mask"):
        assert (
            f"{kind} AP of each class in coco and b: &lt;cross&gt; 100% and 100%, bar 100% and 0%"
            in html
        )
    boxed = [
        each
        | {"objects": [{key: one[key] for key in one if key != "mask"} for one in each["objects"]]}
        for each in right
    ]
    assert "mask AP" not in dense._precisions([run], Asked(weights(run, Coco), found, [boxed]))


def test_the_table_has_twelve_figures_and_dashes(coco):
    run = read_runs([coco])[0]
    scores = {f"box_{name}": place / 100 for place, name in enumerate(COCO_METRICS)} | {
        "box_ap_large": -1.0
    }
    html = figure_table([replace(run, scores=scores)])
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td class="number">([^<]*)</td></tr>', html)
    assert (
        rows[:2] == [("AP", "0.0"), ("AP50", "1.0")]
        and rows[5] == ("AP large", "—")
        and rows[-1] == ("AR large", "11.0")
    )
    assert len(rows) == 12 and "mask" not in html
    tiles = score_panel([replace(run, scores=scores | {"mask_ap": -1.0})])
    assert re.findall(r"<span>([^<]*)</span><b>([^<]*)", tiles) == [
        ("box AP", "0.0%"),
        ("box AP50", "1.0%"),
        ("mask AP", "—"),
    ]


def test_a_scene_shows_its_labels_and_how_many_are_right(ade20k):
    run = read_runs([ade20k])[0]
    task, record = weights(run, Ade20k), records(run, "main", "val")[0]
    truth = dense.open_label_map(record["label_map"], **dense.label_map_options(record))
    wrong = truth.clone()
    wrong[truth == 255] = 1  # counts nowhere
    wrong[:4] = 2
    html = scene_card(
        task,
        record,
        ["a", "b"],
        [{"id": "x", "map": encode_label_map(each.clamp(max=2))} for each in (wrong, truth)],
    )
    share = float((wrong == truth)[truth != 255].float().mean())
    assert (
        f"a</span>, {share:.0%} right" in html and "b</span>, 100% right" in html and 0 < share < 1
    )
    picture, true, first, second = images_of(html)
    assert (
        picture.shape == (16, 16, 3)
        and true.shape == first.shape == (320, 320, 3)
        and (first != second).any()
    )
    assert "sky &amp; sea" in html and f"--chip:rgb{color(1)}" in html


def test_overlaps_are_those_of_the_metric(ade20k):
    run = read_runs([ade20k])[0]
    found = list(records(run, "main", "val"))
    maps = [
        dense.open_label_map(record["label_map"], **dense.label_map_options(record))
        for record in found
    ]
    right = [
        {"id": record["id"], "map": encode_label_map(each.clamp(max=2))}
        for record, each in zip(found, maps, strict=True)
    ]
    html = dense._overlaps([run], Asked(weights(run, Ade20k), found, [right]))
    assert (
        "<b>100.0%</b> mIoU" in html
        and "<b>100.0%</b> aAcc" in html
        and "8 held-out pictures" in html
    )
    assert "sky &amp; sea 100%" in html
    one = [
        {"id": record["id"], "map": encode_label_map(each * 0)}
        for record, each in zip(found, maps, strict=True)
    ]
    truth = np.concatenate([each.numpy().ravel() for each in maps])
    share = (truth == 0).sum() / (truth != 255).sum()
    assert f"sky &amp; sea {share:.0%}" in dense._overlaps(
        [run], Asked(weights(run, Ade20k), found, [one])
    )


def test_long_legends_are_cut():
    rows = [
        {"label": label, "name": f"<{label}>", "share": 0.1} for label in range(dense.CHIPS + 3)
    ]
    html = legend(rows)
    assert (
        html.count('class="chip"') == dense.CHIPS and "and 3 more" in html and "&lt;0&gt;" in html
    )


def test_many_classes_are_several_charts_the_best_first():
    rows = [(f"$x{number}", [number / 100]) for number in range(MAX_BARS + 5)]
    first, second = class_bars("IoU", rows, ["a"])
    assert (
        f'aria-label="IoU: $x{MAX_BARS + 4} 44%' in first
        and "$x0 0%" in second
        and "$x4</text>" in second
    )
    assert class_bars("IoU", [], ["a"]) == []


def test_a_run_without_records_says_so(coco, tmp_path):
    run = read_runs([coco])[0]
    recipe = json.loads(json.dumps(run.recipe))
    recipe["data"]["root"] = str(tmp_path)
    (tmp_path / "coco" / "main").mkdir(parents=True)
    write_records(tmp_path / "coco" / "main" / "train.jsonl", [{"id": "1"}])
    objects, classes = panels([replace(run, recipe=recipe)])[1:]
    assert "Nothing to show" in objects.body and "Nothing to show" in classes.body
