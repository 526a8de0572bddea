"""Memory that `beit3 plan` predicts and that a real step takes: peak resident memory on CPU.

    python benchmarks/memory.py --json benchmarks/memory.json     # about 7 minutes of CPU time

A case is a recipe with a micro-batch. A fresh process (two with gloo where weights are sharded)
first takes a step of a very small network of the same task, so that libraries are loaded, then two
steps of the real one; the difference between its peak (VmHWM) and the memory before them counts.
It is measured twice: `returned` gives every tensor of more than 64 KiB back to the system when it
is freed, as a caching allocator on a GPU would reuse it; `usual` is the default of glibc, which
keeps freed blocks of up to 32 MiB and leaves gaps. The estimate is compared with the first. No data
is read.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call by path

from beit3.ops.collectives import all_gather_objects, rank
from beit3.plan.devices import Device
from beit3.plan.dummy_inputs import build_meta_task, make_example
from beit3.plan.estimate import Estimate
from beit3.recipe import Recipe
from beit3.task import Task, load_task
from beit3.training.launch import init_device
from beit3.training.optim import make_optimizer
from beit3.training.parallel import make_autocast, materialize
from beit3.training.step import backward, sum_targets

MIB = 2**20
CPU = torch.device("cpu")
CPU_DEVICE = Device("cpu", 64, 0.1)
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A step of `pieces` micro-batches of each source on every process."""

    task: str
    recipe: str
    micro_batch: int
    pieces: int = 1
    checkpointing: Literal["none", "selective", "full"] = "none"
    processes: int = 1
    parts: bool = False
    """Whether adapter and head are recomputed as well."""


CASES = (
    Case("pretrain", "demo", 32),
    Case("pretrain", "laptop", 16),
    Case("pretrain", "laptop", 16, checkpointing="full"),
    Case("pretrain", "laptop", 16, checkpointing="selective"),
    Case("vqkd", "laptop", 64),
    Case("vqa", "laptop", 32),
    Case("captioning", "laptop", 32, pieces=2),
    Case("nlvr2", "laptop", 16),
    Case("retrieval", "laptop", 32),
    Case("retrieval", "laptop", 32, pieces=2),
    Case("imagenet", "laptop", 64),
    Case("imagenet", "base_224", 2),
    Case("vqa", "base_480", 1),
    Case("pretrain", "laptop", 8, processes=2),
    Case("vqa", "laptop", 32, processes=2),
    Case("imagenet", "base_224", 1, processes=2),
    Case("coco", "demo", 16),
    Case("coco", "laptop", 4),
    Case("coco", "laptop", 4, checkpointing="full"),
    Case("ade20k", "demo", 8),
    Case("ade20k", "laptop", 4),
    Case("ade20k", "laptop", 4, checkpointing="full", parts=True),
)


def format_name(case: Case) -> str:
    """Returns the name of a case in the table."""
    name = f"{case.task} {case.recipe}, {case.pieces} x {case.micro_batch}"
    name += (
        f", {case.checkpointing}" + " with its parts" * case.parts
        if case.checkpointing != "none"
        else ""
    )
    return name + (f", {case.processes} processes" if case.processes > 1 else "")


def make_recipe(case: Case) -> Recipe:
    """Returns the recipe with the batch of the case, on CPU."""
    recipe = load_task(case.task).recipes[case.recipe]
    batch = dict.fromkeys(recipe.data.batch, case.micro_batch * case.pieces * case.processes)
    run = replace(
        recipe.run,
        micro_batch=case.micro_batch,
        checkpointing=case.checkpointing,
        device="cpu",
        precision="float32",
    )
    task: Any = recipe.task
    if case.parts:
        task = replace(
            task,
            adapter=replace(task.adapter, recompute=True),
            head=replace(task.head, checkpointing=True),
        )
    return replace(recipe, task=task, data=replace(recipe.data, batch=batch), run=run)


def estimate_case(case: Case) -> float:
    """Returns the estimated bytes."""
    return (
        Estimate(load_task(case.task), make_recipe(case), CPU_DEVICE, case.processes)
        .estimate_memory(case.micro_batch)
        .total
    )


def measure_case(case: Case, *, return_freed: bool = True) -> float:
    """Measures the bytes of the process with the highest peak."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
        if case.processes > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        str(Path(__file__).resolve()),
        "--measure",
        json.dumps(asdict(case)),
    ]
    environment = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | (RETURN_FREED_MEMORY if return_freed else {})
    )
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise RuntimeError(f"{case}: {process.stderr[:3000]}")
    return float(process.stdout)


def measure(case: Case) -> None:
    """Measures in the fresh process and prints the bytes."""
    recipe, task_class = make_recipe(case), load_task(case.task)
    init_device(recipe.run)
    model: Any = recipe.task.model
    fused = {"fusion_layers": 0} if hasattr(model, "fusion_layers") else {}
    small_model = replace(
        model, dim=32, depth=recipe.task.base_depth, num_heads=2, ffn_dim=64, **fused
    )
    run_steps(
        task_class,
        replace(recipe, task=replace(recipe.task, model=small_model)),
        Case(case.task, case.recipe, 1, case.pieces),
        1,
    )
    memory_before = read_status("VmRSS")
    run_steps(task_class, recipe, case, 2)
    peak = max(all_gather_objects(read_status("VmHWM") - memory_before))
    if rank() == 0:
        print(peak, flush=True)


def run_steps(task_class: type[Task], recipe: Recipe, case: Case, count: int) -> None:
    """Makes training steps as the loop does."""
    task = build_meta_task(task_class, recipe.task, recipe.run)
    materialize(task, CPU, 0)
    optimizer = make_optimizer(task, recipe.optim)
    sources = [name for name in task_class.sources if recipe.data.batch.get(name)]
    batches = [
        task.collate([make_example(task, name)] * case.micro_batch)
        for name in sources
        for _ in range(case.pieces)
    ]
    micro_batches = [batch | {"step": 0, "steps": 1} for batch in batches]
    for _ in range(count):
        backward(
            task, micro_batches, sum_targets(task, micro_batches), make_autocast(recipe.run, CPU)
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def read_status(field: str) -> int:
    """Returns the bytes of a field of /proc/self/status."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Case(**json.loads(args.measure)))
        return
    lines, rows = ["| step | estimate | returned | ratio | usual |", "|---" * 5 + "|"], []
    for case in (case for case in CASES if args.only in format_name(case)):
        figures = {
            "estimate": estimate_case(case),
            "returned": measure_case(case),
            "usual": measure_case(case, return_freed=False),
        }
        rows.append(asdict(case) | figures)
        mib = {key: f"{value / MIB:.0f} MiB" for key, value in figures.items()}
        ratio = f"{figures['estimate'] / figures['returned']:.2f}"
        estimate, returned = mib["estimate"], mib["returned"]
        lines.append(
            f"| {format_name(case)} | {estimate} | {returned} | {ratio} | {mib['usual']} |"
        )
        print(lines[-1], flush=True)
    if args.json:
        from probe import (
            save_results,
        )  # beside this program; a test imports it as part of a package

        save_results(args.json, "\n".join(lines), rows)


if __name__ == "__main__":
    main()
