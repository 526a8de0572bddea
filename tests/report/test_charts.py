"""Tests of which logged quantities get a chart, and of the titles of charts."""

from pathlib import Path

import pytest

from beit3.report.charts import Chart, choose_charts, format_chart_title, list_held_out_names
from beit3.report.runs import Run


def make_run(lines: list[dict[str, float]], *, task: str = "vqa") -> Run:
    return Run(Path("x"), "a", task, "", {}, lines, {})


TRAINING_LINE = {
    "step": 1,
    "loss": 1.0,
    "loss/loss": 1.0,
    "accuracy": 0.5,
    "lr": 1.0,
    "gradient_norm": 1.0,
    "gradient_norm/head": 1.0,
}
FIRST_SCORES = {
    "step": 1,
    "val/accuracy": 0.1,
    "val/most_frequent": 0.1,
    "val/negative_loss": 1.0,
}
TRAINING_CHARTS = [
    Chart("loss (nats)", "loss/loss", ("val/loss",)),
    Chart("accuracy", "accuracy", ("val/accuracy",)),
]


def test_each_trained_quantity_has_one_chart():
    assert choose_charts([make_run([TRAINING_LINE, FIRST_SCORES])]) == TRAINING_CHARTS
    assert choose_charts([make_run([])]) == []


def test_scores_that_changed_have_a_chart():
    lines = [TRAINING_LINE, FIRST_SCORES]
    second_scores = FIRST_SCORES | {"step": 2, "val/accuracy": 0.2, "val/negative_loss": 2.0}
    runs = [make_run(lines), make_run([*lines, second_scores])]
    score_chart = Chart("held-out negative loss (nats)", held_out=("val/negative_loss",))
    assert choose_charts(runs) == [*TRAINING_CHARTS, score_chart]


def test_tiny_changes_of_a_score_have_no_chart():
    scores = [{"step": 1, "val/bleu4": 2e-10}, {"step": 2, "val/bleu4": 3e-10}]
    assert choose_charts([make_run([TRAINING_LINE, FIRST_SCORES, *scores])]) == TRAINING_CHARTS


def test_runs_of_a_task_that_is_not_installed_have_charts():
    run = make_run([{"step": 1, "loss": 1.0}], task="not_installed")
    assert choose_charts([run]) == [Chart("loss", "loss", ("val/loss",))]


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("loss", ("val/loss",)),
        ("loss/loss", ("val/loss",)),
        ("accuracy", ("val/accuracy",)),
        ("loss/image", ("val/images/image_loss", "val/image_loss")),
        ("loss/pair_text", ("val/pairs/text_loss", "val/text_loss")),
        ("pair_image/accuracy", ("val/pairs/image_accuracy", "val/image_accuracy")),
    ],
)
def test_training_quantities_have_names_on_held_out_records(name, held_out):
    assert list_held_out_names(name) == held_out


def test_titles_name_units_where_there_are_any():
    assert format_chart_title("loss/pair_text", "pretrain") == "pair text: loss (nats)"
    assert format_chart_title("loss/commitment", "vqkd") == "commitment: loss"
    assert format_chart_title("val/perplexity", "vqkd") == "held-out perplexity (codes)"
    assert format_chart_title("val/cider", "captioning") == "held-out CIDEr"
    assert format_chart_title("val/text_recall@1", "retrieval") == "held-out text recall@1"
