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
    "optimizer": "the optimizer's moments",
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
    options = plan["ways"]
    settings = [option["checkpointing"] for option in options]
    marks = [" *" if setting == recipe.run.checkpointing else "" for setting in settings]
    marked = [setting + mark for setting, mark in zip(settings, marks, strict=True)]
    yield "run.checkpointing, * the recipe's", marked
    for key, label in MEMORY_LABELS.items():
        yield label, [format_gib(option["memory"][key]) for option in options]
    total_label = f"a device at micro-batch {options[0]['micro_batch']}"
    yield total_label, [format_gib(option["total"]) for option in options]
    yield (
        f"fits {plan['gpu']['memory']} GiB",
        ["yes" if option["fits"] else "NO" for option in options],
    )


def make_micro_batch_rows(plan: Plan) -> Iterator[Row]:
    """Yields the largest micro-batch, the one used for times, and the memory of the loader."""
    options = plan["ways"]
    yield (
        "largest micro-batch that fits",
        [str(option["largest_micro_batch"] or "none") for option in options],
    )
    yield "largest tensor", [format_gib(option["largest_tensor"][0]) for option in options]
    yield "loader, host memory per process", [format_gib(option["loader"]) for option in options]
    yield "micro-batch used below", [str(option["used_micro_batch"]) for option in options]
    yield "micro-batches per step and process", [str(option["micro_batches"]) for option in options]


def make_time_rows(plan: Plan) -> Iterator[Row]:
    """Yields utilization, time and cost, as far as they are known."""
    options, steps = plan["ways"], plan["steps"]
    model_rate = plan["utilization"] * plan["model_flops"]
    utilization = [f"{model_rate / option['flops']:.0%}" for option in options]
    yield "utilization, recomputation not counted", utilization
    yield "seconds per step", [format_number(option["seconds"]) for option in options]
    if steps:
        yield f"hours, {steps:,} steps", [format_number(option["hours"]) for option in options]
        yield "device-hours", [format_number(option["gpu_hours"]) for option in options]
        if plan["price"]:
            label = f"cost at {plan['price']:g} per hour"
            yield label, [format_number(option["cost"]) for option in options]


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
