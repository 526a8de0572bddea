"""Run directories as `beit3 train` leaves them, read once.

Shapes: paths -> Run. What a run did not log (older versions log less) is empty, never an error;
what cannot be
read is a ValueError that names the file.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """A run directory, read. `metrics`: the lines of metrics.jsonl; `scores` is empty before the
    first evaluation.

    inputs: what the run read beside its recipe, by digest. environment: where it ran.
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

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [T], values [T]) of one logged name; values that are not finite are left out."""
        found = [(line["step"], line[key]) for line in self.metrics if _finite(line.get(key))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def names(self, prefix: str = "") -> list[str]:
        """Logged names that start with `prefix`, in the order in which they first came."""
        return [
            name
            for name in dict.fromkeys(key for line in self.metrics for key in line)
            if name.startswith(prefix)
        ]

    @property
    def steps(self) -> int:
        """The last step of which anything is known."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    def seconds(self, name: str = "seconds") -> float:
        """Wall seconds of training, evaluations left out; 0 where the run did not log them."""
        steps, each = self.series(name)  # the mean over the steps since the last line
        return float((np.diff(steps, prepend=0) * each).sum())

    def rate(self) -> float:
        """Records a second, the median over the run's lines; 0 where the run did not log its
        seconds."""
        found = [
            line["samples"] / line["seconds"]
            for line in self.metrics
            if line.get("seconds") and line.get("samples")
        ]
        return float(np.median(found)) if found else 0.0

    def waiting(self) -> float:
        """Share of the training time spent waiting for records; 0 where the run did not log it."""
        return self.seconds("seconds_waiting") / (self.seconds() or 1.0)

    def memory(self) -> float:
        """Peak memory in GB; 0 where the run did not log it."""
        return max(self.series("memory")[1].tolist(), default=0.0)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs, each once, labelled by as many of their path's last parts as tell them apart;
    ValueError for what is no run."""
    paths = list(dict.fromkeys(Path(path).resolve() for path in paths))
    return [
        _read_run(path, label) for path, label in zip(paths, tails(map(str, paths)), strict=True)
    ]


def tails(paths: Iterable[str], least: int = 1) -> list[str]:
    """The last parts of each path: at least so many, and as many as no other of these paths ends
    with."""
    parts = [Path(path).parts for path in paths]

    def tail(own: tuple[str, ...]) -> str:
        for count in range(least, len(own)):
            if all(other == own or other[-count:] != own[-count:] for other in parts):
                return "/".join(own[-count:])
        return str(Path(*own))

    return [tail(own) for own in parts]


def _read_run(path: Path, label: str) -> Run:
    recipe = _json(path / "recipe.json")
    if recipe is None:
        raise ValueError(f"{path} is not a run: it has no recipe.json")
    if not isinstance(recipe, dict) or not {"task", "recipe"} <= recipe.keys():
        raise ValueError(
            f"{path} holds no run (recipe.json with task and recipe): give one that beit3 train "
            "wrote"
        )
    scores = _json(path / "scores.json") or {}
    beside = [recipe.get(name) or {} for name in ("inputs", "environment")]
    return Run(
        path,
        label,
        recipe["task"],
        recipe.get("init", ""),
        recipe["recipe"],
        _metrics(path / "metrics.jsonl"),
        scores,
        *beside,
    )


def _metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl: the last one of a run that is still going may be half
    written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
            int(found[-1]["step"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path} line {number} is no JSON object with a step: delete the line"
            ) from None
    return found


def _json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): delete it and run the training again"
        ) from None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
