"""Detection and segmentation of BASE: time and memory of a forward pass and of a training step, and
the trunk's share.

    python benchmarks/dense_speed.py --json benchmarks/dense_speed.json
    python benchmarks/dense_speed.py --gpu --json benchmarks/dense_gpu.json

One picture, random weights, float32, one thread; times are medians in processor seconds, which on
an idle core are those of
the clock. The networks are those of `coco base_1024` (windowed trunk, detector, 80 classes) and
`ade20k base_512` (adapter,
small head, 150 classes). A forward pass of detection scores the boxes of 1,000 proposals; a
prediction adds Soft-NMS, masks
and their outlines, or labels at the picture's size. Pictures for training are crowded: 63 objects,
32 classes. Each case is
measured in a process of its own; its peak is that of the whole process, libraries and weights
included.

--gpu: steps of BASE in bfloat16 with and without checkpointing, of trunk, adapter and head alike.
With --device cpu, --model
tiny and --sizes 64 it only proves that the program runs.
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
from probe import peak_memory, save

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
    """What one process measures."""

    task: str
    size: int
    train: bool = False
    recompute: bool = False
    """Of trunk, adapter and head."""
    model: str = "base"
    device: str = "cpu"
    batch: int = 1
    rounds: int = 3
    threads: int = 1


def recipe_of(case: Case) -> Recipe:
    """The published-size recipe at the case's model and size of picture."""
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


def picture(side: int) -> Image.Image:
    """Noise."""
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    )


def measure(case: Case) -> dict[str, Any]:
    """In the fresh process: times of each part in interleaved rounds, and the peak of the whole."""
    torch.set_grad_enabled(case.train)
    recipe, device = recipe_of(case), torch.device(case.device)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    task = build_meta_task(load_task(case.task), recipe.task, recipe.run)
    materialize(task, device, 0)
    calls = steps(task, recipe, case, device) if case.train else passes(task, case, device)
    found: dict[str, Any] = {"before": memory(device), "processor": {}, "wall": {}}
    for name, call in calls.items():
        call()
        found.setdefault("peak", memory(device))  # of the first call, which is the whole
        found["processor"][name], found["wall"][name] = [], []
    for _ in range(case.rounds):
        for name, call in calls.items():
            processor, wall = timed(call, device)
            found["processor"][name].append(processor)
            found["wall"][name].append(wall)
    return found


def passes(task: Task, case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """The network, its trunk alone, and a whole prediction."""
    batch = to_device(
        task.collate([task.example({"id": "0", "image": picture(case.size)}, False)]), device
    )
    stacked = batch if case.task == "coco" else {"image": torch.stack(list(batch["image"]))}
    task.eval()
    return {
        "whole": partial(task.outputs, stacked),
        "trunk": lambda: task.backbone(task.pixels(stacked)),
        "predict": partial(task.predict, batch),
    }


def steps(
    task: Task, recipe: Recipe, case: Case, device: torch.device
) -> dict[str, Callable[[], object]]:
    """A training step, and the trunk's forward and backward pass alone."""
    classes = CLASSES[case.task]
    record = {
        "id": "0",
        "image": picture(IMAGE_SIZE),
        "objects": list(make_objects()),
        "label_map": make_label_map(classes),
        "labels": {"num_classes": classes},
    }
    batch: Batch = task.collate(
        [task.example(record, True, rng=np.random.default_rng(1))] * case.batch
    ) | {"step": 0, "steps": 1}
    optimizer, precision = make_optimizer(task, recipe.optim), make_autocast(recipe.run, device)

    def whole() -> None:
        backward(
            task, [batch], sum_targets(task, [batch]), precision, partial(to_device, device=device)
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def trunk() -> None:
        with precision:
            features = task.backbone(task.pixels(to_device(batch, device)))
        features.float().square().mean().backward()
        optimizer.zero_grad(set_to_none=True)

    return {"whole": whole, "trunk": trunk}


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of the processor's and of the clock's, an accelerator waited for."""
    processor, wall = time.process_time(), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() - processor, time.perf_counter() - wall


def memory(device: torch.device) -> float:
    """Most bytes so far: of tensors on an accelerator, of the process on a CPU."""
    return (
        float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_memory()
    )


def alone(case: Case) -> dict[str, Any]:
    """`measure` in a process of its own; `peak` 0 where the accelerator's memory does not hold the
    case."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if "OutOfMemoryError" in done.stderr:
        return asdict(case) | {"peak": 0}
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    return asdict(case) | json.loads(done.stdout.splitlines()[-1])


def described(found: dict[str, Any]) -> str:
    """A row."""
    clock = "wall" if found["device"] == "cuda" else "processor"
    middle = {name: statistics.median(values) for name, values in found.get(clock, {}).items()}
    what = f"{NAMES[found['task']]}, {'training step' if found['train'] else 'forward'}"
    what += f" of {found['batch']}" * (found["batch"] > 1) + ", checkpointing" * found["recompute"]
    if not middle:
        return f"| {what} | {found['size']} | out of memory | | | |"
    predict = f"{middle['predict']:.2f} s" if "predict" in middle else ""
    share = f"{middle['trunk'] / middle['whole']:.0%}"
    return f"| {what} | {found['size']} | {middle['whole']:.3g} s | {share} | {predict} | {found['peak'] / 1e9:.2f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the pictures")
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--gpu", action="store_true", help="training alone, in bfloat16")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=(1, 4), help="with --gpu: pictures of a step"
    )
    parser.add_argument("--device", default="", help="with --gpu; cpu proves that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.one:
        print(json.dumps(measure(Case(**json.loads(known.one)))))
        return
    device = known.device or ("cuda" if known.gpu else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--gpu finds no CUDA device: give --device cpu --model tiny --sizes 64 to see that it "
            "runs"
        )
    general: dict[str, Any] = {
        "model": known.model,
        "device": device,
        "rounds": known.rounds,
        "threads": known.threads,
    }
    if known.gpu:
        sizes = known.sizes or (896, 1024)
        cases = [
            Case(task, size, train=True, recompute=recompute, batch=batch, **general)
            for task in RECIPES
            for size in sizes
            for batch in known.batch
            for recompute in (False, True)
        ]
    else:
        sizes = known.sizes or (512, 896, 1024)
        cases = [Case(task, size, **general) for task in RECIPES for size in sizes]
        cases += [
            Case(task, sizes[0], train=True, recompute=recompute, **general)
            for task in RECIPES
            for recompute in (False, True)
        ]
    found = []
    lines = ["| what | px | time | trunk | a prediction | peak |", "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    for case in cases:
        found.append(alone(case))
        lines.append(described(found[-1]))
        print(lines[-1], flush=True)
    if known.json:
        save(known.json, "\n".join(lines), found)


if __name__ == "__main__":
    main()
