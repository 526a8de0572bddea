"""The table and the plot of a study's values: row -> measure -> a value for each seed."""

import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

from beit3.demo.tables import format_spread
from beit3.report.plots import FIGURE_INCHES, INK, get_run_style, make_figure, render_svg

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Row -> measure -> its value for each seed."""

CELL = (420, 270)
"""Width and height of one panel of the plot in pixels."""
NUM_COLUMNS = 2
TITLE_WIDTH = 40
"""Characters of a line of a panel's title."""

TUNING = re.compile(r"(?P<score>.+), (?P<labels>\d+|all) labels, (?P<steps>\d+) steps")
"""The name of a measure that is a fine-tuning."""


# Table --------------------------------------------------------------------------------------------


def make_table(values: Values, *, rows_are_columns: bool = False) -> str:
    """Returns a Markdown table: means over the seeds, with minimum and maximum in parentheses."""
    measures = list_measures(values)
    header, lines = (
        ["", *measures],
        [
            [row, *(format_values(scores.get(name, ()), name) for name in measures)]
            for row, scores in values.items()
        ],
    )
    if rows_are_columns:
        header, *lines = [list(line) for line in zip(header, *lines, strict=True)]
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def list_measures(values: Values) -> list[str]:
    """Returns the names of all measures in the order in which they appear."""
    return list(dict.fromkeys(name for scores in values.values() for name in scores))


def format_values(values: Sequence[float], measure: str) -> str:
    """Returns the mean and the spread; of a single seed its value, of none an empty string."""
    form = get_format(measure)
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return format_spread(values, form)


def get_format(measure: str) -> str:
    """Returns the format of a measure: CIDEr is a number, all others are fractions."""
    return ".2f" if "cider" in measure else ".1%"


# Plot ---------------------------------------------------------------------------------------------


def draw_results(values: Values) -> str:
    """Returns an SVG of all measures.

    A fine-tuning of several lengths, or of several numbers of labels, becomes a panel of curves;
    any other measure a panel with a line for each row, a ring for each seed and a stroke at the
    mean.
    """
    measures = list_measures(values)
    curves = group_curves(measures)
    in_curves = {name for points in curves.values() for _, name in points}
    panels = [draw_rings(values, name) for name in measures if name not in in_curves]
    panels += [draw_curve(values, title, points) for title, points in curves.items()]
    return arrange(panels)


def group_curves(measures: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns title -> (steps or labels, measure) of fine-tunings that differ in that alone."""
    curves: dict[str, list[tuple[str, str]]] = {}
    for name in measures:
        if match := TUNING.fullmatch(name):
            score, steps, labels = match["score"], match["steps"], match["labels"]
            curves.setdefault(f"{score} over steps, {labels} labels", []).append((steps, name))
            curves.setdefault(f"{score} over labels, {steps} steps", []).append((labels, name))
    return {title: sorted(points, key=order) for title, points in curves.items() if points[1:]}


def order(point: tuple[str, str]) -> float:
    """Returns the place of a point among others: "all" labels come last."""
    return float("inf") if point[0] == "all" else float(point[0])


def draw_curve(values: Values, title: str, points: Sequence[tuple[str, str]]) -> str:
    """Returns an SVG of each row's mean over steps or labels, with the range of the seeds.

    The points are equally far apart.
    """
    figure, axes = make_figure(textwrap.fill(title, TITLE_WIDTH))
    texts = []
    for index, (row, scores) in enumerate(values.items()):
        color, line_style = get_run_style(index)
        drawn = [(x, scores[name]) for x, (_, name) in enumerate(points) if name in scores]
        if not drawn:
            continue
        xs = [x for x, _ in drawn]
        means = [statistics.mean(seeds) for _, seeds in drawn]
        axes.plot(xs, means, color=color, linestyle=line_style, marker="o", label=row)
        axes.vlines(xs, [min(y) for _, y in drawn], [max(y) for _, y in drawn], color=color)
        texts.append(f"{row} ends at {means[-1]:.3g}")
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    axes.set_xticks(range(len(points)), [label for label, _ in points])
    axes.set_xlabel("labels" if " over labels, " in title else "steps")
    format_axis(axes.yaxis.set_major_formatter, title)
    return render_svg(figure, f"{title}: {', '.join(texts)}")


def draw_rings(values: Values, measure: str) -> str:
    """Returns an SVG of one measure with a line for each row that has it."""
    figure, axes = make_figure(textwrap.fill(measure, TITLE_WIDTH))
    rows = [(row, scores[measure]) for row, scores in values.items() if measure in scores]
    figure.set_size_inches(FIGURE_INCHES[0], max(FIGURE_INCHES[1], 0.6 + 0.22 * len(rows)))
    for index, (_, seeds) in enumerate(rows):
        axes.plot(seeds, [index] * len(seeds), "o", color=get_run_style(0)[0], fillstyle="none")
        axes.vlines(statistics.mean(seeds), index - 0.3, index + 0.3, color=INK)
    axes.set_yticks(range(len(rows)), [row for row, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    format_axis(axes.xaxis.set_major_formatter, measure)
    texts = [f"{row} {statistics.mean(seeds):.3g}" for row, seeds in rows]
    return render_svg(figure, f"{measure}: {', '.join(texts)}")


def format_axis(set_formatter: Callable, measure: str) -> None:
    """Labels an axis in percent, or in plain numbers for CIDEr."""
    form = get_format(measure)
    set_formatter(lambda value, _: f"{value:{form}}")


def arrange(panels: Sequence[str]) -> str:
    """Returns one SVG file with the panels in rows, on white."""
    width, height = CELL
    parts = []
    for index, panel in enumerate(panels):
        x, y = index % NUM_COLUMNS * width, index // NUM_COLUMNS * height
        place = f'<svg x="{x}" y="{y}" width="{width - 10}" height="{height - 10}" '
        parts.append(panel.replace("<svg ", place, 1))
    num_rows = -(-len(panels) // NUM_COLUMNS)
    size = f"0 0 {NUM_COLUMNS * width} {max(1, num_rows) * height}"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" color="black">'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([opening, background, *parts, "</svg>"]) + "\n"
