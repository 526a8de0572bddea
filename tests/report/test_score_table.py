"""Tests of the table of scores: its columns, its cells, and which of them are the best."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from beit3.report.runs import Run
from beit3.report.score_table import (
    Column,
    find_best_runs,
    find_scoring_differences,
    make_score_columns,
    render_score_table,
)


def make_run(
    label: str, *, accuracy: tuple[float, ...] = (), task: str = "vqa", **scores: float
) -> Run:
    """Returns a run that was evaluated every ten steps."""
    recipe = {"data": {"root": "", "batch": {"main": 4}}, "run": {"eval_records": 0}}
    metrics = [
        {"step": 10.0 * number, "val/accuracy": value}
        for number, value in enumerate(accuracy, start=1)
    ]
    last_scores = {"step": 10, **scores}
    if accuracy:
        last_scores["accuracy"] = accuracy[-1]
    return Run(Path(label), label, task, "", recipe, metrics, last_scores)


class Table(HTMLParser):
    """The rows of a table as lists of the texts of their cells."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.rows[-1][-1] += data


def test_the_table_shows_best_and_last_scores_and_marks_the_best():
    runs = [
        make_run("a", accuracy=(0.2, 0.5, 0.4), most_frequent=0.1),
        make_run("<b>", accuracy=(0.3, 0.45), most_frequent=0.1),
    ]
    assert Table(render_score_table(runs)).rows == [
        ["run", "accuracy, best", "at step", "accuracy, last", "most frequent", "steps"],
        ["a", "★ 50.0%", "20", "40.0%", "10.0%", "30"],
        ["<b>", "45.0%", "20", "★ 45.0%", "10.0%", "20"],
    ]


def test_runs_that_were_scored_differently_have_no_star():
    runs = [make_run("a", accuracy=(0.2,)), make_run("b", accuracy=(0.3,))]
    assert find_scoring_differences(runs) == [] and "★" in render_score_table(runs)
    runs[1].recipe["data"]["batch"] = {"main": 8, "other": 0}
    assert find_scoring_differences(runs) == [], "the number of records per step does not matter"
    runs[1].recipe["data"]["root"] = "elsewhere"
    runs[1].inputs["frozen"] = {"visual_tokenizer": "ab"}
    assert find_scoring_differences(runs) == ["the records (data.root)", "the frozen parts"]
    assert "★" not in render_score_table(runs)


def test_cells_of_a_run_without_scores_are_empty():
    rows = Table(render_score_table([make_run("a", accuracy=(0.2, 0.3)), make_run("b")])).rows
    assert rows[1:] == [["a", "30.0%", "20", "30.0%", "20"], ["b", "", "", "", "0"]]


@pytest.mark.parametrize(
    ("values", "direction", "best_runs"),
    [
        ([1.0, 3.0, 2.0], 1, {1}),
        ([1.0, 3.0, 2.0], -1, {0}),
        ([3.0, None, 3.0, 1.0], 1, {0, 2}),
        ([1.0, 3.0], 0, set()),
        ([2.0, 2.0], 1, set()),
        ([2.0, None], 1, set()),
        ([None, None], 1, set()),
    ],
)
def test_best_runs_of_a_column(values, direction, best_runs):
    texts = ["" if value is None else f"{value}" for value in values]
    assert find_best_runs(Column("x", values, texts, direction)) == best_runs


def test_values_that_read_alike_are_equally_good():
    assert find_best_runs(Column("x", [1e-9, 2e-9], ["0.000", "0.000"], 1)) == set()
    column = Column("x", [0.5, 0.4999, 0.4], ["0.500", "0.500", "0.400"], 1)
    assert find_best_runs(column) == {0, 1}


def test_columns_have_units_and_the_headline_metric_leads():
    pretraining = make_run("a", task="pretrain", image_loss=3.0, perplexity=2.0)
    titles = [column.title for column in make_score_columns([pretraining])]
    assert titles == ["image loss (nats)", "perplexity (codes)"]
    captioning = make_run("a", task="captioning", bleu4=0.4, rouge_l=0.5, cider=1.2)
    titles = [column.title for column in make_score_columns([captioning])]
    assert titles == ["CIDEr", "BLEU-4", "ROUGE-L"]
