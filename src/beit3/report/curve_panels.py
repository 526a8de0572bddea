"""The panels of curves: losses and scores over the steps, and gradient norms and learning rates."""

from collections.abc import Sequence

from beit3.report.charts import Chart, choose_charts
from beit3.report.curves import MAX_RAW_RUNS, draw_curves, draw_part_curves
from beit3.report.document import (
    render_details,
    render_figure_grid,
    render_legend,
    render_note,
    render_panel,
)
from beit3.report.runs import Run
from beit3.report.scores import get_headline

MAX_UNFOLDED_SCORES = 2
"""Scores beside the headline up to which their curves are not folded away."""

PART_PREFIXES = {"gradient_norm": "gradient norm by part", "lr": "learning rate by group"}
"""Prefixes of names that are logged for parts of a network, and the titles of their charts."""


def render_curves(runs: Sequence[Run]) -> str:
    """Returns the panel of losses, accuracies and scores of runs of one task under one legend.

    Scores beside the headline metric are folded away if there are many.
    """
    charts = choose_charts(runs)
    if not charts:
        return render_note("No steps logged yet.")
    headline = (f"val/{get_headline(runs[0].task)}",)
    other_scores = [chart for chart in charts if not chart.training and chart.held_out != headline]
    folded = other_scores if len(other_scores) > MAX_UNFOLDED_SCORES else []
    grid = render_figure_grid([draw_curves(runs, chart) for chart in charts if chart not in folded])
    if folded:
        folded_grid = render_figure_grid([draw_curves(runs, chart) for chart in folded])
        grid += render_details(f"{len(folded)} other scores", folded_grid)
    raw_values = ", the faint one the logged values" if len(runs) <= MAX_RAW_RUNS else ""
    lead = (
        f"Training step by step: the line is a running mean{raw_values}; rings are scores on "
        "held-out records."
    )
    return render_panel("Curves", lead, render_legend(runs) + grid)


def render_gradient_curves(runs: Sequence[Run]) -> str:
    """Returns the panel of gradient norms and learning rates, of networks and of their parts.

    The parts are folded away if there are many runs. It is empty where none was logged.
    """
    norms = _draw_gradient_norms(runs)
    parts = _draw_parts(runs)
    if not norms and not parts:
        return ""
    if parts and len(runs) > MAX_RAW_RUNS:
        folded_parts = render_details("Parts of each network", render_figure_grid(parts))
        grid = render_figure_grid(norms) + folded_parts
    else:
        grid = render_figure_grid(norms + parts)
    lead = (
        "Gradient norms before clipping, of the network and, where they were logged, of its "
        "parts; learning rates of its groups."
    )
    return render_panel("Gradients and rates", lead, render_legend(runs) + grid)


def _draw_gradient_norms(runs: Sequence[Run]) -> list[str]:
    """Returns one SVG of the gradient norms of all runs, or none where none was logged."""
    if not any(len(run.get_series("gradient_norm")[0]) for run in runs):
        return []
    return [draw_curves(runs, Chart("gradient norm", "gradient_norm"))]


def _draw_parts(runs: Sequence[Run]) -> list[str]:
    """Returns an SVG of each run that logged a quantity for two or more parts of its network."""
    figures = []
    for prefix, title in PART_PREFIXES.items():
        for run in runs:
            if len(run.list_names(f"{prefix}/")) > 1:
                run_title = f"{title}: {run.label}" if len(runs) > 1 else title
                figures.append(draw_part_curves(run, prefix, run_title))
    return figures
