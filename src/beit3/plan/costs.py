"""Plans a run: its memory, micro-batch, time and price with every setting of
`run.checkpointing`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from beit3.plan.devices import GIB, find_device
from beit3.plan.estimate import Estimate
from beit3.recipe import Recipe
from beit3.task import Task
from beit3.training.loop import count_steps, open_source

UTILIZATION = 0.4
"""Fraction of the peak rate that matrix products are assumed to reach, communication and all else
included."""

Checkpointing = Literal["none", "selective", "full"]
Plan = dict[str, Any]
"""Plain JSON: `ways` has an entry per setting of `run.checkpointing`, `a_step` what a step
reads."""


def plan_run(
    task_class: type[Task],
    recipe: Recipe,
    *,
    gpus: int = 1,
    gpu: str = "h100",
    utilization: float = UTILIZATION,
    price: float = 0.0,
    records: int = 0,
) -> Plan:
    """Plans a run of `recipe` with every setting of `run.checkpointing`.

    Args:
        task_class: The task of the recipe.
        recipe: The run.
        gpus: Number of devices, one process each.
        gpu: Name of the device (plan/devices.py).
        utilization: Fraction of the device's peak rate that is reached.
        price: Of one device for an hour.
        records: Records of the largest source, which a run counted in epochs needs to know;
            0 = those under `data.root`, unknown without one.

    Raises:
        ValueError: An option or the batch is not possible; the message names the remedy.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: give at least 1")
    if not 0 < utilization <= 1:
        raise ValueError(
            f"--utilization {utilization} is no fraction of the peak: "
            "give a number above 0 and up to 1"
        )
    device = find_device(gpu)
    estimates = [
        Estimate(
            task_class,
            replace(recipe, run=replace(recipe.run, checkpointing=checkpointing)),
            device,
            gpus,
        )
        for checkpointing in get_args(Checkpointing)
    ]
    first = estimates[0]  # without recomputation
    if not first.sizes.block:  # without blocks nothing can be recomputed
        estimates = [first]
    steps = count_run_steps(task_class, recipe, records)
    rate = gpus * device.teraflops * 1e12 * utilization
    return {
        "gpus": gpus,
        "gpu": asdict(device),
        "utilization": utilization,
        "price": price,
        "steps": steps,
        "a_step": count_step_inputs(first),
        "parameters": asdict(first.sizes),
        "model_flops": first.count_flops(first.recipe_micro_batch) * gpus,
        "ways": [estimate_costs(estimate, steps, rate, price) for estimate in estimates],
    }


def count_run_steps(task_class: type[Task], recipe: Recipe, records: int) -> int:
    """Returns the steps of the run; 0 where it counts epochs and the number of records is
    unknown."""
    if recipe.run.steps:
        return recipe.run.steps
    batch = recipe.data.batch
    sources = [name for name in task_class.sources if batch.get(name)]
    if records:
        largest = max(sources, key=lambda name: batch[name])
        return count_steps(recipe, {largest: records})[0]
    if not recipe.data.root:
        return 0
    root = Path(recipe.data.root)
    sizes = {name: len(open_source(root, task_class, name, recipe)) for name in sources}
    return count_steps(recipe, sizes)[0]


def count_step_inputs(estimate: Estimate) -> dict[str, dict[str, int]]:
    """Returns the records, images and text positions that a step reads, by source."""
    batch = estimate.recipe.data.batch
    inputs = {}
    for name, per_record in estimate.count_inputs().items():
        counts = {kind: count * batch[name] for kind, count in per_record.items()}
        inputs[name] = {"records": batch[name]} | counts
    return inputs


def estimate_costs(estimate: Estimate, steps: int, rate: float, price: float) -> dict[str, Any]:
    """Returns one entry of `ways`.

    Memory is that of the recipe's micro-batch; the time is that of the recipe's micro-batch, or of
    the largest one that fits where the recipe's does not.

    Args:
        estimate: The recipe with one setting of `run.checkpointing`.
        steps: Steps of the run; 0 = unknown.
        rate: FLOP/s that all devices reach together.
        price: Of one device for an hour.
    """
    wanted, largest = estimate.recipe_micro_batch, estimate.find_largest_micro_batch()
    memory = estimate.estimate_memory(wanted)
    fits = memory.total <= estimate.device.memory * GIB
    used = wanted if fits or not largest else largest
    flops = estimate.count_flops(used) * estimate.processes
    hours = steps * flops / rate / 3600
    return {
        "checkpointing": estimate.recipe.run.checkpointing,
        "micro_batch": wanted,
        "memory": asdict(memory),
        "total": memory.total,
        "fits": fits,
        "largest_micro_batch": largest,
        "used_micro_batch": used,
        "micro_batches": sum(map(len, estimate.split_batch(used).values())),
        "loader": estimate.estimate_loader_memory(used),
        "largest_tensor": max(trace.largest_tensor for trace in estimate.traces.values()),
        "flops": flops,
        "seconds": flops / rate,
        "hours": hours,
        "gpu_hours": hours * estimate.processes,
        "cost": hours * estimate.processes * price,
    }
