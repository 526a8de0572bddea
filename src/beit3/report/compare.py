"""Runs of one task side by side, as HTML tables: scores with the best marked, and everything in
which the runs differ.

Fields have dotted names, as the command line has them: `optim.lr`, `data.batch.pairs`, `run.seed`.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from typing import Any

from beit3.report.curves import (
    CAPTION_SCORES,
    DETECTION_SCORES,
    RATES,
    SHARES,
    TABLED,
    headline,
    run_class,
    spelled,
    unit,
)
from beit3.report.runs import Run, tails
from beit3.training.log import format_duration

ABSENT = "—"
LONGEST = 80
"""Characters of a value; longer ones are cut."""


@dataclass(frozen=True)
class Column:
    """One figure of every run, None where a run has none. `better`: 1 larger, -1 smaller, 0 nobody
    can say."""

    title: str
    values: Sequence[float | None]
    texts: Sequence[str]
    better: int = 0


def score_table(runs: Sequence[Run]) -> str:
    """A row per run: its best and last held-out scores, and what they cost; a star at the best of a
    column."""
    marked = not scored_apart(runs)
    columns = [
        column
        for column in (*score_columns(runs), *cost_columns(runs))
        if any(text for text in column.texts)
    ]
    head = '<th scope="col">run</th>' + "".join(
        f'<th scope="col" class="number">{escape(column.title)}</th>' for column in columns
    )
    rows = []
    for index, run in enumerate(runs):
        name = (
            f'<th scope="row"><span class="run {run_class(index)}">{escape(run.label)}</span></th>'
        )
        cells = (
            '<td class="number best"><span role="img" aria-label="best">★</span> '
            f"{escape(column.texts[index])}</td>"
            if marked and index in leaders(column)
            else f'<td class="number">{escape(column.texts[index])}</td>'
            for column in columns
        )
        rows.append(f"<tr>{name}{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def scored_apart(runs: Sequence[Run]) -> list[str]:
    """What keeps scores from being compared: the names of what runs were scored on or by that is
    not the same in all."""
    scored_on = {
        "the records (data.root)": [run.recipe.get("data", {}).get("root") for run in runs],
        "the sources (data.batch)": [
            sorted(name for name, n in run.recipe.get("data", {}).get("batch", {}).items() if n)
            for run in runs
        ],
        "how many of the records (run.eval_records)": [
            run.recipe.get("run", {}).get("eval_records") for run in runs
        ],
        "the text tokenizer": [run.inputs.get("tokenizer") for run in runs],
        "the frozen parts": [run.inputs.get("frozen") for run in runs],
    }
    return [
        name for name, values in scored_on.items() if any(value != values[0] for value in values)
    ]


def score_columns(runs: Sequence[Run]) -> list[Column]:
    """The headline at its best and the step of that, where it was taken twice; then the last of
    every score, the headline first."""
    found, first = [], headline(runs[0].task)
    taken = [run.series(f"val/{first}") for run in runs]
    again = any(len(steps) > 1 for steps, _ in taken)
    if again:
        best = [
            (float(values.max()), float(steps[values.argmax()])) if len(steps) else (None, None)
            for steps, values in taken
        ]
        found.append(
            score_column(
                f"{spelled(first)}, best", first, [value for value, _ in best], runs[0].task
            )
        )
        steps = [step for _, step in best]
        found.append(
            Column("at step", steps, ["" if step is None else f"{step:.0f}" for step in steps])
        )
    names = list(
        dict.fromkeys(
            name
            for run in runs
            for name in run.scores
            if "/" not in name and name not in ("step", *TABLED)
        )
    )
    for name in sorted(names, key=lambda name: name != first):
        title = f"{spelled(name)}, last" if again and name == first else spelled(name)
        found.append(
            score_column(title, name, [_number(run.scores.get(name)) for run in runs], runs[0].task)
        )
    return found


def score_column(title: str, name: str, values: Sequence[float | None], task: str) -> Column:
    return Column(title + unit(name, task), values, aligned(name, values), direction(name, task))


def cost_columns(runs: Sequence[Run]) -> list[Column]:
    """Steps, and where they were logged: time without evaluations, the share of it spent waiting,
    records a second, peak memory."""
    seconds, waits, rates, peaks = (
        [getattr(run, name)() for run in runs] for name in ("seconds", "waiting", "rate", "memory")
    )
    return [
        Column("steps", [float(run.steps) for run in runs], [str(run.steps) for run in runs]),
        Column("training", seconds, [format_duration(value) if value else "" for value in seconds]),
        Column("of it waiting", waits, [f"{value:.0%}" if value else "" for value in waits]),
        Column("records/s", rates, [f"{value:.0f}" if value else "" for value in rates]),
        Column("peak memory (GB)", peaks, [f"{value:.1f}" if value else "" for value in peaks]),
    ]


def direction(name: str, task: str) -> int:
    """Whether larger (1) or smaller (-1) scores of a name are better; 0 where the name does not
    say."""
    last = name.rpartition("/")[2]
    if (
        last == headline(task)
        or last.endswith(RATES)
        or last in CAPTION_SCORES
        or last.startswith("negative_")
    ):
        return 1
    return -1 if last.endswith(("loss", "error", "distance")) else 0


def leaders(column: Column) -> set[int]:
    """The runs with the best value of a column, all that are written alike; none where all are, or
    one alone has any."""
    values = {
        index: column.better * value
        for index, value in enumerate(column.values)
        if value is not None and column.better
    }
    if len({column.texts[index] for index in values}) < 2:
        return set()
    best = max(values, key=values.__getitem__)
    return {index for index in values if column.texts[index] == column.texts[best]}


def figure(name: str, value: Any) -> str:
    """A score to read; numbers without a way of their own to four digits."""
    value = scored(name, value)
    return (
        ABSENT
        if value is None
        else json.dumps(value)
        if _number(value) is None
        else f"{value:{score_format(name, '.4g')}}"
    )


def scored(name: str, value: Any) -> Any:
    """A score as it is, None for COCO's -1: there is nothing to score."""
    return None if value == -1 and name.rpartition("/")[2] in DETECTION_SCORES else value


def score_format(name: str, other: str) -> str:
    """How scores of a name are written: shares in percent, captions' scores as precisely as papers
    print them, else `other`."""
    parts = name.split("/")
    return (
        ".3f"
        if CAPTION_SCORES.keys() & set(parts)
        else ".1%"
        if parts[-1].endswith(SHARES)
        else other
    )


def aligned(name: str, values: Sequence[float | None]) -> list[str]:
    """Scores of one name with as many decimals each, so that they can be read one below the other;
    "" for None."""
    there = [abs(value) for value in values if value is not None]
    decimals = max(0, 3 - math.floor(math.log10(max(there)))) if there and max(there) > 0 else 0
    form = score_format(name, f".{min(decimals, 8)}f")
    return ["" if value is None else f"{value:{form}}" for value in values]


# What differs -------------------------------------------------------------------------------------


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested tables as dotted name -> value; lists are values."""
    if not isinstance(value, Mapping):
        return {where: value} if where else {}
    return {
        name: item
        for key, inner in value.items()
        for name, item in flat(inner, f"{where}.{key}".lstrip(".")).items()
    }


def fields(run: Run) -> dict[str, Any]:
    """Everything that a run is: its recipe as its records completed it, its start, and the digests
    of what it read."""
    inputs = dict(run.inputs)
    completed = flat(inputs.pop("config", None), "task")
    return (
        {"init": run.init or "from scratch"} | flat(run.recipe) | completed | flat(inputs, "inputs")
    )


def state(run: Run) -> dict[str, Any]:
    """Where and by which code a run ran, as far as it is known, without its command line and its
    time."""
    known = {name: value for name, value in run.environment.items() if value not in (None, "")}
    return {
        name: value for name, value in flat(known).items() if name not in ("command", "started")
    }


def command(run: Run) -> str:
    """The command line of a run; empty where it was not kept."""
    found = run.environment.get("command", "")
    return shlex.join(map(str, found)) if isinstance(found, list) else str(found)


def differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dotted name -> each run's value as text, for the names whose values are not the same in all
    runs."""
    names = dict.fromkeys(name for run in runs for name in run)
    rows = {name: [run.get(name, ABSENT) for run in runs] for name in names}
    return {
        name: texts(values)
        for name, values in rows.items()
        if any(value != values[0] for value in values)
    }


def texts(values: Sequence[Any]) -> list[str]:
    """Values as text, paths and long ones shortened, but never so that two different ones look the
    same."""
    whole = [
        value
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value)
        for value in values
    ]
    paths = iter(tails([text for text in whole if "/" in text and " " not in text], least=2))
    short = [
        _short(next(paths) if "/" in text and " " not in text else text, value)
        for text, value in zip(whole, values, strict=True)
    ]
    alike = len(set(short)) < len(set(map(json.dumps, values)))
    return (
        [f"{text} ({_digest(value)})" for text, value in zip(short, values, strict=True)]
        if alike
        else short
    )


def _short(text: str, value: Any) -> str:
    if re.fullmatch(r"[0-9a-f]{40,64}", text):
        return text[:12]
    if len(text) <= LONGEST:
        return text
    return (
        f"{len(value)} values ({_digest(value)})"
        if isinstance(value, list)
        else f"{text[:LONGEST]}…"
    )


def _digest(value: Any) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:6]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
