"""Training runs of the programs beside it; equal runs of several rows are trained once.

A run's folder below --out is named by a digest of its recipe and of the runs that it starts from. A
stopped run goes on when its program is started again; after a change of the package's code take
another --out.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from beit3.config import override
from beit3.demo.parallel import Job
from beit3.demo.tour import set_visual_tokenizer
from beit3.recipe import Recipe
from beit3.task import load_task
from beit3.training.loop import train

RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One training run."""

    label: str
    task: str
    recipe: str
    steps: int
    changes: str = ""
    """Fields of the recipe, as on the command line: `--task.image_mask_rate 0.6`."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Records of each source in a step, in place of the recipe's; empty = the recipe's."""
    needs: Mapping[str, "Run"] = field(default_factory=dict)
    """Runs whose weights this one needs: `init`, or a field of the task (`visual_tokenizer`)."""
    records: str = ""
    """Folder of the records below the study's root."""
    seed: int = 0
    keep: bool = True
    """Whether the weights are kept; of a fine-tuning only the scores are."""

    def with_seed(self, seed: int) -> "Run":
        """Returns this run and all that it needs with another seed."""
        needs = {name: run.with_seed(seed) for name, run in self.needs.items()}
        return replace(self, seed=seed, needs=needs)

    def change(self, changes: str) -> "Run":
        """Returns this run with further changes, which come last and so decide."""
        return replace(self, changes=f"{self.changes} {changes}".strip())

    def with_network(self, changes: str) -> "Run":
        """Returns this run and all that it needs with another network, but for the visual
        tokenizer."""
        if self.task == "vqkd":
            return self
        needs = {name: run.with_network(changes) for name, run in self.needs.items()}
        return replace(self.change(changes), needs=needs)


def make_recipe(run: Run, root: Path) -> Recipe:
    """Returns the recipe of a run, without the weights that it needs."""
    recipe = override(load_task(run.task).recipes[run.recipe], run.changes.split())
    return replace(
        recipe,
        data=replace(
            recipe.data, root=str(root / run.records), batch=dict(run.batch or recipe.data.batch)
        ),
        run=replace(recipe.run, steps=run.steps, seed=run.seed),
    )


def get_recipe_steps(task: str, recipe: str = "demo") -> int:
    """Returns the steps of a recipe as it stands."""
    steps = load_task(task).recipes[recipe].run.steps
    assert steps is not None
    return steps


def compute_digest(run: Run, root: Path) -> str:
    """Returns what tells a run from all others: its recipe, and the runs whose weights it needs."""
    recipe = make_recipe(run, root)
    return digest(
        {
            "task": run.task,
            "recipe": replace(
                recipe, data=replace(recipe.data, root=(root / run.records).name)
            ).to_dict(),
            "needs": {name: compute_digest(need, root) for name, need in run.needs.items()},
        }
    )


def digest(value: Any) -> str:
    """Returns a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def get_folder(run: Run, root: Path, out: Path) -> Path:
    """Returns the folder of a run below `out`."""
    return out / f"{run.label}-seed{run.seed}-{compute_digest(run, root)}"


def make_training_jobs(run: Run, root: Path, out: Path) -> dict[Path, Job]:
    """Returns the jobs of a run and of all that it needs, by their files."""
    jobs: dict[Path, Job] = {}
    for need in run.needs.values():
        jobs |= make_training_jobs(need, root, out)
    needs = tuple(get_folder(need, root, out) / RESULT for need in run.needs.values())
    path = get_folder(run, root, out) / RESULT
    return jobs | {path: Job(train_run, (run, root, out), needs)}


def train_run(run: Run, root: Path, out: Path) -> dict[str, float]:
    """Trains or resumes a run and returns its scores and the seconds of this call."""
    folder, started = get_folder(run, root, out), time.monotonic()
    recipe, init = make_recipe(run, root), ""
    for name, need in run.needs.items():
        weights = get_folder(need, root, out) / "last"
        if name == "init":
            init = str(weights)
        elif name == "visual_tokenizer":
            recipe = set_visual_tokenizer(recipe, weights)
        else:
            recipe = override(recipe, [f"--task.{name}", str(weights)])
    scores = train(recipe, load_task(run.task), out=folder, init=init, label=folder.name)
    for name in ("checkpoints", "best", *(() if run.keep else ("last",))):
        shutil.rmtree(folder / name, ignore_errors=True)
    return scores | {"seconds": time.monotonic() - started}
