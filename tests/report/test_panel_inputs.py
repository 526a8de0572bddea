"""Panels are made of the run's own weights and held-out records, picked without looking."""

from dataclasses import replace

import pytest

from beit3.report.panel_inputs import panel, records, spread, weights
from beit3.report.runs import read_runs
from beit3.tasks.retrieval import Retrieval
from tests.report.conftest import CAPTION


def test_records_are_taken_evenly_and_once(vqkd):
    source = records(read_runs([vqkd])[0], "main", "val")
    assert [record["id"] for record in spread(source, 3)] == ["0.png", "4.png", "7.png"]
    assert len(spread(source, 100)) == 8


def test_a_borrowed_source_is_another_tasks_records(retrieval):
    run = read_runs([retrieval[0]])[0]
    assert (
        records(run, "pairs", "val")[0]["text"] == CAPTION
        and "captions" in records(run, "main", "val")[0]
    )


def test_weights_are_the_runs_own_and_evaluate(retrieval, tmp_path):
    run = read_runs([retrieval[0]])[0]
    assert not weights(run, Retrieval).training
    with pytest.raises(ValueError, match=f"run {run.label} has no weights yet"):
        weights(replace(run, path=tmp_path), Retrieval)


def test_a_panel_says_what_it_lacks():
    def absent() -> str:
        raise ValueError("no <records>")

    assert panel("a", "b", absent).body == '<p class="none">Nothing to show: no &lt;records&gt;</p>'
    assert panel("a", "b", lambda: "<b>").body == "<b>"
