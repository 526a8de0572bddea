"""Runs as they lie on disk, and pictures of their numbers: loss curves and codebook usage as inline SVG.

Across the border: run directory -> Run; numbers -> str, one `<svg>` element without ids of ours, scripts or links. Text
and axes take the page's own colour, so that one picture serves light and dark pages.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from beit3 import task as tasks

PALETTE = ("#2f7fd0", "#e06c1f", "#7a5cd6", "#149a7a", "#c9417f")
"""One per run of a task; each has a contrast of at least 3 on the light and on the dark page."""

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""

INCHES = (3.5, 2.2)
"""Small on purpose: on a phone 350 pixels wide the 8-point text comes out at 11 pixels."""

MAX_POINTS = 600
"""Points drawn per line; more cannot be told apart at this size."""

LOG_FROM = 10.0
"""Largest over smallest smoothed value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Run:
    """A run directory, read. `metrics`: the lines of metrics.jsonl; `scores` is empty before the first evaluation."""

    path: Path
    label: str
    task: str
    init: str
    recipe: dict[str, Any]
    metrics: list[dict[str, float]]
    scores: dict[str, float]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [T], values [T]) of one logged name; values that are not finite are left out."""
        found = [(line["step"], line[key]) for line in self.metrics if math.isfinite(line.get(key, math.nan))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs labelled by their directory's name, and by its parent's too where names repeat; ValueError for no run."""
    paths = [Path(path).resolve() for path in paths]
    names = [path.name for path in paths]
    labels = [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    return [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _read_run(path: Path, label: str) -> Run:
    recipe = _json(path / "recipe.json")
    if not isinstance(recipe, dict) or not {"task", "recipe"} <= recipe.keys():
        raise ValueError(f"{path} holds no run (recipe.json with task and recipe): give one that beit3 train wrote")
    scores = _json(path / "scores.json") or {}
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    # The last line of a run that is still going may be half written.
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return Run(path, label, recipe["task"], recipe.get("init", ""), recipe["recipe"], whole, scores)


def _json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it and run the training again") from None


def loss_curves(runs: Sequence[Run]) -> list[str]:
    """One SVG per objective, accuracy and headline score that any of these runs of one task has logged."""
    return [curve(runs, key) for key in curve_keys(runs)]


def curve_keys(runs: Sequence[Run]) -> list[str]:
    """Logged names worth a picture: losses, then accuracies, then the held-out headline where it was taken twice."""
    logged = list(dict.fromkeys(key for run in runs for line in run.metrics for key in line))
    accuracies = [key for key in logged if key.rpartition("/")[2] == "accuracy" and not key.startswith("val/")]
    losses = [key for key in logged if key.startswith("loss/")]
    held_out = [f"val/{headline(runs[0].task)}"] if runs else []
    held_out = [key for key in held_out if any(len(run.series(key)[0]) > 1 for run in runs)]
    return (losses or [key for key in logged if key == "loss"]) + accuracies + held_out


def headline(task: str) -> str:
    """The score that a task's best weights are chosen by; empty for a task that is not installed here."""
    try:
        return tasks.load(task).headline
    except (ImportError, ValueError):
        return ""


def curve_title(key: str) -> str:
    """'loss/pair_text' -> 'pair text: loss'."""
    kind, _, name = key.partition("/")
    if kind == "val":
        return f"held-out {name.replace('_', ' ')}"
    if name == "accuracy" or kind == "accuracy":
        return f"{kind.replace('_', ' ')}: accuracy" if name else "accuracy"
    return "loss" if name in ("", "loss") else f"{name.replace('_', ' ')}: loss"


def curve(runs: Sequence[Run], key: str) -> str:
    """The smoothed course of one logged name over faint raw values, one colour per run, overlaid."""
    figure, axes = _axes(curve_title(key))
    drawn: dict[str, np.ndarray] = {}
    for color, run in zip(_cycle(len(runs)), runs, strict=True):
        steps, values = run.series(key)
        if not len(steps):
            continue
        # Scores of a whole split need no smoothing; logged batches are averaged over a tenth of the run.
        smoothed = values if key.startswith("val/") else smooth(values, len(values) // 20)
        stride = math.ceil(len(steps) / MAX_POINTS)
        axes.plot(steps[::stride], values[::stride], color=color, alpha=0.4, linewidth=0.8)
        axes.plot(steps[::stride], smoothed[::stride], color=color, linewidth=1.8)
        axes.plot(steps[-1:], smoothed[-1:], color=color, marker="o", markersize=3.5)
        drawn[run.label] = smoothed
    if key.rpartition("/")[2] == "accuracy":
        axes.set_ylim(0, max(0.01, min(1.0, 1.15 * max((values.max() for values in drawn.values()), default=1.0))))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif spans_decades(drawn.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("step")
    ends = ", ".join(f"{label} ends at {values[-1]:.3g}" for label, values in drawn.items())
    return _svg(figure, f"{curve_title(key)} over steps: {ends}")


def spans_decades(lines: Iterable[np.ndarray]) -> bool:
    """Whether positive lines differ by more than `LOG_FROM` between their lowest and highest point."""
    values = np.concatenate([np.empty(0), *lines])
    return bool(len(values) and values.min() > 0 and values.max() > LOG_FROM * values.min())


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value [T] and its neighbours up to `reach` away on either side, as far as there are any."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    place = np.arange(len(values))
    first, last = np.maximum(0, place - reach), np.minimum(len(values), place + reach + 1)
    return (total[last] - total[first]) / (last - first)


def usage_figures(counts: np.ndarray) -> tuple[float, float]:
    """(share of codes in use, perplexity) of how often each code [K] was given; (0, 0) for none at all."""
    if not counts.sum():
        return 0.0, 0.0
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / len(counts), float(np.exp(-(shares * np.log(shares)).sum()))


def usage_bars(counts: np.ndarray) -> str:
    """SVG of the counts [K], commonest code first, beside the level that even use would give."""
    figure, axes = _axes("patches given each code")
    axes.stairs(np.sort(counts)[::-1], fill=True, color=PALETTE[0], alpha=0.85)
    axes.axhline(counts.mean(), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(len(counts), counts.mean(), "even use ", ha="right", va="bottom", fontsize=8, color=INK)
    axes.set_xlim(0, len(counts))
    axes.set_xlabel("codes, commonest first")
    share, perplexity = usage_figures(counts)
    return _svg(figure, f"patches per code; {share:.0%} of {len(counts)} codes are used, perplexity {perplexity:.1f}")


def _cycle(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=INCHES, layout="constrained")
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


def _svg(figure: Figure, description: str) -> str:
    """The figure as one element, its text as text, in the page's colour."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "beit3"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    attributes, _, rest = text.partition(">")
    view = attributes[attributes.index("viewBox=") :].split('"')[1]
    opening = f'<svg viewBox="{view}" role="img" aria-label="{escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\n\s*", "\n", opening + rest)
