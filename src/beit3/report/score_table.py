"""Scores and costs of several runs of one task as an HTML table, with the best scores marked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from beit3.report.plots import get_run_class
from beit3.report.runs import Run, is_finite_number
from beit3.report.scores import (
    DETAIL_SCORES,
    format_column,
    format_score_name,
    format_unit,
    get_direction,
    get_headline,
)
from beit3.training.log import format_duration


@dataclass(frozen=True)
class Column:
    """One score or cost of every run.

    `values` holds None where a run has none, `texts` what the cells show. `direction` is 1 if
    larger values are better, -1 if smaller ones are, 0 if unknown.
    """

    title: str
    values: Sequence[float | None]
    texts: Sequence[str]
    direction: int = 0


def render_score_table(runs: Sequence[Run]) -> str:
    """Returns a table with a row per run: its best and last held-out scores, and what they cost.

    The best of a column has a star, unless the runs cannot be compared.
    """
    all_columns = [*make_score_columns(runs), *make_cost_columns(runs)]
    columns = [column for column in all_columns if any(column.texts)]
    are_comparable = not find_scoring_differences(runs)
    best_runs = [find_best_runs(column) if are_comparable else set() for column in columns]
    head = '<th scope="col">run</th>' + "".join(
        f'<th scope="col" class="number">{escape(column.title)}</th>' for column in columns
    )
    rows = []
    for index, run in enumerate(runs):
        label = f'<span class="run {get_run_class(index)}">{escape(run.label)}</span>'
        cells = [
            _render_cell(column.texts[index], is_best=index in best)
            for column, best in zip(columns, best_runs, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _render_cell(text: str, *, is_best: bool) -> str:
    if is_best:
        star = '<span role="img" aria-label="best">★</span>'
        return f'<td class="number best">{star} {escape(text)}</td>'
    return f'<td class="number">{escape(text)}</td>'


# Which runs can be compared -------------------------------------------------------------------


def find_scoring_differences(runs: Sequence[Run]) -> list[str]:
    """Returns what the runs were scored on or with that is not the same in all of them.

    Scores of runs cannot be compared unless the result is empty.
    """
    data = [run.recipe.get("data", {}) for run in runs]
    settings = [run.recipe.get("run", {}) for run in runs]
    conditions = {
        "the records (data.root)": [config.get("root") for config in data],
        "the sources (data.batch)": [_list_sources(run) for run in runs],
        "the number of records (run.eval_records)": [
            config.get("eval_records") for config in settings
        ],
        "the text tokenizer": [run.inputs.get("tokenizer") for run in runs],
        "the frozen parts": [run.inputs.get("frozen") for run in runs],
    }
    return [
        name for name, values in conditions.items() if any(value != values[0] for value in values)
    ]


def _list_sources(run: Run) -> list[str]:
    """Returns the names of the sources that a run draws records from."""
    batch = run.batch
    return sorted(source for source, count in batch.items() if count)


def find_best_runs(column: Column) -> set[int]:
    """Returns the indices of the runs with the best value of a column.

    Runs whose cells read alike are equally good. The result is empty if all cells read alike, or
    if only one run has a value.
    """
    if not column.direction:
        return set()
    values = {index: value for index, value in enumerate(column.values) if value is not None}
    if len({column.texts[index] for index in values}) < 2:
        return set()
    best = max(values, key=lambda index: column.direction * values[index])
    return {index for index in values if column.texts[index] == column.texts[best]}


# Columns --------------------------------------------------------------------------------------


def make_score_columns(runs: Sequence[Run]) -> list[Column]:
    """Returns the columns of the held-out scores of runs of one task.

    The headline metric leads. If any run was evaluated more than once, its best value and the step
    of that come before its last one. All other scores are the last ones.
    """
    task = runs[0].task
    headline = get_headline(task)
    has_several_evaluations = any(len(run.get_series(f"val/{headline}")[0]) > 1 for run in runs)
    columns = _make_best_columns(runs, headline) if has_several_evaluations else []
    for name in _list_scores(runs, headline):
        title = format_score_name(name)
        if has_several_evaluations and name == headline:
            title = f"{title}, last"
        last_values = [_get_last_score(run, name) for run in runs]
        columns.append(_make_score_column(title, name, last_values, task))
    return columns


def _make_best_columns(runs: Sequence[Run], headline: str) -> list[Column]:
    """Returns the columns of the best headline score and of its step."""
    best_scores: list[float | None] = []
    best_steps: list[float | None] = []
    for run in runs:
        steps, values = run.get_series(f"val/{headline}")
        best_scores.append(float(values.max()) if len(values) else None)
        best_steps.append(float(steps[values.argmax()]) if len(values) else None)
    title = f"{format_score_name(headline)}, best"
    step_texts = ["" if step is None else f"{step:.0f}" for step in best_steps]
    return [
        _make_score_column(title, headline, best_scores, runs[0].task),
        Column("at step", best_steps, step_texts),
    ]


def _list_scores(runs: Sequence[Run], headline: str) -> list[str]:
    """Returns the names of the scores over all sources that any run has, the headline first."""
    names = dict.fromkeys(name for run in runs for name in run.scores)
    shown = [name for name in names if "/" not in name and name not in ("step", *DETAIL_SCORES)]
    return sorted(shown, key=lambda name: name != headline)


def _get_last_score(run: Run, name: str) -> float | None:
    score = run.scores.get(name)
    return float(score) if score is not None and is_finite_number(score) else None


def _make_score_column(title: str, name: str, values: Sequence[float | None], task: str) -> Column:
    return Column(
        title=title + format_unit(name, task),
        values=values,
        texts=format_column(name, values),
        direction=get_direction(name, task),
    )


def make_cost_columns(runs: Sequence[Run]) -> list[Column]:
    """Returns the columns of steps, training time, time spent waiting, speed and peak memory.

    Cells are empty where a run did not log them.
    """
    steps = [run.last_step for run in runs]
    return [
        Column("steps", steps, [str(step) for step in steps]),
        _make_cost_column("training", [run.training_seconds for run in runs], format_duration),
        _make_cost_column("waiting", [run.waiting_fraction for run in runs], "{:.0%}".format),
        _make_cost_column("records/s", [run.records_per_second for run in runs], "{:.0f}".format),
        _make_cost_column("peak memory (GB)", [run.peak_memory for run in runs], "{:.1f}".format),
    ]


def _make_cost_column(
    title: str, values: Sequence[float], format_value: Callable[[float], str]
) -> Column:
    return Column(title, values, [format_value(value) if value else "" for value in values])
