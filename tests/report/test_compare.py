"""Runs side by side: which score is best, and whatever differs, under the names of the command
line."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from beit3.report.compare import (
    ABSENT,
    Column,
    aligned,
    command,
    differences,
    direction,
    fields,
    figure,
    flat,
    leaders,
    score_columns,
    score_table,
    scored_apart,
    state,
    texts,
)
from beit3.report.runs import Run

RECIPE = {
    "data": {"root": "", "batch": {"main": 4}},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "run": {"seed": 0, "eval_records": 0},
}


def run(label: str, *, accuracy: tuple[float, ...] = (), task: str = "vqa", **scores: float) -> Run:
    """A run that was evaluated every ten steps."""
    metrics = [
        {"step": 10.0 * n, "val/accuracy": value} for n, value in enumerate(accuracy, start=1)
    ]
    last = {"accuracy": accuracy[-1]} if accuracy else {}
    return Run(
        Path(label),
        label,
        task,
        "",
        json.loads(json.dumps(RECIPE)),
        metrics,
        {"step": 10} | scores | last,
    )


class Table(HTMLParser):
    """The rows of a table as lists of their cells' texts."""

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


def test_best_and_last_scores_with_the_best_marked():
    runs = [
        run("a", accuracy=(0.2, 0.5, 0.4), most_frequent=0.1),
        run("<b>", accuracy=(0.3, 0.45), most_frequent=0.1),
    ]
    assert Table(score_table(runs)).rows == [
        ["run", "accuracy, best", "at step", "accuracy, last", "most frequent", "steps"],
        ["a", "★ 50.0%", "20", "40.0%", "10.0%", "30"],
        ["<b>", "45.0%", "20", "★ 45.0%", "10.0%", "20"],
    ]


def test_runs_scored_on_something_else_get_no_star():
    runs = [run("a", accuracy=(0.2,)), run("b", accuracy=(0.3,))]
    assert scored_apart(runs) == [] and "★" in score_table(runs)
    runs[1].recipe["data"]["batch"] = {"main": 8, "other": 0}
    assert scored_apart(runs) == [], "how many records make a step changes nothing"
    runs[1].recipe["data"]["root"] = "elsewhere"
    runs[1].inputs["frozen"] = {"visual_tokenizer": "ab"}
    assert scored_apart(runs) == [
        "the records (data.root)",
        "the frozen parts",
    ] and "★" not in score_table(runs)


def test_a_run_without_scores_leaves_its_cells_empty():
    table = Table(score_table([run("a", accuracy=(0.2, 0.3)), run("b")])).rows
    assert table[1:] == [["a", "30.0%", "20", "30.0%", "20"], ["b", "", "", "", "0"]]


@pytest.mark.parametrize(
    ("values", "better", "expected"),
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
def test_the_best_of_a_column(values, better, expected):
    assert (
        leaders(
            Column("x", values, ["" if value is None else f"{value}" for value in values], better)
        )
        == expected
    )


def test_what_is_written_alike_is_equally_good():
    assert leaders(Column("x", [1e-9, 2e-9], ["0.000", "0.000"], 1)) == set()
    assert leaders(Column("x", [0.5, 0.4999, 0.4], ["0.500", "0.500", "0.400"], 1)) == {0, 1}


def test_which_way_is_better():
    names = {
        "accuracy": 1,
        "texts/text_accuracy": 1,
        "text_loss": -1,
        "negative_loss": 1,
        "distance": -1,
        "perplexity": 0,
        "num_codes": 0,
    }
    assert {name: direction(name, "pretrain") for name in names} == names
    assert direction("score", "vqkd") == 1 and direction("score", "vqa") == 0
    for name in (
        "image_recall@10",
        "mean_recall",
        "top5",
        "consistency",
        "official",
        "bleu4",
        "rouge_l",
        "cider_d",
        "spice",
    ):
        assert direction(name, "vqa") == 1
    assert direction("most_frequent", "vqa") == direction("codebook_use", "vqkd") == 0


def test_scores_have_units_and_as_many_decimals():
    assert aligned("text_loss", [0.45947, 13.2, None]) == ["0.46", "13.20", ""]
    assert aligned("x", [-0.00012345, 0.0]) == ["-0.0001234", "0.0000000"]
    assert aligned("codebook_use", [1.0, 0.125]) == ["100.0%", "12.5%"] and aligned(
        "x", [0.0, None]
    ) == ["0", ""]
    titles = [
        column.title
        for column in score_columns([run("a", task="pretrain", image_loss=3.0, perplexity=2.0)])
    ]
    assert titles == ["image loss (nats)", "perplexity (codes)"]
    titles = [
        column.title
        for column in score_columns(
            [run("a", task="captioning", bleu4=0.4, rouge_l=0.5, cider=1.2)]
        )
    ]
    assert titles == ["CIDEr", "BLEU-4", "ROUGE-L"]
    assert aligned("bleu4", [0.375, 3e-10]) == ["0.375", "0.000"] and aligned(
        "cider/in-domain", [1.35]
    ) == ["1.350"]


def test_shares_are_percentages_and_the_rest_four_digits():
    assert figure("accuracy", 0.5) == "50.0%"
    assert figure("pairs/text_accuracy", 1) == "100.0%"
    assert (
        figure("image_recall@10", 0.25)
        == figure("mean_recall", 0.25)
        == figure("top5", 0.25)
        == "25.0%"
    )
    assert figure("cider", 1.336) == "1.336" and figure("bleu4", 3e-10) == "0.000"
    assert figure("text_loss", 1.23456) == "1.235"
    assert figure("note", "<x>") == '"<x>"'


def test_only_fields_that_differ_are_named():
    first, second = run("a"), run("b")
    assert differences([fields(first), fields(second)]) == {}
    second.recipe["optim"]["lr"] = 3e-4
    second.recipe["data"]["batch"]["pairs"] = 64
    second = replace(second, init="/machine/runs/pretrain/last")
    expected = {
        "init": ["from scratch", "pretrain/last"],
        "optim.lr": ["0.001", "0.0003"],
        "data.batch.pairs": [ABSENT, "64"],
    }
    assert differences([fields(first), fields(second)]) == expected


def test_a_task_is_compared_as_its_records_completed_it():
    first, second = run("a"), run("b")
    for each, answers in ((first, ["yes"]), (second, ["yes", "no"])):
        each.recipe["task"] = {"answers": [], "text_length": 8}
        each.inputs.update(config={"answers": answers, "text_length": 8}, tokenizer="ab" * 32)
    assert differences([fields(first), fields(second)]) == {
        "task.answers": ['["yes"]', '["yes", "no"]']
    }
    second.inputs["tokenizer"] = "cd" * 32
    assert differences([fields(first), fields(second)])["inputs.tokenizer"] == [
        "abababababab",
        "cdcdcdcdcdcd",
    ]


def test_values_that_differ_never_look_the_same():
    long = [[f"answer {index}" for index in range(3000)] for _ in range(2)]
    long[1][2999] = "other"
    shown = texts(long)
    assert all(text.startswith("3000 values (") for text in shown) and shown[0] != shown[1]
    for values in (
        ["x" * 200 + "a", "x" * 200 + "b"],
        ["/m/a/run/last", "/m/b/run/last", "/m/a/run/last"],
        [1, 1.0000001],
        ["1", 1],
    ):
        shown = texts(values)
        assert len(set(shown)) == len(set(map(json.dumps, values))) and all(
            len(text) < 100 for text in shown
        )
    assert texts(["/m/a/run/last", "/m/b/run/last"]) == ["a/run/last", "b/run/last"]
    assert texts([None, True, 0.5, "a b/c"]) == ["null", "true", "0.5", "a b/c"]


def test_place_and_command():
    environment = {
        "torch": "2.15",
        "git": {"commit": "c", "changed": False},
        "command": ["beit3", "train", "a b"],
        "started": "now",
    }
    environment |= {"beit3": "", "device": None}
    kept = replace(run("a"), environment=environment)
    assert state(kept) == {"torch": "2.15", "git.commit": "c", "git.changed": False}
    assert (
        command(kept) == "beit3 train 'a b'" and command(run("b")) == "" and state(run("b")) == {}
    )
    assert flat({"a": {"b": {"c": [1, {}]}}, "d": None}) == {"a.b.c": [1, {}], "d": None}
