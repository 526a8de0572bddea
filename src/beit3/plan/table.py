"""The plan of a run as figures (plain JSON), and as a table for a person."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from beit3.plan.devices import GIB, device
from beit3.plan.estimate import Estimate
from beit3.recipe import Recipe
from beit3.task import Task
from beit3.training.loop import count_steps, open_source

UTILISATION = 0.4
"""Share of the peak that matrix products are taken to reach, communication and everything between them included."""

Checkpointing = Literal["none", "selective", "full"]
Plan = dict[str, Any]


def plan(
    task: type[Task],
    recipe: Recipe,
    *,
    gpus: int = 1,
    gpu: str = "h100",
    utilisation: float = UTILISATION,
    price: float = 0.0,
    records: int = 0,
) -> Plan:
    """What `recipe` takes on so many devices, with every `run.checkpointing`.

    utilisation: share of the device's peak rate. price: of a device for an hour. records: of the largest source, which a run
    counted in epochs needs to know; 0 = those under data.root, unknown without one. ValueError for what the user can mend.
    """
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: give at least 1")
    if not 0 < utilisation <= 1:
        raise ValueError(
            f"--utilisation {utilisation} is no share of the peak: give a number above 0 and up to 1"
        )
    at = device(gpu)
    ways = [
        Estimate(task, replace(recipe, run=replace(recipe.run, checkpointing=each)), at, gpus)
        for each in get_args(Checkpointing)
    ]
    ways = ways if ways[0].sizes.block else ways[:1]  # without blocks nothing can be recomputed
    steps = length(task, recipe, records)
    rate = gpus * at.teraflops * 1e12 * utilisation
    model_flops = ways[0].flops(micro_batch(recipe, ways[0])) * gpus
    seen = {
        name: {"records": recipe.data.batch[name]}
        | {kind: count * recipe.data.batch[name] for kind, count in reads.items()}
        for name, reads in ways[0].reads().items()
    }
    return {
        "gpus": gpus,
        "gpu": asdict(at),
        "utilisation": utilisation,
        "price": price,
        "steps": steps,
        "a_step": seen,
        "parameters": asdict(ways[0].sizes),
        "model_flops": model_flops,
        "ways": [way(each, steps, rate, price) for each in ways],
    }


def micro_batch(recipe: Recipe, estimate: Estimate) -> int:
    """The recipe's, of the largest source."""
    return min(recipe.run.micro_batch or estimate.share, estimate.share)


def length(task: type[Task], recipe: Recipe, records: int) -> int:
    """Steps of the run; 0 where it counts epochs and nobody knows the records."""
    sources = [name for name in task.sources if recipe.data.batch.get(name)]
    if recipe.run.steps:
        return recipe.run.steps
    if records:
        largest = max(sources, key=lambda name: recipe.data.batch[name])
        return count_steps(recipe, {largest: records})[0]
    if not recipe.data.root:
        return 0
    return count_steps(
        recipe,
        {name: len(open_source(Path(recipe.data.root), task, name, recipe)) for name in sources},
    )[0]


def way(estimate: Estimate, steps: int, rate: float, price: float) -> dict[str, Any]:
    """One column: memory at the recipe's micro-batch, the largest that fits, and the time with whichever is used."""
    wanted, best = micro_batch(estimate.recipe, estimate), estimate.largest()
    memory = estimate.memory(wanted)
    fits = memory.total <= estimate.device.memory * GIB
    used = wanted if fits or not best else best
    flops = estimate.flops(used) * estimate.processes
    hours = steps * flops / rate / 3600
    return {
        "checkpointing": estimate.recipe.run.checkpointing,
        "micro_batch": wanted,
        "memory": asdict(memory),
        "total": memory.total,
        "fits": fits,
        "largest_micro_batch": best,
        "used_micro_batch": used,
        "micro_batches": sum(map(len, estimate.pieces(used).values())),
        "loader": estimate.waiting(used),
        "largest_tensor": max(each.largest for each in estimate.traces.values()),
        "flops": flops,
        "seconds": flops / rate,
        "hours": hours,
        "gpu_hours": hours * estimate.processes,
        "cost": hours * estimate.processes * price,
    }


ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's two moments",
    "frozen": "frozen parts, whole",
    "gathered": "gathered: 3 blocks, the rest",
    "activations": "activations and what passes",
    "batches": "batches",
    "reserve": "context, NCCL, gaps of the allocator",
}


def table(name: str, found: Plan, recipe: Recipe) -> list[str]:
    """Lines for a person; `name`: the task and its recipe."""
    ways, gpus, at = found["ways"], found["gpus"], found["gpu"]
    rows = [
        (label, [gibibytes(each["memory"][key]) for each in ways]) for key, label in ROWS.items()
    ]
    rows += [
        (
            f"a device at micro-batch {ways[0]['micro_batch']}",
            [gibibytes(each["total"]) for each in ways],
        ),
        (f"fits {at['memory']} GiB", ["yes" if each["fits"] else "NO" for each in ways]),
        (
            "largest micro-batch that fits",
            [f"{each['largest_micro_batch'] or 'none'}" for each in ways],
        ),
        ("largest tensor", [gibibytes(each["largest_tensor"][0]) for each in ways]),
        ("loader, memory of the machine, a process", [gibibytes(each["loader"]) for each in ways]),
        ("micro-batch used below", [str(each["used_micro_batch"]) for each in ways]),
        ("micro-batches a step, a process", [str(each["micro_batches"]) for each in ways]),
        (
            "utilisation, recomputation not counted",
            [f"{found['utilisation'] * found['model_flops'] / each['flops']:.0%}" for each in ways],
        ),
        ("seconds a step", [number(each["seconds"]) for each in ways]),
    ]
    if found["steps"]:
        rows += [(f"hours, {found['steps']:,} steps", [number(each["hours"]) for each in ways])]
        rows += [("device-hours", [number(each["gpu_hours"]) for each in ways])]
        rows += (
            [(f"cost at {found['price']:g} an hour", [number(each["cost"]) for each in ways])]
            if found["price"]
            else []
        )
    marked = [
        each["checkpointing"] + (" *" if each["checkpointing"] == recipe.run.checkpointing else "")
        for each in ways
    ]
    rows.insert(0, ("run.checkpointing, * the recipe's", marked))
    lines = [f"{label:42}" + "".join(f"{value:>14}" for value in values) for label, values in rows]
    head = f"{name} on {gpus} x {at['name']} ({at['memory']} GiB, {at['teraflops']:.4g} TFLOP/s, of which {found['utilisation']:.0%})"
    return [head, *lines, "", *said(found)]


def said(found: Plan) -> list[str]:
    """What a run reads, and what these figures leave out."""
    steps, sizes = found["steps"], found["parameters"]
    reads = [
        ", ".join(f"{count:,} {kind}" for kind, count in each.items() if count)
        for each in found["a_step"].values()
    ]
    lines = [f"{name}: {text} a step" for name, text in zip(found["a_step"], reads, strict=True)]
    total = {
        kind: sum(each[kind] for each in found["a_step"].values()) * steps
        for kind in ("records", "images", "tokens")
    }
    if steps:
        lines += [
            f"in all: {', '.join(f'{count:,} {kind}' for kind, count in total.items() if count)}; tokens are places for text"
        ]
    else:
        lines += [
            "hours are unknown, because the recipe counts epochs: give --records N, or --data.root"
        ]
    lines += [
        f"{sizes['trained']:,} parameters train, {sizes['frozen']:,} are frozen; {found['model_flops']:.3g} FLOPs a step"
    ]
    return [
        *lines,
        "texts are taken as long as they may be; run.compile takes less; communication is in the utilisation alone",
    ]


def gibibytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
