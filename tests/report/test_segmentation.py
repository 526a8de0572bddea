"""Cards show true and predicted label maps; charts have the scores of the metrics."""

import numpy as np
import pytest
from torch import Tensor

from beit3.data.views.label_maps import open_label_map
from beit3.report import segmentation
from beit3.report.dense import HeldOutPredictions
from beit3.report.palette import get_color
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.runs import Run, read_runs
from beit3.report.segmentation import (
    render_class_ious,
    render_color_legend,
    render_label_map_card,
)
from beit3.segmentation.records import encode_label_map, get_label_map_options
from beit3.task import Prediction, Record
from beit3.tasks.ade20k import Ade20k
from tests.report.conftest import decode_images


@pytest.fixture
def run(ade20k) -> Run:
    return read_runs([ade20k])[0]


def open_true_map(record: Record) -> Tensor:
    return open_label_map(record["label_map"], **get_label_map_options(record))


def make_prediction(record: Record, labels: Tensor) -> Prediction:
    """Returns a prediction of these labels; pixels to ignore become class 2."""
    return {"id": record["id"], "map": encode_label_map(labels.clamp(max=2))}


def test_a_card_shows_label_maps_and_the_fraction_that_is_right(run):
    task, record = load_run_weights(run, Ade20k), open_run_records(run, "main", "val")[0]
    truth = open_true_map(record)
    wrong = truth.clone()
    wrong[truth == 255] = 1  # ignored
    wrong[:4] = 2
    predictions = [make_prediction(record, labels) for labels in (wrong, truth)]
    html = render_label_map_card(task, record, ["a", "b"], predictions)
    fraction = float((wrong == truth)[truth != 255].float().mean())
    assert 0 < fraction < 1 and f"a</span>, {fraction:.0%} right" in html
    assert "b</span>, 100% right" in html
    image, true_map, first, second = decode_images(html)
    assert image.shape == (16, 16, 3) and true_map.shape == first.shape == (320, 320, 3)
    assert (first != second).any()
    assert "sky &amp; sea" in html and f"--chip:rgb{get_color(1)}" in html


def test_scores_are_those_of_the_metric(run):
    task, records = load_run_weights(run, Ade20k), list(open_run_records(run, "main", "val"))
    true_maps = [open_true_map(record) for record in records]
    right = list(map(make_prediction, records, true_maps))
    html = render_class_ious([run], HeldOutPredictions(task, records, [right]))
    assert "<b>100.0%</b> mIoU" in html and "<b>100.0%</b> aAcc" in html
    assert "8 held-out images" in html and "sky &amp; sea 100%" in html
    only_sky = [
        make_prediction(record, labels * 0)
        for record, labels in zip(records, true_maps, strict=True)
    ]
    all_labels = np.concatenate([labels.numpy().ravel() for labels in true_maps])
    iou = (all_labels == 0).sum() / (all_labels != 255).sum()
    html = render_class_ious([run], HeldOutPredictions(task, records, [only_sky]))
    assert f"sky &amp; sea {iou:.0%}" in html


def test_long_legends_are_cut():
    limit = segmentation.MAX_CARD_CLASSES
    classes = [{"label": label, "name": f"<{label}>", "share": 0.1} for label in range(limit + 3)]
    html = render_color_legend(classes)
    assert html.count('class="chip"') == limit and "and 3 more" in html and "&lt;0&gt;" in html
