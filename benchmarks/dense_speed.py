"""Detection and segmentation of BASE: time and memory, and the fraction that the trunk takes.

    python benchmarks/dense_speed.py --json benchmarks/dense_speed.json
    python benchmarks/dense_speed.py --gpu --json benchmarks/dense_gpu.json

Measured are a forward pass and a training step on one image, with random weights, in float32, on
one thread. Times are medians in CPU seconds, which on an idle core equal wall time. The networks
are those of `coco base_1024` (windowed trunk, detector, 80 classes) and `ade20k base_512` (adapter,
small head, 150 classes). A forward pass of detection scores the boxes of 1,000 proposals; a
prediction adds Soft-NMS, masks and their outlines, or labels at the size of the image. Training
images are crowded: 63 objects, 32 classes. Each case is measured in a process of its own; its peak
is that of the process, libraries and weights included.

--gpu: steps of BASE in bfloat16 with and without checkpointing of trunk, adapter and head. With
--device cpu, --model tiny and --sizes 64 it only shows that the program runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe import read_peak_memory, save_results

from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.segmentation import SegmentationAugmentation
from beit3.model.config import BASE, TINY
from beit3.plan.dummy_inputs import IMAGE_SIZE, build_meta_task, make_label_map, make_objects
from beit3.recipe import Recipe
from beit3.segmentation.inference import InferenceConfig
from beit3.task import Batch, Task, load_task
from beit3.training.evaluate import to_device
from beit3.training.optim import make_optimizer
from beit3.training.parallel import make_autocast, materialize
from beit3.training.step import backward, sum_targets

RECIPES = {"coco": "base_1024", "ade20k": "base_512"}
NAMES = {"coco": "detection", "ade20k": "segmentation"}
CLASSES = {"coco": 80, "ade20k": 150}
MODELS = {"base": BASE, "tiny": TINY}
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One measurement, made in a process of its own."""

    task: str
    size: int
    train: bool = False
    recompute: bool = False
    """Whether trunk, adapter and head are recomputed."""
    model: str = "base"
    device: str = "cpu"
    batch: int = 1
    rounds: int = 3
    threads: int = 1


def make_recipe(case: Case) -> Recipe:
    """Returns the recipe of published size with the model and image size of the case."""
    recipe = load_task(case.task).recipes[RECIPES[case.task]]
    size = case.size
    task: Any = recipe.task
    model = replace(
        MODELS[case.model],
        final_norm=task.model.final_norm,
        drop_path_rate=task.model.drop_path_rate,
    )
    task = replace(task, model=model, num_classes=CLASSES[case.task])
    if case.task == "coco":
        task = replace(
            task, image=Preprocessing(size, task.image.mean, task.image.std, resize="fit")
        )
    else:
        view, views = (
            SegmentationAugmentation(size, size, 4 * size),
            InferenceConfig(size, size, size, 4 * size),
        )
        adapter, head = (
            replace(task.adapter, recompute=case.recompute),
            replace(task.head, checkpointing=case.recompute),
        )
        task = replace(task, adapter=adapter, head=head, train_view=view, views=views)
    precision: Any = "bfloat16" if case.device == "cuda" or case.model == "tiny" else "float32"
    run = replace(
        recipe.run,
        checkpointing="full" if case.recompute else "none",
        device=case.device,
        precision=precision,
    )
    return replace(recipe, task=task, run=run)


def make_image(side: int) -> Image.Image:
    """Returns an image of noise."""
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    )


def measure(case: Case) -> dict[str, Any]:
    """Measures, in a fresh process, times of each part in interleaved rounds, and the peak."""
    torch.set_grad_enabled(case.train)
    recipe, device = make_recipe(case), torch.device(case.device)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    task = build_meta_task(load_task(case.task), recipe.task, recipe.run)
    materialize(task, device, 0)
    calls = (
        build_steps(task, recipe, case, device) if case.train else build_passes(task, case, device)
    )
    results: dict[str, Any] = {
        "before": read_device_peak_memory(device),
        "processor": {},
        "wall": {},
    }
    for name, call in calls.items():
        call()
        results.setdefault(
            "peak", read_device_peak_memory(device)
        )  # of the first call, which includes all parts
        results["processor"][name], results["wall"][name] = [], []
    for _ in range(case.rounds):
        for name, call in calls.items():
            cpu_time, wall = time_pass(call, device)
            results["processor"][name].append(cpu_time)
            results["wall"][name].append(wall)
    return results


def build_passes(task: Task, case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns calls of the network, of its trunk, and of a prediction."""
    batch = to_device(
        task.collate([task.example({"id": "0", "image": make_image(case.size)}, False)]), device
    )
    stacked = batch if case.task == "coco" else {"image": torch.stack(list(batch["image"]))}
    task.eval()
    return {
        "whole": partial(task.outputs, stacked),
        "trunk": lambda: task.backbone(task.normalize_images(stacked)),
        "predict": partial(task.predict, batch),
    }


def build_steps(
    task: Task, recipe: Recipe, case: Case, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Returns a training step, and forward and backward of the trunk."""
    classes = CLASSES[case.task]
    record = {
        "id": "0",
        "image": make_image(IMAGE_SIZE),
        "objects": list(make_objects()),
        "label_map": make_label_map(classes),
        "labels": {"num_classes": classes},
    }
    batch: Batch = task.collate(
        [task.example(record, True, rng=np.random.default_rng(1))] * case.batch
    ) | {"step": 0, "steps": 1}
    optimizer, precision = make_optimizer(task, recipe.optim), make_autocast(recipe.run, device)

    def run_step() -> None:
        backward(
            task, [batch], sum_targets(task, [batch]), precision, partial(to_device, device=device)
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run_trunk() -> None:
        with precision:
            features = task.backbone(task.normalize_images(to_device(batch, device)))
        features.float().square().mean().backward()
        optimizer.zero_grad(set_to_none=True)

    return {"whole": run_step, "trunk": run_trunk}


def time_pass(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Returns CPU time and wall time in seconds, including the accelerator's work."""
    cpu_time, wall = time.process_time(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() - cpu_time, time.perf_counter() - wall


def read_device_peak_memory(device: torch.device) -> float:
    """Returns the peak bytes: of tensors on an accelerator, of the process on CPU."""
    return (
        float(torch.cuda.max_memory_allocated(device))
        if device.type == "cuda"
        else read_peak_memory()
    )


def run_in_process(case: Case) -> dict[str, Any]:
    """Runs `measure` in a fresh process; `peak` is 0 if the accelerator runs out of memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(asdict(case))]
    process = subprocess.run(command, capture_output=True, text=True)
    if "OutOfMemoryError" in process.stderr:
        return asdict(case) | {"peak": 0}
    if process.returncode:
        raise RuntimeError(f"{case}: {process.stderr[-3000:]}")
    return asdict(case) | json.loads(process.stdout.splitlines()[-1])


def format_case(results: dict[str, Any]) -> str:
    """Formats a row of the table."""
    clock = "wall" if results["device"] == "cuda" else "processor"
    medians = {name: statistics.median(values) for name, values in results.get(clock, {}).items()}
    label = f"{NAMES[results['task']]}, {'training step' if results['train'] else 'forward'}"
    label += (
        f" of {results['batch']}" * (results["batch"] > 1)
        + ", checkpointing" * results["recompute"]
    )
    if not medians:
        return f"| {label} | {results['size']} | out of memory | | | |"
    predict = f"{medians['predict']:.2f} s" if "predict" in medians else ""
    share = f"{medians['trunk'] / medians['whole']:.0%}"
    peak = f"{results['peak'] / 1e9:.2f} GB"
    return (
        f"| {label} | {results['size']} | {medians['whole']:.3g} s | {share} | {predict} | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", help="image sizes")
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--gpu", action="store_true", help="training alone, in bfloat16")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=(1, 4), help="with --gpu: images of a step"
    )
    parser.add_argument("--device", default="", help="with --gpu; cpu shows that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Case(**json.loads(args.one)))))
        return
    device = args.device or ("cuda" if args.gpu else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--gpu finds no CUDA device: give --device cpu --model tiny --sizes 64 to see that it "
            "runs"
        )
    general: dict[str, Any] = {
        "model": args.model,
        "device": device,
        "rounds": args.rounds,
        "threads": args.threads,
    }
    if args.gpu:
        sizes = args.sizes or (896, 1024)
        cases = [
            Case(task, size, train=True, recompute=recompute, batch=batch, **general)
            for task in RECIPES
            for size in sizes
            for batch in args.batch
            for recompute in (False, True)
        ]
    else:
        sizes = args.sizes or (512, 896, 1024)
        cases = [Case(task, size, **general) for task in RECIPES for size in sizes]
        cases += [
            Case(task, sizes[0], train=True, recompute=recompute, **general)
            for task in RECIPES
            for recompute in (False, True)
        ]
    results = []
    lines = ["| what | px | time | trunk | a prediction | peak |", "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    for case in cases:
        results.append(run_in_process(case))
        lines.append(format_case(results[-1]))
        print(lines[-1], flush=True)
    if args.json:
        save_results(args.json, "\n".join(lines), results)


if __name__ == "__main__":
    main()
