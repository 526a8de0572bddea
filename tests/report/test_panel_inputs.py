"""Panels use a run's own weights and held-out records, picked without a look at them."""

from dataclasses import replace

import pytest

from beit3.report.panel_inputs import (
    load_run_weights,
    make_panel,
    open_held_out_records,
    open_run_records,
    pick_evenly,
)
from beit3.report.runs import read_runs
from beit3.tasks.retrieval import Retrieval
from tests.report.conftest import CAPTION


def test_records_are_picked_evenly_and_once(vqkd):
    dataset = open_run_records(read_runs([vqkd])[0], "main", "val")
    assert [record["id"] for record in pick_evenly(dataset, 3)] == ["0.png", "4.png", "7.png"]
    assert len(pick_evenly(dataset, 100)) == 8


def test_a_source_may_be_records_of_another_task(retrieval):
    run = read_runs([retrieval[0]])[0]
    assert open_run_records(run, "pairs", "val")[0]["text"] == CAPTION
    assert "captions" in open_run_records(run, "main", "val")[0]


def test_held_out_records_are_those_of_the_first_trained_source(retrieval):
    run = read_runs([retrieval[0]])[0]
    run.recipe["data"]["batch"] = {"main": 0, "pairs": 4}
    assert open_held_out_records(run)[0]["text"] == CAPTION
    run.recipe["data"]["batch"] = {}
    assert "captions" in open_held_out_records(run)[0]


def test_weights_are_those_of_the_run_in_evaluation_mode(retrieval, tmp_path):
    run = read_runs([retrieval[0]])[0]
    assert not load_run_weights(run, Retrieval).training
    with pytest.raises(ValueError, match=f"run {run.label} has no weights yet"):
        load_run_weights(replace(run, path=tmp_path), Retrieval)


def test_a_panel_shows_the_error_in_place_of_its_body():
    def fail() -> str:
        raise ValueError("no <records>")

    failed = make_panel("a", "b", fail)
    assert failed.body == '<p class="none">Nothing to show: no &lt;records&gt;</p>'
    assert make_panel("a", "b", lambda: "<b>").body == "<b>"
