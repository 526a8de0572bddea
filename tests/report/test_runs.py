"""Tests of reading run directories: finished or still going, of this version or an older one."""

import json
import math
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": 2.0}', '{"step": 1e999}'])
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
    with pytest.raises(ValueError, match=r"recipe.json: the field 'recipe' is '\[1\]'"):
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
