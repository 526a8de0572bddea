"""The panels of numbers: a summary of each run, scores, differences between runs, environments."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from beit3.report.differences import (
    find_differences,
    format_command,
    format_values,
    list_environment,
    list_fields,
)
from beit3.report.document import (
    render_details,
    render_note,
    render_panel,
    render_run_label,
    render_table,
)
from beit3.report.runs import Run, shorten_paths
from beit3.report.score_table import find_scoring_differences, render_score_table
from beit3.report.scores import (
    DETAIL_SCORES,
    format_column,
    format_score,
    format_score_name,
    format_unit,
    get_headline,
)
from beit3.training.log import format_duration

SOURCE_NAMES = {"main": "records"}
"""Names on the page of sources whose own names say nothing."""


def render_run_summary(run: Run, index: int, *, several: bool) -> str:
    """Returns one line on a run: its label, steps, records a step and initial weights.

    Training time, speed and memory follow where they were logged. With `several` runs the label has
    the color and dash of run `index`.
    """
    batch = run.batch
    facts = [f"{run.last_step} steps"]
    facts += [
        f"{count} {SOURCE_NAMES.get(source, source)} a step"
        for source, count in batch.items()
        if count
    ]
    # Weights lie at RUN/best: the last two parts name them without the machine's directories.
    facts.append(
        f"from {shorten_paths([run.init], min_parts=2)[0]}" if run.init else "from scratch"
    )
    if run.training_seconds:
        facts.append(format_duration(run.training_seconds))
    if run.waiting_fraction:
        facts.append(f"{run.waiting_fraction:.0%} waiting for records")
    if run.records_per_second:
        facts.append(f"{run.records_per_second:.0f} records/s")
    if run.peak_memory:
        facts.append(f"{run.peak_memory:.1f} GB at its peak")
    if several:
        label = render_run_label(run.label, index)
    else:
        label = f'<span class="run ">{escape(run.label)}</span>'
    return f'<p class="facts">{label} {escape(" · ".join(facts))}</p>'


# Scores ---------------------------------------------------------------------------------------


def render_scores(runs: Sequence[Run]) -> str:
    """Returns the latest held-out scores: tiles of one run, or a table of several."""
    if not any(run.scores for run in runs):
        return render_note("No held-out scores yet.")
    if len(runs) == 1:
        names = [
            name for name in _list_scores(runs) if "/" not in name and name not in DETAIL_SCORES
        ]
        return f'<div class="tiles">{"".join(_render_tile(runs[0], name) for name in names)}</div>'
    differences = find_scoring_differences(runs)
    if differences:
        note = f"No best is marked: {' and '.join(differences)} are not the same in all runs."
    else:
        note = "★ marks the best of a column."
    return render_panel("Scores", f"On held-out records. {note}", render_score_table(runs))


def render_source_scores(runs: Sequence[Run]) -> str:
    """Returns the scores of single sources ("images/..."), folded away; "" where there are none."""
    labels = [run.label for run in runs]
    rows = []
    for name in _list_scores(runs):
        if "/" in name:
            texts = format_column(name, [run.scores.get(name) for run in runs])
            title = name + format_unit(name, runs[0].task)
            rows.append({"score": title, **dict(zip(labels, texts, strict=True))})
    return render_details("Scores of each source", render_table(rows)) if rows else ""


def _list_scores(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the scores that any run has, the headline metric first."""
    headline = get_headline(runs[0].task)
    names = dict.fromkeys(name for run in runs for name in run.scores if name != "step")
    return sorted(names, key=lambda name: name != headline)


def _render_tile(run: Run, name: str) -> str:
    title = format_score_name(name) + format_unit(name, run.task)
    score = format_score(name, run.scores[name])
    return f'<div class="tile"><span>{escape(title)}</span><b>{escape(score)}</b></div>'


# Recipes and environments ---------------------------------------------------------------------


def render_differences(runs: Sequence[Run]) -> str:
    """Returns the fields and the environments in which several runs differ; "" for one run."""
    if len(runs) < 2:
        return ""
    fields = _render_difference_table(runs, [list_fields(run) for run in runs])
    if not fields:
        fields = render_note("Nothing: recipes and inputs are the same.")
    environments = _render_difference_table(runs, [list_environment(run) for run in runs])
    if environments:
        environments = f"<h3>Machine and code</h3>{environments}"
    lead = "Fields of the recipe and inputs of the runs. All that is not listed is the same."
    return render_panel("What differs", lead, fields + environments)


def _render_difference_table(runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a row per name whose values differ and a column per run, or ""."""
    labels = [run.label for run in runs]
    return render_table(
        [
            {"field": name, **dict(zip(labels, texts, strict=True))}
            for name, texts in find_differences(values).items()
        ]
    )


def render_environments(runs: Sequence[Run]) -> str:
    """Returns the machine, code and command of each run, folded away; "" if none recorded them."""
    rows = []
    commands = []
    for run in runs:
        if run.environment:
            rows.append({"run": run.label, **_format_environment(run)})
        command = format_command(run)
        if command:
            started = run.environment.get("started", "at an unknown time")
            commands.append(
                f"<dt>{escape(run.label)}, started {escape(started)}</dt>"
                f"<dd><code>{escape(command)}</code></dd>"
            )
    if not rows and not commands:
        return ""
    command_list = f"<dl>{''.join(commands)}</dl>" if commands else ""
    return render_details("Machine, code and command", render_table(rows) + command_list)


def _format_environment(run: Run) -> dict[str, str]:
    return {name: format_values([value])[0] for name, value in list_environment(run).items()}
