"""Exports: how far each mode is off, scores in int8, and onnxruntime's time beside ours.

    python benchmarks/export.py --json benchmarks/export.json --score runs/retrieval-demo

Parity: every mode of every task, TINY at its initial values, as `beit3 export` compares it: at two
batch sizes, lengths of text and image sizes. `vqkd`, the visual tokenizer, has no mode.

Speed: BASE at 224 px at its initial values, which do not affect speed. One image is encoded by
retrieval, 8 pairs by the fused network of vqa. A round measures the rate of a plain float32
product, then every form once on the same input, so that a noisy round affects all forms alike.

`--score WEIGHTS[=ROOT] ...`: a split of ROOT, or of the embedded world, scored by the network and
by its exports in float32 and int8.

What is not measured (`--tasks` without a task, `--rounds 0`, no `--score`) is kept from the file of
the results, with the date, commit and machine of its measurement.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from probe import measure_product_rate, save_results, seconds
from torch import Tensor

from beit3.data.views.preprocessing import Preprocessing
from beit3.export.description import count_bytes
from beit3.export.examples import make_examples
from beit3.export.export import compare_graph, export_task
from beit3.export.graphs import quantize_onnx, trace, write_onnx
from beit3.export.modes import (
    BATCH,
    COLUMNS,
    LENGTH,
    ROWS,
    TASK_MODES,
    choose_modes,
    list_modes,
    make_mode,
)
from beit3.export.sessions import open_session, run_session
from beit3.model.config import BASE, TINY
from beit3.predict import load
from beit3.recipe import TaskConfig
from beit3.task import Task, load_task
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.training.evaluate import predict_sources, score_sources
from beit3.training.sources import open_split

RECIPES = {"retrieval": "demo_matching"}
"""Task -> the recipe whose network has all its modes, where that is not `demo`."""
FORMS = NETWORK, ONNX, INT8 = "beit3", "onnxruntime", "onnxruntime int8"
PARTS = {"parity": "The errors", "speed": "The times", "scores": "The scores"}
"""Part of the results -> what it is called in a sentence."""
NUM_TOKENS = 16
"""Tokens of a text of the pairs."""


def make_tiny_task(name: str) -> Task:
    """Builds a task of the demo at its initial values."""
    task_class = load_task(name)
    config = TaskConfig(model=TINY, image=Preprocessing(32))
    recipe = RECIPES.get(name, "demo")
    if recipe in task_class.recipes:
        config = task_class.recipes[recipe].task
    if name == "vqa":
        config = replace(config, num_answers=20)  # type: ignore[call-arg]
    if name == "imagenet":
        config = replace(config, num_classes=20)  # type: ignore[call-arg]
    task = task_class(config)
    task.init_weights(0)
    return task.eval().requires_grad_(False)


def measure_parity(names: list[str]) -> list[dict[str, Any]]:
    """Compares all modes of these tasks with the network."""
    rows = []
    for name in names:
        task = make_tiny_task(name)
        with tempfile.TemporaryDirectory() as folder:
            written = export_task(task, Path(folder) / "out", modes=list_modes(task))
        for mode, program in dict.fromkeys((row.mode, row.program) for row in written.comparisons):
            mine = [
                row for row in written.comparisons if (row.mode, row.program) == (mode, program)
            ]
            rows.append(
                {
                    "task": name,
                    "mode": mode,
                    "program": program,
                    "error": max(row.error for row in mine),
                    "cosine": min(row.cosine for row in mine),
                }
            )
            print(rows[-1], flush=True)
    return rows


# Speed --------------------------------------------------------------------------------------------


def make_base_tasks() -> dict[str, tuple[Task, str, dict[str, int]]]:
    """Returns by row of the table the task, its mode and the sizes of its inputs."""
    config, image = replace(BASE, image_size=224), Preprocessing(224)
    side = 224 // BASE.patch_size
    retrieval = Retrieval(RetrievalConfig(model=config, image=image))
    vqa = VQA(VQAConfig(model=config, image=image))
    for task in (retrieval, vqa):
        task.init_weights(0)
        task.eval().requires_grad_(False)
    sizes = {ROWS: side, COLUMNS: side, LENGTH: NUM_TOKENS}
    return {
        "1 image": (retrieval, "image", {**sizes, BATCH: 1}),
        "8 pairs": (vqa, "pair", {**sizes, BATCH: 8}),
    }


def measure_speed(
    task: Task, mode_name: str, sizes: Mapping[str, int], rounds: int
) -> dict[str, Any]:
    """Exports BASE and measures times of every form in interleaved rounds."""
    mode = make_mode(task, mode_name)
    inputs = make_examples(task, mode, sizes)
    with tempfile.TemporaryDirectory() as folder:
        file, quantized = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        traced_sizes = {BATCH: 2, LENGTH: 5, ROWS: 9, COLUMNS: 10}
        started = time.perf_counter()
        program = trace(mode, make_examples(task, mode, traced_sizes))
        write_onnx(program, mode, file)
        export_seconds = time.perf_counter() - started
        comparisons = compare_graph(task, mode, program, file)
        quantize_onnx(file, quantized)
        sessions = {ONNX: open_session(file), INT8: open_session(quantized)}
        megabytes = {ONNX: count_bytes(file) / 1e6, INT8: count_bytes(quantized) / 1e6}
        calls: dict[str, Callable[[], list[Tensor]]] = {
            NETWORK: lambda: list(mode.network(*inputs.values())),
            ONNX: partial(run_session, sessions[ONNX], inputs),
            INT8: partial(run_session, sessions[INT8], inputs),
        }
        with torch.inference_mode():
            outputs = {name: call()[0].double().flatten() for name, call in calls.items()}
            rates, taken = [], {name: [] for name in calls}
            for _ in range(rounds):
                rates.append(measure_product_rate() / 1e9)
                for name, call in calls.items():
                    taken[name].append(seconds(call))
    exact = outputs[NETWORK]
    results: dict[str, Any] = {
        "product_gflops": [round(rate) for rate in rates],
        "export_s": round(export_seconds, 1),
        "error": max(row.error for row in comparisons),
    }
    for name, times in taken.items():
        ratios = [base / own for base, own in zip(taken[NETWORK], times, strict=True)]
        cosine = float(outputs[name] @ exact / (outputs[name].norm() * exact.norm()))
        results[name] = {
            "ms": summarize([1e3 * value for value in times]),
            "times_faster": summarize(ratios),
            "cosine": round(cosine, 6),
            "megabytes": round(megabytes.get(name, 0)),
        }
    return results


def summarize(values: list[float]) -> list[float]:
    """Returns [median, minimum, maximum]."""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


# Scores -------------------------------------------------------------------------------------------


def measure_scores(argument: str, split: str) -> dict[str, Any]:
    """Scores a split by the network and by its exports; values are percent."""
    weights, _, root = argument.partition("=")
    predictor = load(weights)
    task = predictor.task
    sources = open_split(type(task), root, split)
    tasks = {NETWORK: task}
    with tempfile.TemporaryDirectory() as folder:
        for name in (ONNX, INT8):
            out = Path(folder) / name
            modes = choose_modes(task)
            export_task(task, out, modes=modes, int8=name == INT8, report=predictor.report)
            tasks[name] = load(out).task
        scores, num_records = {}, 0
        for name, form in tasks.items():
            predictions = predict_sources(form, sources, batch_size=32)
            scores[name] = score_sources(type(task), predictions)
            num_records = sum(len(source[0]) for source in predictions.values())
    return {
        "weights": weights,
        "records": num_records,
        "scores": {
            key: {name: round(100 * scores[name][key], 2) for name in FORMS}
            for key in scores[NETWORK]
        },
    }


# Table --------------------------------------------------------------------------------------------


def format_table(results: Mapping[str, Any]) -> str:
    """Formats the largest errors, medians (minimum to maximum) of the times, and the scores."""
    lines = []
    if results["parity"]:
        lines += ["| task | mode | program | largest error | smallest cosine |", "|---" * 5 + "|"]
    for row in results["parity"]:
        lines.append(
            f"| {row['task']} | {row['mode']} | {row['program']} | {row['error']:.1e} | "
            f"{row['cosine']:.7f} |"
        )
    if results.get("speed"):
        lines += ["", "| BASE, 224 px | form | ms | times faster | cosine | file, MB |"]
        lines += ["|---" * 6 + "|"]
    for case, row in results.get("speed", {}).items():
        for name in FORMS:
            cells = ("{} ({} to {})".format(*row[name][key]) for key in ("ms", "times_faster"))
            size = row[name]["megabytes"] or "-"
            lines.append(
                f"| {case} | {name} | {' | '.join(cells)} | {row[name]['cosine']} | {size} |"
            )
    if results["scores"]:
        lines += ["", f"| weights | records | score | {' | '.join(FORMS)} |", "|---" * 6 + "|"]
    for row in results["scores"]:
        for key, values in row["scores"].items():
            cells = (f"{values[name]} %" for name in FORMS)
            lines.append(
                f"| {'/'.join(Path(row['weights']).parts[-2:])} | {row['records']} | {key} | "
                f"{' | '.join(cells)} |"
            )
    for part, origin in results.get("kept", {}).items():
        lines += ["", f"{PARTS[part]} were measured earlier: {origin}."]
    return "\n".join(lines).strip()


def keep_results(path: Path, results: dict[str, Any]) -> None:
    """Takes the parts that were not measured now from an earlier file, and notes their origin."""
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    figures = earlier["figures"]
    origin = f"{earlier['date']}, commit {earlier['commit']}, {earlier['machine']}"
    results["kept"] = {}
    for part in PARTS:
        if not results[part] and figures.get(part):
            results[part] = figures[part]
            results["kept"][part] = figures.get("kept", {}).get(part, origin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--rounds", type=int, default=9, help="0 measures no times")
    parser.add_argument("--tasks", nargs="*", default=list(TASK_MODES), help="tasks for parity")
    parser.add_argument("--score", nargs="*", default=[], metavar="WEIGHTS[=ROOT]")
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")},
        "scores": [measure_scores(argument, args.split) for argument in args.score],
        "parity": measure_parity(args.tasks),
        "speed": {},
    }
    if args.rounds:
        results["speed"] = {
            case: measure_speed(task, mode, sizes, args.rounds)
            for case, (task, mode, sizes) in make_base_tasks().items()
        }
    keep_results(args.json, results)
    print(format_table(results))
    save_results(args.json, format_table(results), results)


if __name__ == "__main__":
    main()
