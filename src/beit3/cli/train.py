"""`beit3 train` and `beit3 plan`: a recipe with overrides, run or estimated."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from beit3.cli.options import Amount, Count, Fraction, Size, TaskName, Word, list_options
from beit3.config import override, suggest

if TYPE_CHECKING:
    from beit3.recipe import Recipe


def train(
    task: TaskName, recipe: Word = "", /, *fields: Word, init: str = "", out: str = ""
) -> None:
    """Train a task by a recipe.

    ```
    beit3 train vqkd
    beit3 train vqa demo --optim.lr 5e-4 --run.steps 200 --init runs/demo/pretrain/last
    torchrun --nproc-per-node 8 -m beit3 train vqa base_480 --data.root data
    ```

    The same command continues a run that was stopped.

    Args:
        task: A task, or the dotted name of a module of yours; `beit3 recipes` lists the tasks.
        recipe: A recipe of the task; by default demo, or the one that suits `--init`.
        fields: Fields of the recipe as `--section.field value`, for example `--optim.lr 1e-4`;
            `beit3 recipes TASK --show RECIPE` prints them all.
        init: Weights to start from: a weights directory, a run or a released file.
        out: Run directory; by default runs/TASK-RECIPE.
    """
    from beit3.ops.collectives import rank
    from beit3.task import load_task
    from beit3.training.loop import train as train_task

    name, settings = read_recipe(task, [recipe, *fields], train, init=init)
    out = out or f"runs/{task}-{name}"
    scores = train_task(settings, load_task(task), out=out, init=init)
    if rank() == 0:
        print(json.dumps(scores, indent=1))
        print(f"weights at {out}/last and {out}/best")


def plan(
    task: TaskName,
    recipe: Word = "",
    /,
    *fields: Word,
    gpus: Count = 1,
    gpu: str = "h100",
    utilization: Annotated[Fraction, Parameter(alias="--utilisation")] = 0.4,
    price: Amount = 0.0,
    records: Size = 0,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Estimate what a run takes: memory of a device, micro-batch, time, cost.

    ```
    beit3 plan pretrain base_224 --gpus 64 --gpu h100 --price 2.5
    beit3 plan vqa base_480 --gpu cpu --data.batch.main 16
    ```

    Args:
        task: A task; `beit3 recipes` lists them.
        recipe: A recipe of the task; demo by default.
        fields: Fields of the recipe, as for `beit3 train`.
        gpus: Processes, one per device.
        gpu: a100-40, a100-80, h100, h200, b200, l40s, rtx4090 and others; cpu is this machine.
        utilization: Fraction of the device's peak rate that is reached, 0 to 1.
        price: Price of one device for an hour.
        records: Records of the largest source, where the recipe counts epochs.
        as_json: Print JSON instead of a table.
    """
    from beit3.plan.costs import plan_run
    from beit3.plan.table import format_table
    from beit3.task import load_task

    name, settings = read_recipe(task, [recipe, *fields], plan)
    costs = plan_run(
        load_task(task),
        settings,
        gpus=gpus,
        gpu=gpu,
        utilization=utilization,
        price=price,
        records=records,
    )
    if as_json:
        print(json.dumps(costs, indent=1))
    else:
        print(*format_table(f"{task} {name}", costs, settings), sep="\n")


def read_recipe(
    task: str, words: list[str], verb: Callable[..., None], *, init: str = ""
) -> tuple[str, "Recipe"]:
    """Returns a recipe's name and the recipe with its fields overridden.

    Args:
        task: Name of the task.
        words: The name of a recipe, which may be absent or empty, then fields.
        verb: The verb whose options are suggested for a field that is unknown.
        init: Weights that decide the recipe where none is named.
    """
    from beit3.task import load_task
    from beit3.weights.initialization import find_recipe

    task_class = load_task(task)
    fields = words if words[0].startswith("--") else words[1:]
    name = words[0] if words[0] and fields is not words else find_recipe(task_class, init)
    if name not in task_class.recipes:
        known = list(task_class.recipes)
        hint = suggest(name, known)
        raise ValueError(f"{task} has no recipe {name}{hint} (known: {', '.join(known)})")
    recipe = override(task_class.recipes[name], fields, options=list_options(verb))
    return name, recipe
