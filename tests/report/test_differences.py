"""Tests of what differs between runs, under the names that the command line has for it."""

import json
from dataclasses import replace
from pathlib import Path

from beit3.report.differences import (
    find_differences,
    flatten,
    format_command,
    format_values,
    list_environment,
    list_fields,
)
from beit3.report.runs import Run
from beit3.report.scores import ABSENT


def make_run(label: str) -> Run:
    recipe = {
        "data": {"root": "", "batch": {"main": 4}},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "run": {"seed": 0, "eval_records": 0},
    }
    return Run(Path(label), label, "vqa", "", recipe, [], {})


def test_only_fields_that_differ_are_listed():
    first, second = make_run("a"), make_run("b")
    assert find_differences([list_fields(first), list_fields(second)]) == {}
    second.recipe["optim"]["lr"] = 3e-4
    second.recipe["data"]["batch"]["pairs"] = 64
    second = replace(second, init="/machine/runs/pretrain/last")
    expected = {
        "init": ["from scratch", "pretrain/last"],
        "optim.lr": ["0.001", "0.0003"],
        "data.batch.pairs": [ABSENT, "64"],
    }
    assert find_differences([list_fields(first), list_fields(second)]) == expected


def test_tasks_are_compared_as_their_records_completed_them():
    first, second = make_run("a"), make_run("b")
    for run, answers in ((first, ["yes"]), (second, ["yes", "no"])):
        run.recipe["task"] = {"answers": [], "text_length": 8}
        run.inputs.update(config={"answers": answers, "text_length": 8}, tokenizer="ab" * 32)
    differences = find_differences([list_fields(first), list_fields(second)])
    assert differences == {"task.answers": ['["yes"]', '["yes", "no"]']}
    second.inputs["tokenizer"] = "cd" * 32
    differences = find_differences([list_fields(first), list_fields(second)])
    assert differences["inputs.tokenizer"] == ["abababababab", "cdcdcdcdcdcd"]


def test_different_values_never_look_the_same():
    for values in (
        ["x" * 200 + "a", "x" * 200 + "b"],
        ["/m/a/run/last", "/m/b/run/last", "/m/a/run/last"],
        [1, 1.0000001],
        ["1", 1],
    ):
        texts = format_values(values)
        assert len(set(texts)) == len({json.dumps(value) for value in values})
        assert all(len(text) < 100 for text in texts)


def test_long_lists_are_counted_and_told_apart_by_a_digest():
    answers = [f"answer {index}" for index in range(3000)]
    first, second = format_values([answers, [*answers[:-1], "other"]])
    assert first.startswith("3000 values (") and second.startswith("3000 values (")
    assert first != second


def test_paths_are_shortened_and_plain_values_are_json():
    assert format_values(["/m/a/run/last", "/m/b/run/last"]) == ["a/run/last", "b/run/last"]
    assert format_values([None, True, 0.5, "a b/c"]) == ["null", "true", "0.5", "a b/c"]


def test_nested_tables_have_dotted_names():
    nested = {"a": {"b": {"c": [1, {}]}}, "d": None}
    assert flatten(nested) == {"a.b.c": [1, {}], "d": None}


def test_the_environment_leaves_out_command_time_and_unknown_facts():
    environment = {
        "torch": "2.15",
        "git": {"commit": "c", "changed": False},
        "command": ["beit3", "train", "a b"],
        "started": "now",
        "beit3": "",
        "device": None,
    }
    run = replace(make_run("a"), environment=environment)
    assert list_environment(run) == {"torch": "2.15", "git.commit": "c", "git.changed": False}
    assert format_command(run) == "beit3 train 'a b'"
    assert format_command(make_run("b")) == "" and list_environment(make_run("b")) == {}
