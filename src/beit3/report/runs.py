"""Reads run directories that `beit3 train` wrote.

Older versions log less: what a run did not log is empty or 0, never an error. A file that cannot be
read raises a ValueError that names it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beit3.files import read_json, read_lines


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
            if line.get("seconds") and line.get("samples")
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
    return isinstance(value, int | float) and math.isfinite(value)


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
        init=recipe.get("init", ""),
        recipe=recipe["recipe"],
        metrics=_read_metrics(path / "metrics.jsonl"),
        scores=_read_optional_json(path / "scores.json") or {},
        inputs=recipe.get("inputs") or {},
        environment=recipe.get("environment") or {},
    )


def check_recipe(content: dict[str, Any], path: Path) -> None:
    """Raises ValueError that names the field of a recipe.json that is not of its type."""
    empty: dict[str, Any] = {"recipe": {}, "inputs": {}, "environment": {}, "init": "", "task": ""}
    for name, default in empty.items():
        value = content.get(name) or default
        if not isinstance(value, type(default)):
            raise ValueError(
                f"{path}: the field {name!r} is {str(value)[:60]!r}: it should be a "
                f"{type(default).__name__}, as beit3 train writes it"
            )


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the complete lines of metrics.jsonl; the last may be half written by a live run."""
    lines = list(read_lines(path)) if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            values = json.loads(line)
            int(values["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise ValueError(
                f"{path} line {number} is not a JSON object with a step: delete the line"
            ) from None
        metrics.append(values)
    return metrics


def _read_optional_json(path: Path) -> Any:
    """Returns the content of a JSON file, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run the training again") from None
