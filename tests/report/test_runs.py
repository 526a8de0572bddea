"""Tests of reading run directories: finished or still going, of this version or an older one."""

import json
import math
from pathlib import Path

import pytest

from beit3.cli.report import report
from beit3.report.runs import Run, read_runs, shorten_paths


def make_run(lines: list[dict[str, float]]) -> Run:
    return Run(Path("x"), "a", "vqa", "", {}, lines, {})


def write_recipe(path: Path) -> None:
    (path / "recipe.json").write_text(json.dumps({"task": "vqa", "init": "", "recipe": {}}))


def test_a_series_leaves_out_values_that_are_not_finite_or_not_logged():
    lines = [
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": 3.0},
        {"step": 3, "lr": 1.0},
        {"step": 4, "loss": None},
    ]
    steps, values = make_run(lines).get_series("loss")
    assert steps.tolist() == [2] and values.tolist() == [3]


def test_runs_are_read_and_labeled(vqa):
    first, second = read_runs(list(vqa))
    assert (first.label, second.label) == ("pretrained/vqa", "scratch/vqa")
    assert read_runs([vqa[0]])[0].label == "vqa"
    assert first.task == "vqa" and first.scores["accuracy"] == 1.0 and len(first.metrics) == 12
    assert second.init == "there/last"


def test_a_run_that_is_still_going_can_be_read(tmp_path):
    write_recipe(tmp_path)
    assert read_runs([tmp_path])[0].metrics == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_runs([tmp_path])[0].metrics == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "3",
        '{"loss": 2.0}',
        '{"step": 1e999}',
        '{"step": "1"}',
        '{"step": 1, "\\ud800": 2}',
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    write_recipe(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2, "loss": 2.0}}\n'
    )
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a JSON object with a step"):
        read_runs([tmp_path])


def test_a_directory_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run: it has no recipe.json"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a run: its recipe.json lacks task and recipe"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json is not JSON"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text('{"task": "vqa", "recipe": [1]}')
    with pytest.raises(ValueError, match=r"recipe.json: the field 'recipe' is \[1\]"):
        read_runs([tmp_path])


def test_a_run_that_is_given_twice_is_read_once(vqa):
    assert len(read_runs([vqa[0], vqa[0] / ".." / "vqa"])) == 1


def test_paths_are_shortened_to_what_tells_them_apart():
    assert shorten_paths(["/a/x/run", "/b/x/run", "/a/other"]) == ["a/x/run", "b/x/run", "other"]
    assert shorten_paths(["/a/run", "/a/run"]) == ["run", "run"]
    assert shorten_paths(["/m/pretrain/last"], min_parts=2) == ["pretrain/last"]
    assert shorten_paths(["x", "y/x"]) == ["x", "y/x"]


def test_time_speed_and_memory_leave_evaluations_out():
    run = make_run(
        [
            {"step": 10, "seconds": 0.5, "seconds_waiting": 0.1, "samples": 32, "memory": 1.0},
            {"step": 10, "val/accuracy": 0.5},
            {"step": 30, "seconds": 0.25, "seconds_waiting": 0.05, "samples": 32, "memory": 3.0},
            {"step": 35, "seconds": 0.25, "seconds_waiting": 0.0, "samples": 32, "memory": 3.0},
        ]
    )
    assert run.last_step == 35
    assert run.training_seconds == 10 * 0.5 + 20 * 0.25 + 5 * 0.25
    assert run.waiting_fraction == pytest.approx((0.1 * 10 + 0.05 * 20) / run.training_seconds)
    assert run.records_per_second == 32 / 0.25
    assert run.peak_memory == 3.0


def test_older_runs_without_timings_have_zeros():
    run = make_run([{"step": 10, "samples": 32, "loss": 1.0}])
    assert run.training_seconds == run.waiting_fraction == 0
    assert run.records_per_second == run.peak_memory == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": []}, "the field 'recipe' is [], it should be an object"),
        ({"recipe": {"data": 3}}, "the field 'recipe.data' is 3, it should be an object"),
        ({"recipe": {"data": {"batch": []}}}, "the field 'recipe.data.batch' is []"),
        ({"recipe": {"data": {"batch": {"a": "3"}}}}, "'recipe.data.batch.a' is \"3\""),
        ({"recipe": {"data": {"root": 3}}}, "the field 'recipe.data.root' is 3"),
        ({"recipe": {"run": None}}, "the field 'recipe.run' is null"),
        ({"task": ["vqa"]}, "the field 'task' is [\"vqa\"], it should be a text"),
        ({"init": 3}, "the field 'init' is 3, it should be a text"),
        ({"inputs": [1]}, "the field 'inputs' is [1], it should be an object"),
        ({"environment": {"started": 3}}, "the field 'environment.started' is 3"),
    ],
)
def test_fields_of_a_recipe_of_other_types_are_named(tmp_path, change, message):
    content = {"task": "vqa", "init": "", "recipe": {}} | change
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="recipe.json: the field") as error:
        read_runs([tmp_path])
    assert message in str(error.value)


def test_texts_that_cannot_be_written_are_named(tmp_path):
    content = {"task": "vqa", "recipe": {"note": "\ud800"}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="recipe.json holds a text with .* no character: mend it"):
        read_runs([tmp_path])


def test_scores_that_are_no_numbers_are_named(tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "scores.json").write_text('{"accuracy": "high"}')
    with pytest.raises(ValueError, match="scores.json: the field 'accuracy' is \"high\""):
        read_runs([tmp_path])
    (tmp_path / "scores.json").write_text("[1]")
    with pytest.raises(ValueError, match="scores.json holds no JSON object of scores"):
        read_runs([tmp_path])


def test_a_fault_of_the_page_is_not_blamed_on_the_files(vqa, monkeypatch, tmp_path):
    def fail(*_):
        raise TypeError("a fault of the page")

    monkeypatch.setattr("beit3.report.page.render_scores", fail)
    with pytest.raises(TypeError, match="a fault of the page"):
        report(str(vqa[0]), out=str(tmp_path / "report.html"))
