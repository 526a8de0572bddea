"""Pictures of a run's numbers: curves of one or several runs, of the parts of one network, and
codebook usage, as inline SVG.

Shapes: runs and numbers -> str, one `<svg>` element without ids of ours, scripts or links. Text and
axes take
the page's own colour, so that one picture serves light and dark pages. Runs differ in colour and in
dash.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from beit3 import task as tasks
from beit3.metrics.detection import COCO_METRICS
from beit3.report.runs import Run

PALETTE = ("#2f7fd0", "#e06c1f", "#7a5cd6", "#149a7a", "#c9417f")
"""Each has a contrast of at least 3 on the light and on the dark page."""

DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1.2), (6, 1.5, 1, 1.5))
"""On and off in line widths; four beside five colours: twenty runs look different."""

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""

INCHES = (3.5, 2.2)
"""Small on purpose: on a phone 350 pixels wide the 8-point text comes out at 11 pixels."""

LABEL = 0.085
"""Height of a label of 8 points, as a share of the axes."""

MAX_POINTS = 600
"""Points drawn per line; more cannot be told apart at this size."""

MAX_RAW = 2
"""Runs up to which logged values are drawn behind their mean; of more they hide each other."""

LOG_FROM = 10.0
"""Largest over smallest smoothed value from which an axis is logarithmic."""

POWERS_FROM = 300.0
"""The same, from which it is marked at powers of ten alone."""

MOVED = 1e-6
"""By how much a score must have changed to be drawn: BLEU-4 is some 1e-10 while no phrase is
right."""

MAX_BARS, BAR = 40, 0.17
"""Classes in a chart of bars; inches that one of them takes."""

NATS = ("pretrain", "vqa", "nlvr2", "captioning", "retrieval", "imagenet")
"""Tasks whose losses are cross-entropies."""

DETECTION_SCORES = {
    f"{kind}_{name}": f"{kind} {name[:2].upper()}{name[2:].replace('_', ' ')}"
    for kind in ("box", "mask")
    for name in COCO_METRICS
}
"""How COCO's figures are written: 'box AP50', 'mask AR small'; -1 stands for one that is not
defined."""

TABLED = tuple(name for name in DETECTION_SCORES if not name.endswith(("_ap", "_ap50")))
"""Scores that a table of their own shows, and that would hide the others elsewhere."""

RATES = (
    "accuracy",
    "consistency",
    "official",
    "top5",
    "recall",
    "@1",
    "@5",
    "@10",
    "miou",
    "aacc",
    "macc",
    *DETECTION_SCORES,
)
"""Ends of names whose values are shares of what is right."""

SHARES = (*RATES, "codebook_use", "most_frequent")
"""Ends of names whose values are shares, shown in per cent."""

CAPTION_SCORES = {
    **{f"bleu{order}": f"BLEU-{order}" for order in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "cider_d": "CIDEr-D",
    "cider_unclipped": "CIDEr unclipped",
    "meteor": "METEOR",
    "spice": "SPICE",
}
"""How captions' scores are written; plain numbers, of which papers print the hundredfold."""

SPELLED = {
    **CAPTION_SCORES,
    **DETECTION_SCORES,
    "top5": "top-5 accuracy",
    "official": "official accuracy",
    "miou": "mIoU",
    "aacc": "aAcc",
    "macc": "mAcc",
    "rpn_objectness": "proposals, object or not",
    "rpn_box": "proposals, box",
    **{
        f"box{stage}_{part}": f"stage {stage + 1}, {part}"
        for stage in range(3)
        for part in ("class", "box")
    },
}
"""Scores and losses whose names do not read by themselves."""


@dataclass(frozen=True)
class Chart:
    """What one picture shows: a logged name of training batches, names of the same quantity on
    held-out records, or both.

    A run is drawn with the first of `held_out` that it has logged, and only if it trained on the
    quantity.
    """

    title: str
    training: str = ""
    held_out: tuple[str, ...] = ()


def run_class(index: int) -> str:
    """The class of everything on the page that names run `index`: its colour and dash."""
    return f"run{index % (len(PALETTE) * len(DASHES))}"


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Quantities of these runs of one task worth a picture: losses, accuracies, then scores that
    were taken twice and moved."""
    logged = list(dict.fromkeys(key for run in runs for key in run.names()))
    losses = [key for key in logged if key.startswith("loss/")] or [
        key for key in logged if key == "loss"
    ]
    accuracies = [
        key for key in logged if key.rpartition("/")[2] == "accuracy" and not key.startswith("val/")
    ]
    found = [
        Chart(chart_title(key, runs[0].task), key, held_out_names(key))
        for key in losses + accuracies
    ]
    paired = {name for chart in found for name in chart.held_out}
    scores = [
        key
        for key in logged
        if key.startswith("val/") and key.count("/") == 1 and key not in paired
    ]
    scores.sort(key=lambda key: key != f"val/{headline(runs[0].task)}")
    moved = [
        key
        for key in scores
        if any(
            values.size and np.ptp(values) > MOVED
            for _, values in (run.series(key) for run in runs)
        )
    ]
    return found + [Chart(chart_title(key, runs[0].task), held_out=(key,)) for key in moved]


def held_out_names(key: str) -> tuple[str, ...]:
    """Names under which the quantity of a logged name is scored on held-out records, the closest
    first.

    'accuracy' -> 'val/accuracy'; 'loss/pair_text' -> 'val/pairs/text_loss' where there are several
    sources, else 'val/text_loss'.
    """
    kind, _, name = key.partition("/")
    what = "accuracy" if "accuracy" in (kind, name) else "loss"
    part = {"accuracy": kind, "loss": ""}.get(name, name) if name else ""
    if not part:
        return (f"val/{what}",)
    modality = part.removeprefix("pair_")
    source = f"{part}s" if modality == part else "pairs"
    return f"val/{source}/{modality}_{what}", f"val/{modality}_{what}"


def headline(task: str) -> str:
    """The score that a task's best weights are chosen by; empty for a task that is not installed
    here."""
    try:
        return tasks.load_task(task).headline
    except (ImportError, ValueError):
        return ""


def chart_title(key: str, task: str = "") -> str:
    """'loss/pair_text' -> 'pair text: loss (nats)'."""
    kind, _, name = key.partition("/")
    if kind == "val":
        return f"held-out {spelled(name)}{unit(name, task)}"
    if name == "accuracy" or kind == "accuracy":
        return f"{kind.replace('_', ' ')}: accuracy" if name else "accuracy"
    return ("loss" if name in ("", "loss") else f"{spelled(name)}: loss") + unit("loss", task)


def spelled(name: str) -> str:
    """A score's name to read: 'text_loss' -> 'text loss', 'cider' -> 'CIDEr'."""
    return SPELLED.get(name, name.replace("_", " "))


def unit(name: str, task: str) -> str:
    """' (nats)' behind the name of a cross-entropy, ' (codes)' behind a perplexity of codes, else
    nothing."""
    last = name.rpartition("/")[2]
    if last == "perplexity":
        return " (codes)"
    return " (nats)" if last.endswith("loss") and task in NATS else ""


def curve(runs: Sequence[Run], chart: Chart) -> str:
    """One quantity of all runs, overlaid: the smoothed course of training, rings where held-out
    records were scored."""
    figure, axes = _axes(chart.title)
    drawn: list[np.ndarray] = []
    ends: list[str] = []
    for index, run in enumerate(runs):
        color, dash = _look(index)
        steps, values = run.series(chart.training)
        if len(steps):
            # Logged batches are averaged over a tenth of the run; scores of a whole split need no
            # smoothing.
            smoothed, stride = smooth(values, len(values) // 20), math.ceil(len(steps) / MAX_POINTS)
            if len(runs) <= MAX_RAW:
                axes.plot(steps[::stride], values[::stride], color=color, alpha=0.4, linewidth=0.8)
            axes.plot(
                steps[::stride], smoothed[::stride], color=color, linestyle=dash, linewidth=1.8
            )
            drawn.append(smoothed)
            ends.append(f"{run.label} ends at {smoothed[-1]:.3g}")
        trained = not chart.training or len(steps) > 0
        steps, values = run.series(
            next((name for name in chart.held_out if trained and len(run.series(name)[0])), "")
        )
        if len(steps):
            width = 0.9 if chart.training else 1.8
            axes.plot(
                steps,
                values,
                color=color,
                linestyle=dash,
                linewidth=width,
                marker="o",
                markersize=4,
                markerfacecolor="none",
            )
            drawn.append(values)
            ends.append(f"{run.label} ends at {values[-1]:.3g} on held-out records")
    _scale(
        axes, drawn, share=any(name.endswith(SHARES) for name in (chart.training, *chart.held_out))
    )
    return _svg(figure, f"{chart.title} over steps: {', '.join(ends)}")


def part_curve(run: Run, prefix: str, title: str) -> str:
    """Every `prefix/<part>` of one run, named at its end; of a numbered row (`blocks.0`, ...) the
    first and the last are named."""
    figure, axes = _axes(title)
    lines = {name.removeprefix(f"{prefix}/"): run.series(name) for name in run.names(f"{prefix}/")}
    lines = {part: series for part, series in lines.items() if len(series[0])}
    looks, ends = part_looks(list(lines)), []
    for part, (steps, values) in lines.items():
        color, dash, is_named = looks[part]
        smoothed, stride = smooth(values, len(values) // 20), math.ceil(len(steps) / MAX_POINTS)
        axes.plot(steps[::stride], smoothed[::stride], color=color, linestyle=dash, linewidth=1.3)
        if is_named:
            ends.append((part, color, steps[-1], smoothed[-1]))
    _scale(axes, [smoothed[smoothed > 0] for smoothed in (values for _, values in lines.values())])
    _name_ends(axes, ends)
    last = ", ".join(f"{part} ends at {value:.3g}" for part, _, _, value in ends)
    return _svg(figure, f"{title} over steps: {last}")


def part_looks(parts: Sequence[str]) -> dict[str, tuple[str, tuple, bool]]:
    """(colour, line style, whether it is named) of each part: rows of three or more shade from blue
    to pink with their number."""
    rows: dict[str, list[str]] = {}
    for part in parts:
        rows.setdefault(re.sub(r"\d+", "#", part), []).append(part)
    looks: dict[str, tuple[str, tuple, bool]] = {}
    for index, part in enumerate(part for row in rows.values() if len(row) < 3 for part in row):
        looks[part] = (
            (PALETTE[1], PALETTE[3], INK)[index % 3],
            _dash((index + 1) % len(DASHES)),
            True,
        )
    for index, row in enumerate(row for row in rows.values() if len(row) > 2):
        first, last = (np.array(to_rgb(color)) for color in (PALETTE[0], PALETTE[4]))
        for place, part in enumerate(row):
            color = to_hex(first + (last - first) * place / (len(row) - 1))
            looks[part] = (color, _dash(index % len(DASHES)), place in (0, len(row) - 1))
    return looks


def moved_apart(places: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] with at least `gap` between them, in their order and near where they were,
    as far as there is room."""
    order = np.argsort(places, kind="stable")
    moved = np.clip(np.asarray(places, dtype=float), 0, 1)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = 1.0
    for place in order[::-1]:
        moved[place] = min(moved[place], limit)
        limit = moved[place] - gap
    return moved.tolist()


def spans_decades(lines: Iterable[np.ndarray], ratio: float = LOG_FROM) -> bool:
    """Whether positive lines differ by more than `ratio` between their lowest and highest point."""
    values = np.concatenate([np.empty(0), *lines])
    return bool(len(values) and values.min() > 0 and values.max() > ratio * values.min())


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value [T] and its neighbours up to `reach` away on either side, as far as there
    are any."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    place = np.arange(len(values))
    first, last = np.maximum(0, place - reach), np.minimum(len(values), place + reach + 1)
    return (total[last] - total[first]) / (last - first)


def usage_figures(counts: np.ndarray) -> tuple[float, float]:
    """(share of codes in use, perplexity) of how often each code [K] was given; (0, 0) for none at
    all."""
    if not counts.sum():
        return 0.0, 0.0
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / len(counts), float(np.exp(-(shares * np.log(shares)).sum()))


def usage_bars(counts: np.ndarray) -> str:
    """SVG of the counts [K], commonest code first, beside the level that even use would give."""
    figure, axes = _axes("patches given each code")
    axes.stairs(np.sort(counts)[::-1], fill=True, color=PALETTE[0], alpha=0.85)
    axes.axhline(counts.mean(), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.text(
        len(counts), counts.mean(), "even use ", ha="right", va="bottom", fontsize=8, color=INK
    )
    axes.set_xlim(0, len(counts))
    axes.set_xlabel("codes, commonest first")
    share, perplexity = usage_figures(counts)
    return _svg(
        figure,
        f"patches per code; {share:.0%} of {len(counts)} codes are used, perplexity "
        f"{perplexity:.1f}",
    )


def class_bars(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], runs: Sequence[str]
) -> list[str]:
    """SVGs of shares by class, (name, one of each run), those of the first run from the largest
    down, `MAX_BARS` classes in each."""
    ordered = sorted(rows, key=lambda row: -row[1][0])
    return [
        _bars(title, ordered[start : start + MAX_BARS], runs)
        for start in range(0, len(ordered), MAX_BARS)
    ]


def _bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], runs: Sequence[str]) -> str:
    """One chart of `class_bars`: names to the left, a bar of each run, its value at its end."""
    figure, axes = _axes(title)
    thick = 0.8 / len(runs)
    figure.set_size_inches(INCHES[0], 0.55 + BAR * len(rows) * max(1.0, 0.6 * len(runs)))
    for index in range(len(runs)):
        places = np.arange(len(rows)) + (index - (len(runs) - 1) / 2) * thick
        values = [row[1][index] for row in rows]
        axes.barh(places, values, height=0.9 * thick, color=_look(index)[0])
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.015, place, f"{value:.0%}", va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_locator(FixedLocator((0, 0.25, 0.5, 0.75, 1)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="y")
    said = (f"{name} {' and '.join(f'{value:.0%}' for value in values)}" for name, values in rows)
    where = f" in {' and '.join(runs)}" if len(runs) > 1 else ""
    return _svg(figure, f"{title}{where}: {', '.join(said)}")


def _look(index: int) -> tuple[str, tuple]:
    return PALETTE[index % len(PALETTE)], _dash(index % len(DASHES))


def _dash(index: int) -> tuple[float, tuple[float, ...] | None]:
    return (0, DASHES[index] or None)


def _scale(axes: Axes, lines: Sequence[np.ndarray], *, share: bool = False) -> None:
    """The vertical axis: per cent of shares, logarithmic over more than a decade, else plain."""
    if share:
        # Above 1 there is room for a ring at 100 %.
        axes.set_ylim(
            0, max(0.01, min(1.04, 1.15 * max((values.max() for values in lines), default=1.0)))
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif spans_decades(lines):
        axes.set_yscale("log", nonpositive="mask")
        subs = (1.0,) if spans_decades(lines, POWERS_FROM) else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("step")


def _name_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """(name, colour, step, value) of each line's end, written to the right of the axes and joined
    to the line."""
    axes.autoscale_view()
    bottom, inside = axes.get_ylim()[0], axes.transScale + axes.transLimits
    ends = [
        (name, color, step, max(value, bottom)) for name, color, step, value in ends
    ]  # a logarithmic axis has no zero
    heights = [float(inside.transform((step, value))[1]) for _, _, step, value in ends]
    for (name, color, step, value), height in zip(ends, moved_apart(heights, LABEL), strict=True):
        line = {
            "arrowstyle": "-",
            "relpos": (0, 0.5),
            "color": color,
            "linewidth": 0.9,
            "shrinkA": 1,
            "shrinkB": 0,
        }
        axes.annotate(
            name,
            xy=(step, value),
            xytext=(1.06, height),
            textcoords="axes fraction",
            arrowprops=line,
            annotation_clip=False,
            fontsize=7,
            color=INK,
            va="center",
        )


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
