"""Chooses which logged quantities of the runs of one task get a chart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beit3.report.runs import Run
from beit3.report.scores import format_score_name, format_unit, get_headline

MIN_CHANGE = 1e-6
"""A score that changed by less gets no chart: BLEU-4 is some 1e-10 while no phrase is right."""


@dataclass(frozen=True)
class Chart:
    """The quantity that one chart shows.

    `training` is its logged name on training batches, or empty. `held_out` are its names on
    held-out records; a run is drawn with the first of them that it logged, and only if it trained
    on the quantity.
    """

    title: str
    training: str = ""
    held_out: tuple[str, ...] = ()


def choose_charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns the charts of runs of one task.

    Losses and accuracies come first, then the other scores that were taken twice and changed; of
    these the headline metric leads.
    """
    task = runs[0].task
    names = list(dict.fromkeys(name for run in runs for name in run.list_names()))
    charts = [
        Chart(format_chart_title(name, task), name, list_held_out_names(name))
        for name in [*_select_losses(names), *_select_accuracies(names)]
    ]
    charted = {name for chart in charts for name in chart.held_out}
    scores = [name for name in _select_scores(names, task) if name not in charted]
    charts += [
        Chart(format_chart_title(name, task), held_out=(name,))
        for name in scores
        if any(_has_changed(run, name) for run in runs)
    ]
    return charts


def _select_losses(names: Sequence[str]) -> list[str]:
    """Returns the parts of the loss, or the loss itself where no parts were logged."""
    parts = [name for name in names if name.startswith("loss/")]
    return parts or [name for name in names if name == "loss"]


def _select_accuracies(names: Sequence[str]) -> list[str]:
    """Returns the names of accuracies on training batches."""
    return [
        name
        for name in names
        if name.rpartition("/")[2] == "accuracy" and not name.startswith("val/")
    ]


def _select_scores(names: Sequence[str], task: str) -> list[str]:
    """Returns the names of held-out scores over all sources, the headline metric first."""
    headline = f"val/{get_headline(task)}"
    scores = [name for name in names if name.startswith("val/") and name.count("/") == 1]
    return sorted(scores, key=lambda name: name != headline)


def _has_changed(run: Run, name: str) -> bool:
    """Returns whether the logged values of a name differ by more than `MIN_CHANGE`."""
    values = run.get_series(name)[1]
    return bool(values.size and np.ptp(values) > MIN_CHANGE)


def list_held_out_names(name: str) -> tuple[str, ...]:
    """Returns the names under which a training quantity is scored on held-out records.

    "accuracy" gives "val/accuracy"; "loss/pair_text" gives "val/pairs/text_loss", which runs with
    several sources log, then "val/text_loss".
    """
    first, _, last = name.partition("/")
    quantity = "accuracy" if "accuracy" in (first, last) else "loss"
    if last == "accuracy":
        part = first
    else:
        part = "" if last == "loss" else last
    if not part:
        return (f"val/{quantity}",)
    modality = part.removeprefix("pair_")
    source = f"{part}s" if modality == part else "pairs"
    return f"val/{source}/{modality}_{quantity}", f"val/{modality}_{quantity}"


def format_chart_title(name: str, task: str = "") -> str:
    """Returns the title of a logged name's chart: "loss/pair_text" -> "pair text: loss (nats)"."""
    first, _, last = name.partition("/")
    if first == "val":
        return f"held-out {format_score_name(last)}{format_unit(last, task)}"
    if "accuracy" in (first, last):
        return f"{first.replace('_', ' ')}: accuracy" if last else "accuracy"
    loss = "loss" if last in ("", "loss") else f"{format_score_name(last)}: loss"
    return loss + format_unit("loss", task)
