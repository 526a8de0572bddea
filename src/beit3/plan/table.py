"""Formats the plan of a run as a table, one column per setting of `run.checkpointing`."""

from collections.abc import Iterator, Mapping
from typing import Any

from beit3.plan.costs import Plan
from beit3.plan.devices import GIB
from beit3.recipe import Recipe

Row = tuple[str, list[str]]
"""A label and the text of each column."""

MEMORY_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's two moments",
    "frozen": "frozen parts, not sharded",
    "gathered": "gathered: 3 blocks, the rest",
    "activations": "activations and temporary tensors",
    "batches": "batches",
    "reserve": "CUDA context, NCCL, fragmentation",
}


def format_table(title: str, plan: Plan, recipe: Recipe) -> list[str]:
    """Returns the lines of the table; `title` names the task and the recipe."""
    rows = [
        *make_memory_rows(plan, recipe),
        *make_micro_batch_rows(plan),
        *make_time_rows(plan),
    ]
    lines = [f"{label:42}" + "".join(f"{text:>14}" for text in texts) for label, texts in rows]
    return [format_heading(title, plan), *lines, "", *format_notes(plan)]


def format_heading(title: str, plan: Plan) -> str:
    """Returns the line that names the recipe, the devices and what is assumed of them."""
    gpu = plan["gpu"]
    return (
        f"{title} on {plan['gpus']} x {gpu['name']} ({gpu['memory']} GiB, "
        f"{gpu['teraflops']:.4g} TFLOP/s, of which {plan['utilization']:.0%})"
    )


def make_memory_rows(plan: Plan, recipe: Recipe) -> Iterator[Row]:
    """Yields what takes the memory of a device, and whether it fits."""
    ways = plan["ways"]
    settings = [way["checkpointing"] for way in ways]
    marks = [" *" if setting == recipe.run.checkpointing else "" for setting in settings]
    marked = [setting + mark for setting, mark in zip(settings, marks, strict=True)]
    yield "run.checkpointing, * the recipe's", marked
    for key, label in MEMORY_LABELS.items():
        yield label, [format_gib(way["memory"][key]) for way in ways]
    total_label = f"a device at micro-batch {ways[0]['micro_batch']}"
    yield total_label, [format_gib(way["total"]) for way in ways]
    yield f"fits {plan['gpu']['memory']} GiB", ["yes" if way["fits"] else "NO" for way in ways]


def make_micro_batch_rows(plan: Plan) -> Iterator[Row]:
    """Yields the largest micro-batch, the one that times are estimated for, and the loader's
    memory."""
    ways = plan["ways"]
    yield (
        "largest micro-batch that fits",
        [str(way["largest_micro_batch"] or "none") for way in ways],
    )
    yield "largest tensor", [format_gib(way["largest_tensor"][0]) for way in ways]
    yield "loader, host memory per process", [format_gib(way["loader"]) for way in ways]
    yield "micro-batch used below", [str(way["used_micro_batch"]) for way in ways]
    yield "micro-batches per step and process", [str(way["micro_batches"]) for way in ways]


def make_time_rows(plan: Plan) -> Iterator[Row]:
    """Yields utilization, time and cost, as far as they are known."""
    ways, steps = plan["ways"], plan["steps"]
    model_rate = plan["utilization"] * plan["model_flops"]
    utilization = [f"{model_rate / way['flops']:.0%}" for way in ways]
    yield "utilization, recomputation not counted", utilization
    yield "seconds per step", [format_number(way["seconds"]) for way in ways]
    if steps:
        yield f"hours, {steps:,} steps", [format_number(way["hours"]) for way in ways]
        yield "device-hours", [format_number(way["gpu_hours"]) for way in ways]
        if plan["price"]:
            label = f"cost at {plan['price']:g} per hour"
            yield label, [format_number(way["cost"]) for way in ways]


def format_notes(plan: Plan) -> list[str]:
    """Returns the lines on what the run reads, and on what the estimate leaves out."""
    inputs, steps, sizes = plan["a_step"], plan["steps"], plan["parameters"]
    lines = [f"{name}: {format_counts(counts)} per step" for name, counts in inputs.items()]
    if steps:
        totals = {
            kind: sum(counts[kind] for counts in inputs.values()) * steps
            for kind in ("records", "images", "tokens")
        }
        lines.append(f"in total: {format_counts(totals)}; tokens include padding")
    else:
        lines.append(
            "hours are unknown, because the recipe counts epochs: give --records N, or --data.root"
        )
    lines.append(
        f"{sizes['trained']:,} trained parameters, {sizes['frozen']:,} frozen; "
        f"{plan['model_flops']:.3g} FLOPs per step"
    )
    lines.append(
        "texts are taken at their maximum length; run.compile takes less memory; "
        "communication is counted in the utilization only"
    )
    return lines


def format_counts(counts: Mapping[str, Any]) -> str:
    """Returns `32 records, 32 images`, without what is 0."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)


def format_gib(size: float) -> str:
    """Returns bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def format_number(value: float) -> str:
    """Returns a number to three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
