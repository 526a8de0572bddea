"""Script of each of two processes under torchrun: training jobs, then a command line or a kill.

The JSON file has jobs [task, recipe, out, record]; with `record` the gradients of the first step
are stored beside `out`.
"""

import json
import os
import pickle
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from beit3.ops.collectives import all_gather_objects, gather_full, rank
from beit3.recipe import Recipe
from beit3.task import Batch, Task, load_task
from beit3.training import loop


def store_gradients(out: Path) -> Callable[[Task], dict[str, float]]:
    """Returns a `measure_gradient_norms` that stores its first gradients: `<out>.gradients.pt`."""
    measure, path = loop.measure_gradient_norms, out.with_name(out.name + ".gradients.pt")

    def measure_and_store(task: Task) -> dict[str, float]:
        if not path.exists():
            gradients = {
                name: gather_full(parameter.grad)
                for name, parameter in task.trainable_parameters()
                if parameter.grad is not None
            }
            all_gather_objects(None)  # every process has seen that there is no file
            if rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(gradients, path)
        return measure(task)

    return measure_and_store


def store_targets(out: Path) -> Callable[[Task, list[Batch]], dict[str, int]]:
    """Returns a `sum_targets` that stores the first counts by process in `<out>.targets.json`."""
    count, path = loop.sum_targets, out.with_name(out.name + ".targets.json")

    def count_and_store(task: Task, batches: list[Batch]) -> dict[str, int]:
        pickle.dumps(task.without_network())  # a sharded task's, too, can be sent to a loader
        counts = all_gather_objects([task.targets(batch) for batch in batches])
        if rank() == 0 and not path.exists():
            path.write_text(json.dumps(counts))
        return count(task, batches)

    return count_and_store


def kill_once(marker: Path) -> Callable[..., float]:
    """Returns a `compute_learning_rate` that kills process 1 in step 4, once."""
    learning_rate = loop.compute_learning_rate

    def compute_or_kill(step: int, *arguments) -> float:
        if step == 3 and int(os.environ["RANK"]) == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(step, *arguments)

    return compute_or_kill


def main() -> None:
    jobs = Path(sys.argv.pop(1))
    kill = sys.argv[1:] == ["kill"]
    if kill:
        loop.compute_learning_rate = kill_once(jobs.with_name("killed"))
    originals = loop.measure_gradient_norms, loop.sum_targets
    for name, recipe, out, record in json.loads(jobs.read_text()):
        task = load_task(name)
        loop.measure_gradient_norms, loop.sum_targets = (
            (store_gradients(Path(out)), store_targets(Path(out))) if record else originals
        )
        loop.train(Recipe.from_dict(recipe, task.Config), task, out=out)
    loop.measure_gradient_norms, loop.sum_targets = originals
    if not kill:
        runpy.run_module("beit3", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
