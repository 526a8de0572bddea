"""One process and two that train together: records per second, communication, memory.

    python benchmarks/scaling.py --json benchmarks/scaling.json

A pretraining step of SMALL (8 images, 1 text of 512 tokens, 16 pairs per process; codes given) on
one thread per process, with gloo. `apart` is two independent processes at the same time: it shows
what the machine gives two, so that the additional time of a step when they train `together` is
communication. Four processes are only shown to run. Forms alternate, each with a fresh start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from pretrain_step import make_micro_batches
from probe import measure_product_rate, read_peak_memory, save_results, seconds

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import MEDIUM, SMALL
from beit3.ops.collectives import rank, world_size
from beit3.recipe import OptimConfig, RunConfig
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.training.launch import init_device
from beit3.training.optim import make_optimizer
from beit3.training.parallel import build_task, make_autocast, materialize
from beit3.training.step import backward, sum_targets

COUNTS = (8, 1, 16)
SIZES = {"small": (SMALL, COUNTS), "medium": (MEDIUM, (1, 1, 1))}
"""Network, and images, texts and pairs of a process."""
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
FORMS = {"one": 1, "apart": 2, "together": 2, "four together": 4}


def train_and_measure(steps: int, size: str) -> None:
    """Trains, alone or under torchrun, and prints seconds a step and memory."""
    run, (model, counts) = RunConfig(), SIZES[size]
    device = init_device(run)
    torch.set_num_threads(1)
    config = PretrainConfig(
        model=model,
        image=Preprocessing(model.image_size),
        num_codes=256,
        token_size=112,
        text_length=32,
    )
    memory_before = read_peak_memory()
    task = build_task(Pretrain, config, None, run, device)
    materialize(task, device, 0)
    assert isinstance(task, Pretrain)
    torch.manual_seed(rank())
    batches = make_micro_batches(task, *counts)
    optimizer, precision = make_optimizer(task, OptimConfig(lr=0.0)), make_autocast(run, device)

    def step() -> None:
        optimizer.zero_grad()
        backward(task, batches, sum_targets(task, batches), precision)
        optimizer.step()

    step()
    times = [seconds(step) for _ in range(steps)]
    states = sum(
        value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
    )
    results = {
        "seconds": statistics.median(times),
        "peak": read_peak_memory() - memory_before,
        "optimizer": states,
    }
    if rank() == 0 or world_size() == 1:
        print(json.dumps(results), flush=True)


def run_form(form: str, steps: int, size: str = "small") -> dict[str, Any]:
    """Start the processes of a form and read what they found: seconds of the slowest, memory of the
    first."""
    count = FORMS[form]
    run_alone = [sys.executable, __file__, "--steps", str(steps), "--work", size]
    grouped = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *run_alone[1:],
    ]
    commands = [grouped] if "together" in form else [run_alone] * count
    environment = os.environ | (RETURN_FREED_MEMORY if size == "medium" else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen(command, text=True, env=environment, **pipes) for command in commands
    ]
    results = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{form}: {errors[-2000:]}")
        results.append(json.loads(output.splitlines()[-1]))
    return max(results, key=lambda run: run["seconds"])


def format_table(results: dict[str, list[dict[str, Any]]]) -> str:
    medians = {
        form: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for form, runs in results.items()
    }
    one_seconds = medians["one"]["seconds"]
    lines = [
        "| processes | a step | records a second | beside one | peak of each | its optimizer |",
        "|---" * 6 + "|",
    ]
    for form, run in medians.items():
        rate = FORMS[form] * sum(COUNTS) / run["seconds"]
        lines.append(
            f"| {form} | {run['seconds']:.2f} s | {rate:.0f} | "
            f"{FORMS[form] * one_seconds / run['seconds']:.2f} "
            f"| {run['peak'] / 1e6:.0f} MB | {run['optimizer'] / 1e6:.0f} MB |"
        )
    fractions = [
        1 - apart["seconds"] / together["seconds"]
        for apart, together in zip(results["apart"], results["together"], strict=True)
    ]
    lines += [
        "",
        f"Communication of two: {statistics.median(fractions):.0%} of a step "
        f"({min(fractions):.0%} to {max(fractions):.0%} over rounds).",
    ]
    return "\n".join(lines)


def format_memory_table(results: dict[str, dict[str, Any]]) -> str:
    """Formats the memory of the larger network."""
    lines = ["| processes, MEDIUM | peak of each | its optimizer |", "|---" * 3 + "|"]
    lines += [
        f"| {form} | {run['peak'] / 1e6:,.0f} MB | {run['optimizer'] / 1e6:,.0f} MB |"
        for form, run in results.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        train_and_measure(options.steps, options.work)
        return
    results: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    rates = []
    for turn in range(options.rounds):
        for form in FORMS:
            if form != "four together" or turn == 0:
                rates.append(measure_product_rate())
                results[form].append(
                    run_form(form, 2 if form == "four together" else options.steps)
                )
    large = {form: run_form(form, 2, "medium") for form in ("one", "together", "four together")}
    tables = f"{format_table(results)}\n\n{format_memory_table(large)}"
    print(tables)
    if options.json:
        save_results(options.json, tables, {"runs": results, "probe": rates, "medium": large})


if __name__ == "__main__":
    main()
