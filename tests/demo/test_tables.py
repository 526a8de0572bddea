"""Rows of the demo's tables, and the form in which they are printed."""

from beit3.demo.comparison_runs import LEARNING_RATES
from beit3.demo.tables import format_markdown, format_spread, make_row, make_task_row


def test_a_spread_is_the_mean_with_minimum_and_maximum():
    assert format_spread([0.5, 0.7, 0.6]) == "60.0% (50.0% to 70.0%)"


def test_rows_become_lines_of_markdown():
    assert format_markdown([make_row("a", "1", "b")]).splitlines()[-1] == "| a | 1 | b |"


def test_a_task_is_compared_with_scratch_and_with_the_most_frequent_answer():
    row = make_task_row("nlvr2", {"accuracy": 0.75, "most_frequent": 0.5}, {"accuracy": 0.25})
    assert list(row.values())[1:] == [
        "75.0%",
        "25.0% from scratch, 50.0% for the most frequent answer",
    ]
    row = make_task_row("captioning", {"cider": 1.25}, {"cider": 0.5})
    assert list(row.values())[1:] == ["1.25", "0.50 from scratch"]


def test_learning_rates_name_their_folders():
    assert [str(rate) for rate in LEARNING_RATES] == [
        "0.0001-head-x20",
        "0.0003-head-x20",
        "0.0003-head-x1",
        "0.001-head-x1",
    ]
