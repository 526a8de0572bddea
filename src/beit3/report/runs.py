"""Reads run directories that `beit3 train` wrote.

Older versions log less: what a run did not log is empty or 0, never an error. A file that cannot be
read raises a ValueError that names it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from beit3.files import read_json, read_lines

MAX_INTEGER = 2**63
"""Whole numbers in the files of a run are smaller."""


@dataclass(frozen=True)
class Run:
    """The files of one run directory.

    `label` names the run on the page. `init` is the path of the weights that it started from, or
    empty. `metrics` holds the lines of metrics.jsonl. `scores` is empty before the first
    evaluation. `inputs` holds the task's config as the records completed it, and digests of the
    files that the run read. `environment` says where it ran.
    """

    path: Path
    label: str
    task: str
    init: str
    recipe: dict[str, Any]
    metrics: list[dict[str, float]]
    scores: dict[str, float]
    inputs: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> dict[str, float]:
        """Source -> records a step; empty where the recipe does not say."""
        return dict(self.recipe.get("data", {}).get("batch", {}))

    @property
    def root(self) -> str:
        """Directory of the records; empty for the embedded world."""
        return str(self.recipe.get("data", {}).get("root", ""))

    def get_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns steps [T] and values [T] of a logged name, without values that are not finite."""
        lines = [line for line in self.metrics if is_finite_number(line.get(name))]
        steps = np.array([line["step"] for line in lines], dtype=float)
        return steps, np.array([line[name] for line in lines], dtype=float)

    def list_names(self, prefix: str = "") -> list[str]:
        """Returns the logged names that start with `prefix`, in the order of their first line."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in names if name.startswith(prefix)]

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def training_seconds(self) -> float:
        """Wall time of training without evaluations; 0 where it was not logged."""
        return self._sum_over_steps("seconds")

    @property
    def waiting_fraction(self) -> float:
        """Fraction of the training time spent waiting for records; 0 where it was not logged."""
        return self._sum_over_steps("seconds_waiting") / (self.training_seconds or 1.0)

    @property
    def records_per_second(self) -> float:
        """Median over the logged lines; 0 where no line has both samples and seconds."""
        rates = [
            line["samples"] / line["seconds"]
            for line in self.metrics
            if is_finite_number(line.get("samples"))
            and is_finite_number(line.get("seconds"))
            and line["samples"] > 0
            and line["seconds"] > 0
        ]
        return float(np.median(rates)) if rates else 0.0

    @property
    def peak_memory(self) -> float:
        """Peak memory in GB; 0 where it was not logged."""
        return max(self.get_series("memory")[1].tolist(), default=0.0)

    def _sum_over_steps(self, name: str) -> float:
        """Each line holds the mean over the steps since the line before."""
        steps, means = self.get_series(name)
        return float((np.diff(steps, prepend=0) * means).sum())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads run directories, each once, and labels them by the last parts of their paths.

    A label has as many parts as are needed to tell the runs apart. Raises ValueError for a
    directory that holds no run.
    """
    unique_paths = list(dict.fromkeys(Path(path).resolve() for path in paths))
    labels = shorten_paths(map(str, unique_paths))
    return [_read_run(path, label) for path, label in zip(unique_paths, labels, strict=True)]


def shorten_paths(paths: Iterable[str], min_parts: int = 1) -> list[str]:
    """Returns the last parts of each path, as few as tell it from the other paths.

    Args:
        paths: Paths; equal ones get equal results.
        min_parts: Number of parts to keep at least.
    """
    all_parts = [Path(path).parts for path in paths]
    return [_find_unique_ending(parts, all_parts, min_parts) for parts in all_parts]


def is_finite_number(value: Any) -> bool:
    """Returns whether a value is a number, but neither infinite nor NaN."""
    if isinstance(value, int):
        return abs(value) < MAX_INTEGER
    return isinstance(value, float) and math.isfinite(value)


def _find_unique_ending(
    parts: tuple[str, ...], all_parts: Sequence[tuple[str, ...]], min_parts: int
) -> str:
    """Returns the shortest ending that no different path shares, else the whole path."""
    rivals = [rival for rival in all_parts if rival != parts]
    for count in range(min_parts, len(parts)):
        if all(rival[-count:] != parts[-count:] for rival in rivals):
            return "/".join(parts[-count:])
    return str(Path(*parts))


def _read_run(path: Path, label: str) -> Run:
    recipe = _read_optional_json(path / "recipe.json")
    if recipe is None:
        raise ValueError(f"{path} is not a run: it has no recipe.json")
    if not isinstance(recipe, dict) or not {"task", "recipe"} <= recipe.keys():
        raise ValueError(
            f"{path} is not a run: its recipe.json lacks task and recipe; give a directory that "
            "beit3 train wrote"
        )
    check_recipe(recipe, path / "recipe.json")
    return Run(
        path=path,
        label=label,
        task=recipe["task"],
        init=recipe.get("init") or "",
        recipe=recipe["recipe"],
        metrics=_read_metrics(path / "metrics.jsonl"),
        scores=_read_scores(path / "scores.json"),
        inputs=recipe.get("inputs") or {},
        environment=recipe.get("environment") or {},
    )


def check_recipe(content: dict[str, Any], path: Path) -> None:
    """Raises ValueError that names the field of a recipe.json that is not of its type.

    Fields that a page does not read are not looked at, and `inputs`, `environment` and `init` may
    be null.
    """
    may_be_null = ("inputs", "environment", "init")
    fields = {name: content[name] for name in may_be_null if content.get(name) is not None}
    recipe = fields["recipe"] = content["recipe"]
    fields["task"] = content["task"]
    _check_types(fields, RECIPE_TYPES, path)
    parts = {f"recipe.{name}": recipe[name] for name in ("task", "data", "run") if name in recipe}
    _check_types(parts, RECIPE_TYPES, path)
    data = recipe.get("data", {})
    _check_types(
        {f"recipe.data.{name}": data[name] for name in ("batch", "root") if name in data},
        RECIPE_TYPES,
        path,
    )
    for source, count in data.get("batch", {}).items():
        if not is_finite_number(count):
            _refuse_field(f"recipe.data.batch.{source}", count, "a number", path)
    started = (fields.get("environment") or {}).get("started")
    if started is not None:
        _check_types({"environment.started": started}, RECIPE_TYPES, path)


RECIPE_TYPES: dict[str, type] = {
    "task": str,
    "init": str,
    "recipe": dict,
    "inputs": dict,
    "environment": dict,
    "environment.started": str,
    "recipe.task": dict,
    "recipe.data": dict,
    "recipe.run": dict,
    "recipe.data.batch": dict,
    "recipe.data.root": str,
}
"""Types of the fields of recipe.json that a page reads."""


def _check_types(values: dict[str, Any], types: dict[str, type], path: Path) -> None:
    """Raises ValueError for the first value that is not of its type, or is a text with a NUL."""
    names: dict[type, str] = {str: "a text", dict: "an object"}
    for name, value in values.items():
        if not isinstance(value, types[name]) or (isinstance(value, str) and "\0" in value):
            _refuse_field(name, value, names[types[name]], path)


def _refuse_field(name: str, value: Any, expected: str, path: Path) -> NoReturn:
    shown = json.dumps(value, ensure_ascii=False)[:60]
    raise ValueError(
        f"{path}: the field {name!r} is {shown}, it should be {expected}, as beit3 train writes it"
    )


def _read_scores(path: Path) -> dict[str, float]:
    """Returns the scores of scores.json; none where there is no such file."""
    scores = _read_optional_json(path) or {}
    if not isinstance(scores, dict):
        raise ValueError(f"{path} holds no JSON object of scores: delete it")
    for name, value in scores.items():
        is_number = is_finite_number(value) or isinstance(value, float)  # NaN and infinity too
        if value is not None and not is_number:
            _refuse_field(name, value, "a number", path)
    return scores


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the complete lines of metrics.jsonl; the last may be half written by a live run."""
    lines = list(read_lines(path)) if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            values = json.loads(line)
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not is_finite_number(values.get("step")):
            raise ValueError(
                f"{path} line {number} is not a JSON object with a step: delete the line"
            )
        metrics.append(values)
    return metrics


def _read_optional_json(path: Path) -> Any:
    """Returns the content of a JSON file, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run the training again") from None
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path} holds a text with {error.object[error.start]!r}, which is no character: "
            "mend it"
        ) from None
    return content
