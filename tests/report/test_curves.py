"""Runs are read as they lie, and their numbers drawn as SVG that a page can hold as it is."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.report.curves import (
    INK,
    PALETTE,
    Run,
    curve,
    curve_keys,
    curve_title,
    loss_curves,
    read_runs,
    smooth,
    spans_decades,
    usage_bars,
    usage_figures,
)


def run(lines: list[dict[str, float]], *, label: str = "a", task: str = "vqa") -> Run:
    return Run(Path("x"), label, task, "", {}, lines, {})


def series(key: str, values: list[float]) -> list[dict[str, float]]:
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 10))
def test_smoothing_is_the_mean_over_a_window(values, reach):
    expected = [np.mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]
    np.testing.assert_allclose(smooth(np.array(values), reach), expected, atol=1e-9)


def test_usage_of_plain_cases():
    assert usage_figures(np.array([5, 5, 5, 5])) == pytest.approx((1, 4))
    assert usage_figures(np.array([7, 0, 0, 0])) == pytest.approx((0.25, 1))
    assert usage_figures(np.array([0, 0])) == (0, 0)


def test_usage_is_two_to_the_entropy_in_bits():
    counts = np.random.default_rng(0).integers(0, 9, 50)
    shares = [count / sum(counts) for count in counts.tolist()]
    bits = -sum(share * math.log2(share) for share in shares if share)
    assert usage_figures(counts) == pytest.approx((sum(map(bool, shares)) / 50, 2**bits))


def test_values_that_are_not_finite_or_not_logged_are_left_out():
    lines = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 3.0}, {"step": 3, "lr": 1.0}]
    steps, values = run(lines).series("loss")
    assert steps.tolist() == [2] and values.tolist() == [3]


def test_a_picture_per_objective_then_accuracies_then_the_headline_taken_twice():
    logged = {"loss": 1.0, "loss/loss": 1.0, "accuracy": 0.5, "lr": 1.0}
    once = [{"step": 1} | logged, {"step": 1, "val/accuracy": 0.1, "val/most_frequent": 0.1}]
    assert curve_keys([run(once)]) == ["loss/loss", "accuracy"]
    twice = [*once, {"step": 2, "val/accuracy": 0.2, "val/most_frequent": 0.1}]
    assert curve_keys([run(once), run(twice)]) == ["loss/loss", "accuracy", "val/accuracy"]
    assert [curve_title(key) for key in curve_keys([run(twice)])] == ["loss", "accuracy", "held-out accuracy"]
    assert curve_keys([run([{"step": 1, "loss": 1.0}], task="not_installed")]) == ["loss"]
    assert curve_keys([run([])]) == []


@pytest.mark.parametrize("values, expected", [([1, 9], False), ([1, 11], True), ([-1, 11], False), ([], False)])
def test_only_positive_lines_over_more_than_a_decade_are_logarithmic(values, expected):
    assert spans_decades([np.array(values)]) is expected


def test_a_curve_is_one_self_contained_element_with_its_text_as_text():
    svg = curve([run(series("loss/pair_text", [5.0, 4.0, 3.0]))], "loss/pair_text")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("viewBox") and root.get("width") is None
    assert "pair text: loss" in "".join(root.itertext())
    assert "ends at 3" in (root.get("aria-label") or "")
    assert INK not in svg and "currentColor" in svg
    links = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in svg and "@import" not in svg


def test_two_runs_share_one_picture_in_two_colors():
    runs = [run(series("loss", [3.0, 2.0, 1.0])), run(series("loss", [2.0, 1.0]), label="<b>")]
    (svg,) = loss_curves(runs)
    assert PALETTE[0] in svg and PALETTE[1] in svg
    assert "&lt;b&gt; ends at 1" in svg
    alone = loss_curves(runs[:1])[0]
    assert PALETTE[1] not in alone


def test_long_runs_are_thinned():
    long = curve([run(series("loss", np.random.default_rng(0).random(20_000).tolist()))], "loss")
    assert len(long) < 60_000


def test_usage_bars_say_their_figures():
    svg = usage_bars(np.array([3, 1, 0, 4]))
    assert "75% of 4 codes are used" in (ElementTree.fromstring(svg).get("aria-label") or "")
    assert usage_bars(np.array([0, 4, 3, 1])) == svg


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


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path])
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json is not JSON"):
        read_runs([tmp_path])
