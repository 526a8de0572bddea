"""Tests of tables and of the strokes in front of the names of runs."""

from beit3.report.document import render_stroke, render_table
from beit3.report.plots import PALETTE


def test_a_stroke_repeats_the_dash_of_a_curve():
    assert render_stroke(PALETTE[0], ()).count(PALETTE[0]) == 1
    gradient = "repeating-linear-gradient(90deg,red 0px 12px,transparent 12px 18px)"
    assert render_stroke("red", (4, 2)) == gradient


def test_a_table_has_the_columns_of_all_its_rows():
    html = render_table([{"a": "1"}, {"a": "2", "b": "3"}])
    assert "<tr><td>1</td><td></td></tr><tr><td>2</td><td>3</td></tr>" in html
    assert html.index(">a</th>") < html.index(">b</th>")
    assert render_table([]) == ""
