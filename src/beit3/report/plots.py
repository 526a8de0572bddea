"""Small matplotlib figures as inline SVG, and the color and dash of each run.

An SVG is one `<svg>` element without scripts or links. Its text and axes take the page's text
color, so that it serves light and dark pages. Runs differ in color and in dash.
"""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

PALETTE = ("#2f7fd0", "#e06c1f", "#7a5cd6", "#149a7a", "#c9417f")
"""Colors of runs. Each has a contrast of at least 3 on the light and on the dark page."""

DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1.2), (6, 1.5, 1, 1.5))
"""Lengths on and off in line widths. Four beside five colors: twenty runs look different."""

INK = "#010203"
"""Stands for the page's text color until the SVG is written."""

FIGURE_INCHES = (3.5, 2.2)
"""Small on purpose: on a phone 350 pixels wide, text of 8 points comes out 11 pixels high."""

LOG_RATIO = 10.0
"""Ratio of the largest to the smallest smoothed value from which an axis is logarithmic."""

POWERS_ONLY_RATIO = 300.0
"""The same ratio from which a logarithmic axis has ticks at powers of ten alone."""

LineStyle = tuple[float, tuple[float, ...] | None]
"""A dash as matplotlib takes it: an offset, and lengths on and off or None for a solid line."""


def get_run_class(index: int) -> str:
    """Returns the CSS class of all that names run `index` on the page: its color and dash."""
    return f"run{index % (len(PALETTE) * len(DASHES))}"


def get_run_style(index: int) -> tuple[str, LineStyle]:
    """Returns the color and line style of run `index`."""
    return PALETTE[index % len(PALETTE)], get_line_style(index)


def get_line_style(index: int) -> LineStyle:
    """Returns the line style of number `index`; the styles repeat."""
    return 0, DASHES[index % len(DASHES)] or None


def make_figure(title: str) -> tuple[Figure, Axes]:
    """Returns an empty figure and its axes."""
    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=2.5)
    axes.xaxis.label.set(size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(color=INK, alpha=0.4, visible=side in ("left", "bottom"))
    return figure, axes


def scale_axes(axes: Axes, lines: Sequence[np.ndarray], *, percent: bool = False) -> None:
    """Labels the horizontal axis "step" and scales the vertical one to the values of `lines`.

    The vertical axis is in percent if `percent`, logarithmic if the values span more than a decade,
    else linear.
    """
    if percent:
        largest = max((values.max() for values in lines), default=1.0)
        # Above 1 there is room for a ring at 100 %.
        axes.set_ylim(0, max(0.01, min(1.04, 1.15 * largest)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif spans_decades(lines):
        axes.set_yscale("log", nonpositive="mask")
        multiples = (1.0,) if spans_decades(lines, POWERS_ONLY_RATIO) else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=multiples, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("step")


def spans_decades(lines: Iterable[np.ndarray], ratio: float = LOG_RATIO) -> bool:
    """Returns whether values are positive and the largest exceeds `ratio` times the smallest."""
    values = np.concatenate([np.empty(0), *lines])
    return bool(len(values) and values.min() > 0 and values.max() > ratio * values.min())


def render_svg(figure: Figure, description: str) -> str:
    """Returns the figure as one `<svg>` element with its text as text, in the page's color.

    `description` is what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "beit3"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    attributes, _, content = svg.partition(">")
    view_box = attributes[attributes.index("viewBox=") :].split('"')[1]
    opening = (
        f'<svg viewBox="{view_box}" role="img" aria-label="{escape(description)}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"\n\s*", "\n", opening + content)
