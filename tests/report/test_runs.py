"""Runs are read as they lie: whole or still going, of this version or an older one."""

import json
import math
from pathlib import Path

import pytest

from beit3.report.runs import Run, read_runs, tails


def run(lines: list[dict[str, float]]) -> Run:
    return Run(Path("x"), "a", "vqa", "", {}, lines, {})


def test_values_that_are_not_finite_or_not_logged_are_left_out():
    lines = [
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": 3.0},
        {"step": 3, "lr": 1.0},
        {"step": 4, "loss": None},
    ]
    steps, values = run(lines).series("loss")
    assert steps.tolist() == [2] and values.tolist() == [3]


def test_reading_a_run(vqa):
    first, second = read_runs(list(vqa))
    assert (first.label, second.label) == ("pretrained/vqa", "scratch/vqa")
    assert read_runs([vqa[0]])[0].label == "vqa"
    assert first.task == "vqa" and first.scores["accuracy"] == 1.0 and len(first.metrics) == 12
    assert second.init == "there/last"


def test_a_run_that_is_still_going(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"task": "vqa", "init": "", "recipe": {}}))
    assert read_runs([tmp_path])[0].metrics == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_runs([tmp_path])[0].metrics == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": 2.0}'])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "recipe.json").write_text(json.dumps({"task": "vqa", "init": "", "recipe": {}}))
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2, "loss": 2.0}}\n'
    )
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is no JSON object with a step"):
        read_runs([tmp_path])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run: it has no recipe.json"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json is not JSON"):
        read_runs([tmp_path])


def test_a_run_given_twice_is_read_once(vqa):
    assert len(read_runs([vqa[0], vqa[0] / ".." / "vqa"])) == 1


def test_labels_are_as_short_as_tells_them_apart():
    assert tails(["/a/x/run", "/b/x/run", "/a/other"]) == ["a/x/run", "b/x/run", "other"]
    assert tails(["/a/run", "/a/run"]) == ["run", "run"]
    assert tails(["/m/pretrain/last"], least=2) == ["pretrain/last"]
    assert tails(["x", "y/x"]) == ["x", "y/x"]


def test_time_pace_and_memory_of_a_run():
    lines = [
        {"step": 10, "seconds": 0.5, "seconds_waiting": 0.1, "samples": 32, "memory": 1.0},
        {"step": 10, "val/accuracy": 0.5},
        {"step": 30, "seconds": 0.25, "seconds_waiting": 0.05, "samples": 32, "memory": 3.0},
        {"step": 35, "seconds": 0.25, "seconds_waiting": 0.0, "samples": 32, "memory": 3.0},
    ]
    found = run(lines)
    assert found.seconds() == 10 * 0.5 + 20 * 0.25 + 5 * 0.25
    assert found.rate() == 32 / 0.25 and found.memory() == 3.0 and found.steps == 35
    assert found.waiting() == pytest.approx((0.1 * 10 + 0.05 * 20) / found.seconds())
    older = run([{"step": 10, "samples": 32, "loss": 1.0}])
    assert (older.seconds(), older.rate(), older.waiting(), older.memory()) == (0, 0, 0, 0)
