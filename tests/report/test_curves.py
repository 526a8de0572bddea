"""Numbers are drawn as SVG that a page can hold as it is, each run and part with its own look."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3.report.curves import (
    DASHES,
    INK,
    PALETTE,
    Chart,
    chart_title,
    charts,
    curve,
    held_out_names,
    moved_apart,
    part_curve,
    part_looks,
    run_class,
    smooth,
    spans_decades,
    usage_bars,
    usage_figures,
)
from beit3.report.runs import Run


def run(lines: list[dict[str, float]], *, label: str = "a", task: str = "vqa") -> Run:
    return Run(Path("x"), label, task, "", {}, lines, {})


def series(key: str, values: list[float]) -> list[dict[str, float]]:
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 10))
def test_smoothing_is_the_mean_over_a_window(values, reach):
    expected = [
        np.mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))
    ]
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


def test_a_chart_per_quantity_then_the_scores_that_moved():
    logged = {
        "loss": 1.0,
        "loss/loss": 1.0,
        "accuracy": 0.5,
        "lr": 1.0,
        "gradient_norm": 1.0,
        "gradient_norm/head": 1.0,
    }
    once = [
        {"step": 1} | logged,
        {"step": 1, "val/accuracy": 0.1, "val/most_frequent": 0.1, "val/negative_loss": 1.0},
    ]
    expected = [
        Chart("loss (nats)", "loss/loss", ("val/loss",)),
        Chart("accuracy", "accuracy", ("val/accuracy",)),
    ]
    assert charts([run(once)]) == expected
    twice = [
        *once,
        {"step": 2, "val/accuracy": 0.2, "val/most_frequent": 0.1, "val/negative_loss": 2.0},
    ]
    still = [{"step": step, "val/bleu4": value} for step, value in ((1, 2e-10), (2, 3e-10))]
    assert charts([run(once + still)]) == expected
    assert charts([run(once), run(twice)]) == [
        *expected,
        Chart("held-out negative loss (nats)", held_out=("val/negative_loss",)),
    ]
    assert charts([run([{"step": 1, "loss": 1.0}], task="not_installed")]) == [
        Chart("loss", "loss", ("val/loss",))
    ]
    assert charts([run([])]) == []


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("loss", ("val/loss",)),
        ("loss/loss", ("val/loss",)),
        ("accuracy", ("val/accuracy",)),
        ("loss/image", ("val/images/image_loss", "val/image_loss")),
        ("loss/pair_text", ("val/pairs/text_loss", "val/text_loss")),
        ("pair_image/accuracy", ("val/pairs/image_accuracy", "val/image_accuracy")),
    ],
)
def test_a_quantity_is_found_on_held_out_records(key, names):
    assert held_out_names(key) == names


def test_titles_say_units_where_there_are_any():
    assert chart_title("loss/pair_text", "pretrain") == "pair text: loss (nats)"
    assert chart_title("loss/commitment", "vqkd") == "commitment: loss"
    assert chart_title("val/perplexity", "vqkd") == "held-out perplexity (codes)"
    assert chart_title("val/cider", "captioning") == "held-out CIDEr"
    assert chart_title("val/text_recall@1", "retrieval") == "held-out text recall@1"


@pytest.mark.parametrize(
    "values, expected", [([1, 9], False), ([1, 11], True), ([-1, 11], False), ([], False)]
)
def test_only_positive_lines_over_more_than_a_decade_are_logarithmic(values, expected):
    assert spans_decades([np.array(values)]) is expected


def test_a_curve_is_one_self_contained_element_with_its_text_as_text():
    svg = curve(
        [run(series("loss/pair_text", [5.0, 4.0, 3.0]))], Chart("pair text: loss", "loss/pair_text")
    )
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("viewBox") and root.get("width") is None
    assert "pair text: loss" in "".join(root.itertext())
    assert "ends at 3" in (root.get("aria-label") or "")
    assert INK not in svg and "currentColor" in svg
    links = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(link.startswith("#") for link in links)
    assert "<script" not in svg and "@import" not in svg


LOSS = Chart("loss", "loss", ("val/loss",))


def test_two_runs_share_one_picture_in_two_colors():
    runs = [run(series("loss", [3.0, 2.0, 1.0])), run(series("loss", [2.0, 1.0]), label="<b>")]
    svg = curve(runs, LOSS)
    assert PALETTE[0] in svg and PALETTE[1] in svg and "stroke-dasharray" in svg
    assert "&lt;b&gt; ends at 1" in svg
    alone = curve(runs[:1], LOSS)
    assert PALETTE[1] not in alone and strokes(alone, PALETTE[0]) == ["", ""]


def strokes(svg: str, color: str) -> list[str]:
    """The dashes of the lines of one colour; "" where a line is whole."""
    found = re.findall(rf'<path [^>]*style="([^"]*stroke: {color}[^"]*)"', svg)
    return [
        (re.findall(r"stroke-dasharray: ([\d., ]+)", style) or [""])[0]
        for style in found
        if "fill: none" in style
    ]


def test_twenty_runs_look_different_without_color_groups_of_four():
    runs = [run(series("loss", [3.0, 2.0]), label=str(index)) for index in range(20)]
    svg = curve(runs, LOSS)
    looks = [(color, dash) for color in PALETTE for dash in strokes(svg, color)]
    assert len(looks) == len(set(looks)) == 20
    assert len({dash for _, dash in looks[:4]}) == len(DASHES) == 4
    assert len({run_class(index) for index in range(20)}) == 20 and run_class(20) == run_class(0)


def test_held_out_scores_are_rings_of_runs_that_trained_on_the_quantity():
    chart = Chart("text: loss", "loss/text", ("val/texts/text_loss", "val/text_loss"))
    scored = [{"step": 2, "val/texts/text_loss": 4.0, "val/text_loss": 7.0}]
    both = run(series("loss/text", [3.0, 2.0]) + scored)
    assert "a ends at 4 on held-out records" in curve([both], chart)
    other = run(
        series("loss/pair_text", [3.0, 2.0]) + [{"step": 2, "val/text_loss": 7.0}], label="b"
    )
    assert "b ends" not in curve([both, other], chart)
    assert "b ends at 7 on held-out records" in curve(
        [other], Chart("x", held_out=("val/text_loss",))
    )


def parts(count: int) -> Run:
    lines = [
        {"step": step, "gradient_norm": 1.0, "gradient_norm/image_embedding": 0.0}
        for step in (1, 2)
    ]
    for line in lines:
        line |= {f"gradient_norm/blocks.{index}": 10.0**-index for index in range(count)} | {
            "gradient_norm/head": 2.0
        }
    return run(lines)


def test_parts_are_named_at_their_ends_and_of_a_row_the_first_and_last():
    svg = part_curve(parts(5), "gradient_norm", "norms")
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"image_embedding", "head", "blocks.0", "blocks.4"} <= set(shown)
    assert not {"blocks.1", "blocks.2", "blocks.3"} & set(shown)
    assert "image_embedding ends at 0," in svg and "blocks.4 ends at 0.0001" in svg
    ElementTree.fromstring(svg)


def test_parts_of_a_row_shade_and_the_others_are_told_apart():
    looks = part_looks(
        ["image_embedding", "blocks.0", "blocks.1", "blocks.2", "norm1", "norm2", "head"]
    )
    assert (
        looks["blocks.0"][0] == PALETTE[0]
        and looks["blocks.2"][0] == PALETTE[4]
        and not looks["blocks.1"][2]
    )
    alone = [looks[part] for part in ("image_embedding", "norm1", "norm2", "head")]
    assert len(set(alone)) == 4 and all(named for *_, named in alone)


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.1))
def test_labels_are_moved_apart_in_their_order(places, gap):
    moved = moved_apart(places, gap)
    order = sorted(range(len(places)), key=lambda index: places[index])
    steps = [moved[after] - moved[before] for before, after in zip(order, order[1:], strict=False)]
    assert all(step >= gap - 1e-9 for step in steps) and max(moved, default=0) <= 1
    far = all(
        places[after] - places[before] >= gap
        for before, after in zip(order, order[1:], strict=False)
    )
    assert moved == pytest.approx(places) or not far


def test_long_runs_are_thinned():
    long = curve([run(series("loss", np.random.default_rng(0).random(20_000).tolist()))], LOSS)
    assert len(long) < 60_000


def test_usage_bars_say_their_figures():
    svg = usage_bars(np.array([3, 1, 0, 4]))
    assert "75% of 4 codes are used" in (ElementTree.fromstring(svg).get("aria-label") or "")
    assert usage_bars(np.array([0, 4, 3, 1])) == svg
