"""int8 and float32 on CPU: how fast BASE encodes at 224 px, and the scores of trained weights.

    python benchmarks/int8.py --json benchmarks/int8.json --score runs/flickr/best=data/flickr

Speed: the network of retrieval at its initial values, which do not affect speed. A round measures
the rate of a plain float32 product, then every form of the network once on the same input, so that
a noisy round is visible and affects all forms alike. Beside int8 stand float32 with packed weights;
float32 compiled, which shows what compilation alone gives; and bfloat16, which is fast where the
CPU has tiles for it (AMX) and slow elsewhere.

`--score WEIGHTS[=ROOT] ...`: a split of ROOT, or of the embedded world, scored in float32 and in
int8.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe import measure_product_rate, save_results
from torch import Tensor
from versus_torchscale import LENGTHS, PADDED

from beit3.data.batches import trim_padding
from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE
from beit3.model.packed import pack
from beit3.predict import load
from beit3.quantize import quantize
from beit3.task import Prediction, Task
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.training.evaluate import predict_sources, score_sources
from beit3.training.parallel import wrap_blocks
from beit3.training.sources import open_split

FORMS = FLOAT32, PACKED, COMPILED, BFLOAT16, INT8 = (
    "float32",
    "float32 packed",
    "float32 compiled",
    "bfloat16",
    "int8",
)


def make_inputs() -> dict[str, dict[str, Tensor]]:
    """Returns batches of retrieval by row of the table."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 224, 224, generator=generator)
    text = torch.randint(4, BASE.vocab_size, (8, PADDED), generator=generator)
    padding = torch.arange(PADDED) >= torch.tensor(LENGTHS[8])[:, None]
    return {
        "1 image": {"image": image[:1]},
        "8 images": {"image": image},
        f"8 texts of {PADDED}": {"text": text, "text_padding": torch.zeros_like(padding)},
        "8 captions": trim_padding({"text": text.masked_fill(padding, 1), "text_padding": padding}),
    }


def make_networks() -> tuple[dict[str, Task], float]:
    """Returns every form of the network, and the seconds that `quantize` took."""
    plain = (
        Retrieval(RetrievalConfig(model=BASE, image=Preprocessing(224)))
        .eval()
        .requires_grad_(False)
    )
    plain.init_weights(0)
    compiled, packed = deepcopy(plain), deepcopy(plain)
    wrap_blocks(compiled, compiled=True)
    pack(packed)
    quantized, start = deepcopy(plain), time.perf_counter()
    quantize(quantized)
    quantize_seconds = time.perf_counter() - start
    return {
        FLOAT32: plain,
        PACKED: packed,
        COMPILED: compiled,
        BFLOAT16: deepcopy(plain).bfloat16(),
        INT8: quantized,
    }, quantize_seconds


def encode(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns unit features [B, D] of the images or the texts of a batch."""
    dtype = next(task.parameters()).dtype
    with torch.inference_mode():
        make_inputs: dict[str, Any] = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch.items()
        }
        return next(iter(task.outputs(make_inputs).values()))


def time_call(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall time, and CPU time over all threads, in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def measure_speed(
    forms: Mapping[str, Task], batch: Mapping[str, Tensor], rounds: int
) -> dict[str, Any]:
    """Measures times of every form in interleaved rounds.

    Returns them with ratios to float32 in the same round and cosines with its features.
    """
    first_calls = {name: time_call(partial(encode, task, batch))[0] for name, task in forms.items()}
    exact = encode(forms[FLOAT32], batch)
    cosines = {
        name: float((encode(task, batch).float() * exact).sum(1).min())
        for name, task in forms.items()
    }
    rates: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(rounds):
        rates.append(measure_product_rate() / 1e9)
        for name, task in forms.items():
            taken[name].append(time_call(partial(encode, task, batch)))
    results: dict[str, Any] = {"product_gflops": [round(rate) for rate in rates]}
    for name, times in taken.items():
        clock, processor = zip(*times, strict=True)
        results[name] = {
            "ms": summarize([1e3 * value for value in clock]),
            "first_call_s": round(first_calls[name], 1),
            "cosine": round(cosines[name], 5),
            "times_faster": summarize(
                [base[0] / value for base, value in zip(taken[FLOAT32], clock, strict=True)]
            ),
            "times_less_processor": summarize(
                [base[1] / value for base, value in zip(taken[FLOAT32], processor, strict=True)]
            ),
        }
    return results


def summarize(values: list[float]) -> list[float]:
    """Returns [median, minimum, maximum]."""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


def measure_scores(argument: str, split: str) -> dict[str, Any]:
    """Scores a split in float32 and in int8, and compares features where predictions have them."""
    weights, _, root = argument.partition("=")
    task = load(weights).task
    sources = open_split(type(task), root, split)
    exact = predict_sources(task, sources, batch_size=32)
    quantized = predict_sources(quantize(task), sources, batch_size=32)
    pairs = [
        pair for name in exact for pair in zip(exact[name][0], quantized[name][0], strict=True)
    ]
    exact_scores, quantized_scores = (
        score_sources(type(task), predictions) for predictions in (exact, quantized)
    )
    format_table = {
        key: [round(100 * exact_scores[key], 2), round(100 * quantized_scores[key], 2)]
        for key in exact_scores
    }
    return {
        "weights": weights,
        "records": len(pairs),
        "float32 and int8, %": format_table,
        "cosine": cosines(pairs),
    }


def cosines(pairs: list[tuple[Prediction, Prediction]]) -> dict[str, list[float]]:
    """Returns [mean, minimum] of the cosines of each kind of feature."""
    results = {}
    for side in ("image", "texts"):
        similarities = [
            (np.atleast_2d(exact[side]) * np.atleast_2d(quantized[side])).sum(1)
            for exact, quantized in pairs
            if side in exact
        ]
        if similarities:
            results[side] = [
                round(float(value), 5)
                for value in (
                    np.concatenate(similarities).mean(),
                    np.concatenate(similarities).min(),
                )
            ]
    return results


def format_table(results: Mapping[str, Any]) -> str:
    """Formats medians (minimum to maximum) over the rounds, and the scores."""
    lines = [
        "| input | form | ms | times faster | times less processor time | lowest cosine |",
        "|---" * 6 + "|",
    ]
    for case, row in results.get("speed", {}).items():
        for name in FORMS:
            cells = (
                "{} ({} to {})".format(*row[name][key])
                for key in ("ms", "times_faster", "times_less_processor")
            )
            lines.append(f"| {case} | {name} | {' | '.join(cells)} | {row[name]['cosine']} |")
    if results["scores"]:
        lines += ["", "| weights | records | score | float32 | int8 |", "|---" * 5 + "|"]
    for row in results["scores"]:
        for key, (exact, quantized) in row["float32 and int8, %"].items():
            lines.append(
                f"| {'/'.join(Path(row['weights']).parts[-2:])} | {row['records']} | {key} | "
                f"{exact} % | {quantized} % |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--score", nargs="*", default=[], metavar="WEIGHTS[=ROOT]")
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "torchao": version("torchao"),
        "scores": [measure_scores(argument, args.split) for argument in args.score],
    }
    if args.rounds:
        forms, results["quantize_s"] = make_networks()
        results["speed"] = {
            case: measure_speed(forms, batch, args.rounds) for case, batch in make_inputs().items()
        }
    print(format_table(results))
    save_results(args.json, format_table(results), results)


if __name__ == "__main__":
    main()
