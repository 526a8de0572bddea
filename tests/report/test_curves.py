"""Tests of the SVGs of curves: self-contained, each run and part with its own style."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.report.charts import Chart
from beit3.report.curves import (
    choose_part_styles,
    draw_curves,
    draw_part_curves,
    smooth,
    spread_positions,
)
from beit3.report.plots import DASHES, INK, PALETTE
from beit3.report.runs import Run

LOSS = Chart("loss", "loss", ("val/loss",))


def make_run(lines: list[dict[str, float]], *, label: str = "a") -> Run:
    return Run(Path("x"), label, "vqa", "", {}, lines, {})


def make_lines(name: str, values: list[float]) -> list[dict[str, float]]:
    return [{"step": step, name: value} for step, value in enumerate(values, start=1)]


def find_dashes(svg: str, color: str) -> list[str]:
    """Returns the dashes of the lines of one color, "" for a solid line."""
    styles = re.findall(rf'<path [^>]*style="([^"]*stroke: {color}[^"]*)"', svg)
    return [
        (re.findall(r"stroke-dasharray: ([\d., ]+)", style) or [""])[0]
        for style in styles
        if "fill: none" in style
    ]


# Runs -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 10))
def test_smoothing_is_the_mean_over_a_window(values, radius):
    expected = [
        np.mean(values[max(0, index - radius) : index + radius + 1]) for index in range(len(values))
    ]
    np.testing.assert_allclose(smooth(np.array(values), radius), expected, atol=1e-9)


def test_an_svg_is_self_contained_and_keeps_its_text_as_text():
    run = make_run(make_lines("loss/pair_text", [5.0, 4.0, 3.0]))
    svg = draw_curves([run], Chart("pair text: loss", "loss/pair_text"))
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("viewBox") and root.get("width") is None
    assert "pair text: loss" in "".join(root.itertext())
    assert "ends at 3" in (root.get("aria-label") or "")
    assert INK not in svg and "currentColor" in svg
    links = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in svg and "@import" not in svg


def test_two_runs_share_a_chart_in_two_colors():
    runs = [
        make_run(make_lines("loss", [3.0, 2.0, 1.0])),
        make_run(make_lines("loss", [2.0, 1.0]), label="<b>"),
    ]
    svg = draw_curves(runs, LOSS)
    assert PALETTE[0] in svg and PALETTE[1] in svg and "stroke-dasharray" in svg
    assert "&lt;b&gt; ends at 1" in svg
    single = draw_curves(runs[:1], LOSS)
    assert PALETTE[1] not in single and find_dashes(single, PALETTE[0]) == ["", ""]


def test_twenty_runs_look_different_and_groups_of_four_do_without_color():
    runs = [make_run(make_lines("loss", [3.0, 2.0]), label=str(index)) for index in range(20)]
    svg = draw_curves(runs, LOSS)
    looks = [(color, dash) for color in PALETTE for dash in find_dashes(svg, color)]
    assert len(looks) == len(set(looks)) == 20
    assert len({dash for _, dash in looks[:4]}) == len(DASHES) == 4


def test_held_out_scores_are_drawn_for_runs_that_trained_on_the_quantity():
    chart = Chart("text: loss", "loss/text", ("val/texts/text_loss", "val/text_loss"))
    scores = {"step": 2, "val/texts/text_loss": 4.0, "val/text_loss": 7.0}
    text_run = make_run([*make_lines("loss/text", [3.0, 2.0]), scores])
    assert "a ends at 4 on held-out records" in draw_curves([text_run], chart)
    pair_lines = make_lines("loss/pair_text", [3.0, 2.0])
    pair_run = make_run([*pair_lines, {"step": 2, "val/text_loss": 7.0}], label="b")
    assert "b ends" not in draw_curves([text_run, pair_run], chart)
    score_chart = Chart("x", held_out=("val/text_loss",))
    assert "b ends at 7 on held-out records" in draw_curves([pair_run], score_chart)


def test_long_runs_are_thinned():
    values = np.random.default_rng(0).random(20_000).tolist()
    assert len(draw_curves([make_run(make_lines("loss", values))], LOSS)) < 60_000


# Parts of one network -------------------------------------------------------------------------


def make_run_with_parts(num_blocks: int) -> Run:
    """Returns a run of two steps that logged a gradient norm of 0 for one part."""
    norms = {"gradient_norm": 1.0, "gradient_norm/image_embedding": 0.0}
    norms |= {f"gradient_norm/blocks.{index}": 10.0**-index for index in range(num_blocks)}
    norms["gradient_norm/head"] = 2.0
    return make_run([{"step": step, **norms} for step in (1, 2)])


def test_parts_are_labeled_but_only_the_first_and_last_of_numbered_ones():
    svg = draw_part_curves(make_run_with_parts(5), "gradient_norm", "norms")
    texts = set(re.findall(r"<text[^>]*>([^<]+)</text>", svg))
    assert {"image_embedding", "head", "blocks.0", "blocks.4"} <= texts
    assert not {"blocks.1", "blocks.2", "blocks.3"} & texts
    assert "image_embedding ends at 0," in svg and "blocks.4 ends at 0.0001" in svg
    ElementTree.fromstring(svg)


def test_numbered_parts_are_shaded_and_the_others_look_different():
    single_parts = ["image_embedding", "norm1", "norm2", "head"]
    styles = choose_part_styles([*single_parts, "blocks.0", "blocks.1", "blocks.2"])
    assert styles["blocks.0"].color == PALETTE[0]
    assert styles["blocks.2"].color == PALETTE[4]
    assert not styles["blocks.1"].is_labeled
    single_styles = [styles[part] for part in single_parts]
    assert len(set(single_styles)) == 4 and all(style.is_labeled for style in single_styles)


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.1))
def test_positions_are_spread_in_their_order(positions, gap):
    spread = spread_positions(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    neighbors = list(zip(order, order[1:], strict=False))
    assert all(spread[upper] - spread[lower] >= gap - 1e-9 for lower, upper in neighbors)
    assert max(spread, default=0) <= 1
    is_spread = all(positions[upper] - positions[lower] >= gap for lower, upper in neighbors)
    assert spread == pytest.approx(positions) or not is_spread
