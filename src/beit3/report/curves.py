"""Draws logged quantities over the steps of one or several runs as inline SVG."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from beit3.report.charts import Chart
from beit3.report.plots import (
    INK,
    PALETTE,
    LineStyle,
    get_line_style,
    get_run_style,
    make_figure,
    render_svg,
    scale_axes,
)
from beit3.report.runs import Run
from beit3.report.scores import PERCENT_ENDINGS

LABEL_HEIGHT = 0.085
"""Height of a label of 8 points as a fraction of the axes."""

MAX_POINTS = 600
"""Points drawn per line; more cannot be told apart at this size."""

MAX_RAW_RUNS = 2
"""Runs up to which logged values are drawn behind their mean; of more they hide one another."""

MIN_SHADED_PARTS = 3
"""Numbered parts of a network (`blocks.0`, ...) from which they share one shaded line style."""


class PartStyle(NamedTuple):
    """How the line of one part of a network looks, and whether its end is labeled."""

    color: str
    line_style: LineStyle
    is_labeled: bool


class LineEnd(NamedTuple):
    """The last point of a line, to be labeled with its name."""

    name: str
    color: str
    step: float
    value: float


# Runs -----------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[Run], chart: Chart) -> str:
    """Returns an SVG of one quantity of all runs over their steps.

    Lines are running means of training batches, rings are scores on held-out records.
    """
    figure, axes = make_figure(chart.title)
    lines: list[np.ndarray] = []
    ends: list[str] = []
    for index, run in enumerate(runs):
        color, line_style = get_run_style(index)
        steps, values = run.get_series(chart.training)
        is_trained = not chart.training or len(steps) > 0
        if len(steps):
            means = smooth(values, len(values) // 20)
            thin = slice(None, None, math.ceil(len(steps) / MAX_POINTS))
            if len(runs) <= MAX_RAW_RUNS:
                axes.plot(steps[thin], values[thin], color=color, alpha=0.4, linewidth=0.8)
            axes.plot(steps[thin], means[thin], color=color, linestyle=line_style, linewidth=1.8)
            lines.append(means)
            ends.append(f"{run.label} ends at {means[-1]:.3g}")
        held_out = _find_logged_name(run, chart.held_out) if is_trained else ""
        steps, values = run.get_series(held_out)
        if len(steps):
            width = 0.9 if chart.training else 1.8
            axes.plot(
                steps,
                values,
                color=color,
                linestyle=line_style,
                linewidth=width,
                marker="o",
                markersize=4,
                markerfacecolor="none",
            )
            lines.append(values)
            ends.append(f"{run.label} ends at {values[-1]:.3g} on held-out records")
    names = (chart.training, *chart.held_out)
    scale_axes(axes, lines, percent=any(name.endswith(PERCENT_ENDINGS) for name in names))
    return render_svg(figure, f"{chart.title} over steps: {', '.join(ends)}")


def _find_logged_name(run: Run, names: Sequence[str]) -> str:
    """Returns the first name of which the run has values, else ""."""
    return next((name for name in names if len(run.get_series(name)[0])), "")


def smooth(values: np.ndarray, radius: int) -> np.ndarray:
    """Returns the mean of each value [T] and its neighbors up to `radius` away on either side.

    Near the ends there are fewer neighbors.
    """
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    start = np.maximum(0, index - radius)
    end = np.minimum(len(values), index + radius + 1)
    return (sums[end] - sums[start]) / (end - start)


# Parts of one network -------------------------------------------------------------------------


def draw_part_curves(run: Run, prefix: str, title: str) -> str:
    """Returns an SVG of every `prefix/<part>` that a run logged, labeled at the ends of the lines.

    Of numbered parts (`blocks.0`, `blocks.1`, ...) the first and the last are labeled.
    """
    figure, axes = make_figure(title)
    all_series = {
        name.removeprefix(f"{prefix}/"): run.get_series(name)
        for name in run.list_names(f"{prefix}/")
    }
    logged = {part: series for part, series in all_series.items() if len(series[0])}
    styles = choose_part_styles(list(logged))
    ends = []
    for part, (steps, values) in logged.items():
        style = styles[part]
        means = smooth(values, len(values) // 20)
        thin = slice(None, None, math.ceil(len(steps) / MAX_POINTS))
        axes.plot(
            steps[thin],
            means[thin],
            color=style.color,
            linestyle=style.line_style,
            linewidth=1.3,
        )
        if style.is_labeled:
            ends.append(LineEnd(part, style.color, steps[-1], means[-1]))
    scale_axes(axes, [values[values > 0] for _, values in logged.values()])
    _label_ends(axes, ends)
    endings = ", ".join(f"{end.name} ends at {end.value:.3g}" for end in ends)
    return render_svg(figure, f"{title} over steps: {endings}")


def choose_part_styles(parts: Sequence[str]) -> dict[str, PartStyle]:
    """Returns the style of each part of a network.

    Three or more parts whose names differ by a number alone are shaded from blue to pink in their
    order; the others differ in color and dash.
    """
    rows: dict[str, list[str]] = {}
    for part in parts:
        rows.setdefault(re.sub(r"\d+", "#", part), []).append(part)
    styles: dict[str, PartStyle] = {}

    single_parts = [part for row in rows.values() if len(row) < MIN_SHADED_PARTS for part in row]
    colors = (PALETTE[1], PALETTE[3], INK)
    for index, part in enumerate(single_parts):
        styles[part] = PartStyle(colors[index % 3], get_line_style(index + 1), True)

    blue, pink = (np.array(to_rgb(color)) for color in (PALETTE[0], PALETTE[4]))
    shaded_rows = [row for row in rows.values() if len(row) >= MIN_SHADED_PARTS]
    for row_index, row in enumerate(shaded_rows):
        last = len(row) - 1
        for index, part in enumerate(row):
            color = to_hex(blue + (pink - blue) * index / last)
            styles[part] = PartStyle(color, get_line_style(row_index), index in (0, last))
    return styles


def _label_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Writes each line's name to the right of the axes, joined to its end by a stroke."""
    axes.autoscale_view()
    bottom = axes.get_ylim()[0]
    to_axes = axes.transScale + axes.transLimits
    # A logarithmic axis has no zero, so such an end lies at its bottom.
    points = [(end.step, max(end.value, bottom)) for end in ends]
    heights = [float(to_axes.transform(point)[1]) for point in points]
    label_heights = spread_positions(heights, LABEL_HEIGHT)
    for end, point, height in zip(ends, points, label_heights, strict=True):
        stroke = {
            "arrowstyle": "-",
            "relpos": (0, 0.5),
            "color": end.color,
            "linewidth": 0.9,
            "shrinkA": 1,
            "shrinkB": 0,
        }
        axes.annotate(
            end.name,
            xy=point,
            xytext=(1.06, height),
            textcoords="axes fraction",
            arrowprops=stroke,
            annotation_clip=False,
            fontsize=7,
            color=INK,
            va="center",
        )


def spread_positions(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions in [0, 1] until neighbors are at least `gap` apart; keeps their order.

    Each stays as near to where it was as that allows. Where there is no room for all gaps, the
    lowest positions fall below 0.
    """
    order = np.argsort(positions, kind="stable")
    spread = np.clip(np.asarray(positions, dtype=float), 0, 1)
    for lower, upper in zip(order, order[1:], strict=False):
        spread[upper] = max(spread[upper], spread[lower] + gap)
    limit = 1.0
    for index in order[::-1]:
        spread[index] = min(spread[index], limit)
        limit = spread[index] - gap
    return spread.tolist()
