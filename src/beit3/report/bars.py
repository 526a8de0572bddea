"""Draws codebook usage and scores by class as bars, as inline SVG."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FixedLocator, PercentFormatter

from beit3.report.plots import (
    FIGURE_INCHES,
    INK,
    PALETTE,
    get_run_style,
    make_figure,
    render_svg,
)

MAX_BARS = 40
"""Classes in one chart of bars."""

BAR_INCHES = 0.17
"""Height of one class in a chart of bars of one run."""

ClassScores = tuple[str, Sequence[float]]
"""A class name, and the score of that class in each run as a fraction."""


def compute_usage(counts: np.ndarray) -> tuple[float, float]:
    """Returns the fraction of codes in use and the perplexity of the codes.

    `counts` [K] says how often each code was given. Both results are 0 if none was given.
    """
    if not counts.sum():
        return 0.0, 0.0
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    return len(frequencies) / len(counts), float(np.exp(entropy))


def draw_usage_bars(counts: np.ndarray) -> str:
    """Returns an SVG of how often each code was given, from the most to the least frequent.

    `counts` has shape [K]. A dashed line shows the count that even use would give.
    """
    figure, axes = make_figure("patches given each code")
    mean = counts.mean()
    axes.stairs(np.sort(counts)[::-1], fill=True, color=PALETTE[0], alpha=0.85)
    axes.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(len(counts), mean, "even use ", ha="right", va="bottom", fontsize=8, color=INK)
    axes.set_xlim(0, len(counts))
    axes.set_xlabel("codes, most frequent first")
    used_fraction, perplexity = compute_usage(counts)
    return render_svg(
        figure,
        f"patches per code; {used_fraction:.0%} of {len(counts)} codes are used, perplexity "
        f"{perplexity:.1f}",
    )


def draw_class_bars(title: str, rows: Sequence[ClassScores], runs: Sequence[str]) -> list[str]:
    """Returns SVGs of scores by class, sorted from the largest score of the first run down.

    Args:
        title: Title of every SVG.
        rows: Name and scores of each class, one score per run, from 0 to 1.
        runs: Labels of the runs.

    Returns:
        One SVG for every `MAX_BARS` classes.
    """
    ordered = sorted(rows, key=lambda row: -row[1][0])
    return [
        _draw_bars(title, ordered[start : start + MAX_BARS], runs)
        for start in range(0, len(ordered), MAX_BARS)
    ]


def _draw_bars(title: str, rows: Sequence[ClassScores], runs: Sequence[str]) -> str:
    """Draws class names to the left, a bar per run, and its value at the bar's end."""
    figure, axes = make_figure(title)
    bar_height = 0.8 / len(runs)
    rows_inches = BAR_INCHES * len(rows) * max(1.0, 0.6 * len(runs))
    figure.set_size_inches(FIGURE_INCHES[0], 0.55 + rows_inches)
    for index in range(len(runs)):
        centers = np.arange(len(rows)) + (index - (len(runs) - 1) / 2) * bar_height
        scores = [scores[index] for _, scores in rows]
        axes.barh(centers, scores, height=0.9 * bar_height, color=get_run_style(index)[0])
        for center, score in zip(centers, scores, strict=True):
            axes.text(score + 0.015, center, f"{score:.0%}", va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_locator(FixedLocator((0, 0.25, 0.5, 0.75, 1)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    of_runs = f" in {' and '.join(runs)}" if len(runs) > 1 else ""
    class_texts = [
        f"{name} {' and '.join(f'{score:.0%}' for score in scores)}" for name, scores in rows
    ]
    return render_svg(figure, f"{title}{of_runs}: {', '.join(class_texts)}")
