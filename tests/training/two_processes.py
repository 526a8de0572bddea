"""What each of two processes runs under torchrun: training jobs from a JSON file, then a command
line, or a kill.

Jobs: [task, recipe, out, whether to record], where recording keeps the first step's gradients
beside `out`.
"""

import json
import os
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


def recording(out: Path) -> Callable[[Task], dict[str, float]]:
    """`gradient_norms` that writes the first gradients it sees to `<out>.gradients.pt`."""
    measure, path = loop.measure_gradient_norms, out.with_name(out.name + ".gradients.pt")

    def measuring(task: Task) -> dict[str, float]:
        if not path.exists():
            found = {
                name: gather_full(parameter.grad)
                for name, parameter in task.trainable_parameters()
                if parameter.grad is not None
            }
            all_gather_objects(None)  # every process has seen that there is no file
            if rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, path)
        return measure(task)

    return measuring


def noting(out: Path) -> Callable[[Task, list[Batch]], dict[str, int]]:
    """`sum_targets` that writes each process's own counts of the first step to
    `<out>.targets.json`."""
    count, path = loop.sum_targets, out.with_name(out.name + ".targets.json")

    def counting(task: Task, batches: list[Batch]) -> dict[str, int]:
        mine = all_gather_objects([task.targets(batch) for batch in batches])
        if rank() == 0 and not path.exists():
            path.write_text(json.dumps(mine))
        return count(task, batches)

    return counting


def killing(marker: Path) -> Callable[..., float]:
    """`learning_rate` that kills process 1 in step 4 (the checkpoint of step 2 is there), once."""
    learning_rate = loop.compute_learning_rate

    def killed(step: int, *rest) -> float:
        if step == 3 and int(os.environ["RANK"]) == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(step, *rest)

    return killed


def main() -> None:
    jobs = Path(sys.argv.pop(1))
    kill = sys.argv[1:] == ["kill"]
    if kill:
        loop.compute_learning_rate = killing(jobs.with_name("killed"))
    originals = loop.measure_gradient_norms, loop.sum_targets
    for name, recipe, out, record in json.loads(jobs.read_text()):
        task = load_task(name)
        loop.measure_gradient_norms, loop.sum_targets = (
            (recording(Path(out)), noting(Path(out))) if record else originals
        )
        loop.train(Recipe.from_dict(recipe, task.Config), task, out=out)
    loop.measure_gradient_norms, loop.sum_targets = originals
    if not kill:
        runpy.run_module("beit3", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
