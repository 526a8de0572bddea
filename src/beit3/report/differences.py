"""Fields, inputs and environments in which several runs differ.

Fields have dotted names, as the command line has them: `optim.lr`, `data.batch.pairs`, `run.seed`.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from beit3.report.runs import Run, shorten_paths
from beit3.report.scores import ABSENT

MAX_CHARACTERS = 80
"""Characters of a value that are shown; longer ones are cut."""


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as dotted name -> value. Lists are values."""
    if not isinstance(value, Mapping):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}".lstrip("."))
    return flat


def list_fields(run: Run) -> dict[str, Any]:
    """Returns all that defines a run: its initial weights, its recipe, and digests of its inputs.

    Fields of the task are as the records completed them, so that class names appear that the
    recipe left open.
    """
    inputs = dict(run.inputs)
    completed_task = flatten(inputs.pop("config", None), "task")
    return {
        "init": run.init or "from scratch",
        **flatten(run.recipe),
        **completed_task,
        **flatten(inputs, "inputs"),
    }


def list_environment(run: Run) -> dict[str, Any]:
    """Returns the machine and the code of a run, without its command line and its time.

    What the run did not record is left out.
    """
    recorded = {
        name: value
        for name, value in run.environment.items()
        if value not in (None, "") and name not in ("command", "started")
    }
    return flatten(recorded)


def format_command(run: Run) -> str:
    """Returns the command line of a run; empty where it was not recorded."""
    command = run.environment.get("command", "")
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def find_differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the fields whose values are not the same in all runs, as name -> each run's text.

    `runs` holds the fields of each run, as name -> value.
    """
    names = dict.fromkeys(name for run in runs for name in run)
    differences = {}
    for name in names:
        values = [run.get(name, ABSENT) for run in runs]
        if any(value != values[0] for value in values):
            differences[name] = format_values(values)
    return differences


def format_values(values: Sequence[Any]) -> list[str]:
    """Returns values as text, paths and long values shortened.

    Different values never look the same: where shortening made them so, all get a digest.
    """
    texts = [_format_value(value) for value in values]
    endings = iter(shorten_paths([text for text in texts if _is_path(text)], min_parts=2))
    short_texts = [
        _shorten(next(endings) if _is_path(text) else text, value)
        for text, value in zip(texts, values, strict=True)
    ]
    num_different = len({json.dumps(value) for value in values})
    if len(set(short_texts)) >= num_different:
        return short_texts
    return [
        f"{text} ({_compute_digest(value)})"
        for text, value in zip(short_texts, values, strict=True)
    ]


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _is_path(text: str) -> bool:
    return "/" in text and " " not in text


def _shorten(text: str, value: Any) -> str:
    """Shortens checksums and the texts of long values."""
    if re.fullmatch(r"[0-9a-f]{40,64}", text):
        return text[:12]
    if len(text) <= MAX_CHARACTERS:
        return text
    if isinstance(value, list):
        return f"{len(value)} values ({_compute_digest(value)})"
    return f"{text[:MAX_CHARACTERS]}…"


def _compute_digest(value: Any) -> str:
    """Returns six hexadecimal digits that differ where values differ."""
    return sha256(json.dumps(value).encode()).hexdigest()[:6]
