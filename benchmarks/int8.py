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
from probe import probe, save
from torch import Tensor
from versus_torchscale import LENGTHS, PADDED

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE
from beit3.model.packed import pack
from beit3.predict import load
from beit3.quantize import quantize
from beit3.task import Prediction, Task, trim_padding
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.training.evaluate import predict_sources, score_sources
from beit3.training.parallel import wrap_blocks
from beit3.training.sources import open_split

FORMS = ALONE, PACKED, COMPILED, HALF, INT8 = (
    "float32",
    "float32 packed",
    "float32 compiled",
    "bfloat16",
    "int8",
)


def inputs() -> dict[str, dict[str, Tensor]]:
    """Batches of retrieval, one a row of the table."""
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


def networks() -> tuple[dict[str, Task], float]:
    """Every form of the network, and the seconds that `quantize` took."""
    plain = (
        Retrieval(RetrievalConfig(model=BASE, image=Preprocessing(224)))
        .eval()
        .requires_grad_(False)
    )
    plain.init_weights(0)
    compiled, packed = deepcopy(plain), deepcopy(plain)
    wrap_blocks(compiled, compiled=True)
    pack(packed)
    small, start = deepcopy(plain), time.perf_counter()
    quantize(small)
    taken = time.perf_counter() - start
    return {
        ALONE: plain,
        PACKED: packed,
        COMPILED: compiled,
        HALF: deepcopy(plain).bfloat16(),
        INT8: small,
    }, taken


def encode(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Unit features [B, D] of whichever side the batch has."""
    dtype = next(task.parameters()).dtype
    with torch.inference_mode():
        given: dict[str, Any] = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch.items()
        }
        return next(iter(task.outputs(given).values()))


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time over all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def speed(forms: Mapping[str, Task], batch: Mapping[str, Tensor], rounds: int) -> dict[str, Any]:
    """Times of every form in interleaved rounds, ratios to float32 in the same round, and cosines
    with its features."""
    first = {name: timed(partial(encode, task, batch))[0] for name, task in forms.items()}
    exact = encode(forms[ALONE], batch)
    cosines = {
        name: float((encode(task, batch).float() * exact).sum(1).min())
        for name, task in forms.items()
    }
    rates: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(rounds):
        rates.append(probe() / 1e9)
        for name, task in forms.items():
            taken[name].append(timed(partial(encode, task, batch)))
    row: dict[str, Any] = {"product_gflops": [round(rate) for rate in rates]}
    for name, times in taken.items():
        clock, processor = zip(*times, strict=True)
        row[name] = {
            "ms": spread([1e3 * value for value in clock]),
            "first_call_s": round(first[name], 1),
            "cosine": round(cosines[name], 5),
            "times_faster": spread(
                [theirs[0] / own for theirs, own in zip(taken[ALONE], clock, strict=True)]
            ),
            "times_less_processor": spread(
                [theirs[1] / own for theirs, own in zip(taken[ALONE], processor, strict=True)]
            ),
        }
    return row


def spread(values: list[float]) -> list[float]:
    """[median, lowest, highest]"""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


def scores(given: str, split: str) -> dict[str, Any]:
    """A split scored in float32 and in int8, and the cosines between features where the predictions
    are features."""
    weights, _, root = given.partition("=")
    task = load(weights).task
    sources = open_split(type(task), root, split)
    exact = predict_sources(task, sources, batch_size=32)
    close = predict_sources(quantize(task), sources, batch_size=32)
    pairs = [pair for name in exact for pair in zip(exact[name][0], close[name][0], strict=True)]
    before, after = (score_sources(type(task), found) for found in (exact, close))
    table = {key: [round(100 * before[key], 2), round(100 * after[key], 2)] for key in before}
    return {
        "weights": weights,
        "records": len(pairs),
        "float32 and int8, %": table,
        "cosine": cosines(pairs),
    }


def cosines(pairs: list[tuple[Prediction, Prediction]]) -> dict[str, list[float]]:
    """[mean, lowest] of each kind of feature."""
    found = {}
    for side in ("image", "texts"):
        each = [
            (np.atleast_2d(one[side]) * np.atleast_2d(other[side])).sum(1)
            for one, other in pairs
            if side in one
        ]
        if each:
            found[side] = [
                round(float(value), 5)
                for value in (np.concatenate(each).mean(), np.concatenate(each).min())
            ]
    return found


def table(found: Mapping[str, Any]) -> str:
    """Medians (lowest to highest) over the rounds, and the scores."""
    lines = [
        "| input | form | ms | times faster | times less processor time | lowest cosine |",
        "|---" * 6 + "|",
    ]
    for case, row in found.get("speed", {}).items():
        for name in FORMS:
            cells = (
                "{} ({} to {})".format(*row[name][key])
                for key in ("ms", "times_faster", "times_less_processor")
            )
            lines.append(f"| {case} | {name} | {' | '.join(cells)} | {row[name]['cosine']} |")
    if found["scores"]:
        lines += ["", "| weights | records | score | float32 | int8 |", "|---" * 5 + "|"]
    for row in found["scores"]:
        for key, (before, after) in row["float32 and int8, %"].items():
            lines.append(
                f"| {'/'.join(Path(row['weights']).parts[-2:])} | {row['records']} | {key} | "
                f"{before} % | {after} % |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the figures go here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--score", nargs="*", default=[], metavar="WEIGHTS[=ROOT]")
    parser.add_argument("--split", default="val")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "torchao": version("torchao"),
        "scores": [scores(each, given.split) for each in given.score],
    }
    if given.rounds:
        forms, found["quantize_s"] = networks()
        found["speed"] = {
            case: speed(forms, batch, given.rounds) for case, batch in inputs().items()
        }
    print(table(found))
    save(given.json, table(found), found)


if __name__ == "__main__":
    main()
