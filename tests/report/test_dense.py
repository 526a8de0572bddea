"""Detection and segmentation predict for the same shuffled records, and their panels are shown."""

import json
from dataclasses import replace

from beit3.data.stores.records import write_records
from beit3.report import dense
from beit3.report.dense import predict_held_out
from beit3.report.page import write_report
from beit3.report.panel_inputs import load_run_weights
from beit3.report.panels import make_panels
from beit3.report.runs import read_runs
from beit3.tasks.coco import Coco


def test_the_page_has_all_panels(coco, ade20k, tmp_path):
    page = write_report([coco, ade20k], tmp_path / "page.html").read_text()
    for title in (
        "Detection and instance segmentation",
        "COCO&#x27;s twelve metrics",
        "Objects",
        "Semantic segmentation",
        "Label maps",
    ):
        assert f">{title}</h" in page, title
    assert "Nothing to show" not in page and page.count("<h3>Classes</h3>") == 2
    assert page.count("<figure><figcaption>truth") == 16 and "8 held-out images" in page
    assert "&lt;cross&gt;" in page and "<cross>" not in page


def test_all_runs_predict_for_the_same_shuffled_records(coco, monkeypatch):
    run = read_runs([coco])[0]
    monkeypatch.setattr(dense, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(dense, "NUM_CARDS", 4)
    held_out = predict_held_out([run, run], Coco)
    ids = [record["id"] for record in held_out.records]
    assert len(ids) == 4 and len(set(ids)) == 4
    assert ids == [record["id"] for record in predict_held_out([run], Coco).records]
    predicted_ids = [[item["id"] for item in predictions] for predictions in held_out.predictions]
    assert predicted_ids == [ids, ids]


def test_small_images_are_predicted_in_larger_batches(coco):
    task = load_run_weights(read_runs([coco])[0], Coco)
    counts = []
    for size in (32, 512, 1024, 4096):
        task.config = replace(task.config, image=replace(task.config.image, image_size=size))
        counts.append(dense.count_batch_images(task))
    assert counts == [8, 8, 2, 1]


def test_missing_records_leave_one_line(coco, tmp_path):
    run = read_runs([coco])[0]
    recipe = json.loads(json.dumps(run.recipe))
    recipe["data"]["root"] = str(tmp_path)
    write_records(tmp_path / "coco" / "main" / "train.jsonl", [{"id": "1"}])
    objects, classes = make_panels([replace(run, recipe=recipe)])[1:]
    assert "Nothing to show" in objects.body and "Nothing to show" in classes.body
