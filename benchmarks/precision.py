"""Number formats on CPU: rates, captions beside torchscale's, the memory's rate, scores.

    pip install --no-deps --target TORCHSCALE torchscale==0.3.0
    python benchmarks/precision.py --torchscale TORCHSCALE --json benchmarks/precision.json \
        --score runs/flickr/captioning/last=data/flickr

BASE at its initial values, which do not affect speed. In a round every form computes once on the
same input, so that other programs affect all alike; CPU time over all threads suffers less from
them than wall time. int8 compiles, which takes a minute at the start; `--forms` leaves it out.

Captions: beam search with 3 beams up to 16 tokens, at 224 px and at the 480 px of the release, in
the form that `precision="auto"` chooses, beside float32 and torchscale's network with the same
weights, decoded as the release does. A word reads the weights of all layers once: their bytes,
divided by the time of a word and by the rate at which this machine reads memory, are the share of
the memory's rate.

`--score WEIGHTS=ROOT ...`: a split of ROOT scored in float32 and in bfloat16.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from int8 import encode, time_call
from probe import measure_product_rate, save_results, seconds
from torch import Tensor, nn
from versus_torchscale import (
    CAPTION,
    SPECIAL_TOKENS,
    ReleasedNetwork,
    captions,
    copy_weights,
    import_torchscale,
)

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE
from beit3.model.generation import DecoderState
from beit3.model.packed import HalfHead, HalfLinear, pack
from beit3.precision import apply_precision, compare_precisions
from beit3.predict import load
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.training.evaluate import predict_sources, score_sources
from beit3.training.sources import open_split

FLOAT32, PACKED, TORCHSCALE = "float32", "float32 packed", "torchscale"
FORMS = (FLOAT32, PACKED, "bfloat16", "int8")
WORDS = CAPTION - 3
"""Steps of a search after the one that encodes the image."""


def change(task: Any, form: str) -> Any:
    """Returns a copy of a task in another form."""
    copy = deepcopy(task)
    return pack(copy) if form == PACKED else apply_precision(copy, form)


def measure_rounds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Measures [wall, CPU] seconds of every call in interleaved rounds, and product rates."""
    for call in calls.values():
        call(), call()  # so that all is compiled and packed
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    rates = []
    for turn in range(rounds):
        rates.append(measure_product_rate())
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            times[name].append(time_call(calls[name]))
    return {"times": times, "product": rates}


def get_ratios(times: Mapping[str, Sequence], base: str, name: str) -> list[float]:
    """Returns how many times faster a form is, by wall time and by CPU time, as medians."""
    return [
        statistics.median(
            base_times[clock] / form_times[clock]
            for base_times, form_times in zip(times[base], times[name], strict=True)
        )
        for clock in (0, 1)
    ]


# Images -------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_images(forms: Sequence[str], rounds: int, count: int = 8) -> dict[str, Any]:
    """Measures embedding `count` images of 224 px in each form."""
    exact = Retrieval(RetrievalConfig(model=BASE, image=Preprocessing(224))).eval()
    exact.init_weights(0)
    batch = {"image": torch.randn(count, 3, 224, 224)}
    choice = compare_precisions(exact)
    tasks = {form: exact if form == FLOAT32 else change(exact, form) for form in forms}
    expected = encode(exact, batch)
    cosines = {
        form: float((encode(task, batch) * expected).sum(1).min()) for form, task in tasks.items()
    }
    calls = {form: partial(encode, task, batch) for form, task in tasks.items()}
    return {"count": count, "choice": str(choice), "cosine": cosines} | measure_rounds(
        calls, rounds
    )


def format_images(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"auto for retrieval: {results['choice']}",
        "",
        f"| {results['count']} images of 224 px | images/s | times faster | by CPU time "
        "| lowest cosine |",
        "|---" * 5 + "|",
    ]
    for form, times in results["times"].items():
        rate = results["count"] / statistics.median(wall for wall, _ in times)
        wall, processor = get_ratios(results["times"], FLOAT32, form)
        lines.append(
            f"| {form} | {rate:.1f} | {wall:.2f} | {processor:.2f} | "
            f"{results['cosine'][form]:.5f} |"
        )
    return lines


# Captions -----------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_captions(size: int, torchscale: str, rounds: int) -> dict[str, Any]:
    """Measures captions of one image: torchscale, float32, packed, and what auto chooses."""
    model = replace(BASE, image_size=size)
    exact = Captioning(CaptioningConfig(model=model, image=Preprocessing(size))).eval()
    exact.init_weights(0)
    theirs = ReleasedNetwork(model).eval() if torchscale else None
    if theirs is not None:
        copy_weights(exact, theirs)
    choice = compare_precisions(exact)
    chosen = change(exact, choice.name)
    tasks = {FLOAT32: exact, PACKED: change(exact, PACKED), f"auto: {choice.name}": chosen}
    image = torch.randn(1, 3, size, size)
    calls: dict[str, Callable[[], Any]] = {
        form: partial(captions, task, image) for form, task in tasks.items()
    }
    if theirs is not None:
        calls[TORCHSCALE] = partial(theirs.captions, image)
    scores = {form: float(call()) for form, call in calls.items()}
    calls |= {f"{form}, image": partial(start, task, image) for form, task in tasks.items()}
    return {
        "size": size,
        "choice": str(choice),
        "score": scores,
        "bytes": {form: count_bytes_per_word(task, image) for form, task in tasks.items()},
    } | measure_rounds(calls, rounds)


def start(task: Captioning, image: Tensor) -> DecoderState:
    """Encodes the image and the first token."""
    return DecoderState(task.backbone, task.text_head, image, SPECIAL_TOKENS)


def count_bytes_per_word(task: Captioning, image: Tensor) -> int:
    """Counts the bytes of the weights that one step of a search multiplies."""
    state, num_bytes, hooks = start(task, image), 0, []

    def count(layer: nn.Module, *_: Any) -> None:
        nonlocal num_bytes
        is_float16 = isinstance(layer, HalfHead) and layer.packed_weight is not None
        num_bytes += layer.weight.nbytes // (2 if is_float16 else 1)  # type: ignore[operator,union-attr]

    for layer in task.modules():
        is_product = isinstance(layer, nn.Linear | HalfLinear) or hasattr(layer, "packed_rows")
        if is_product:
            hooks.append(layer.register_forward_hook(count))
    state.advance(torch.tensor([0, 0, 0]), torch.tensor([5, 6, 7]))
    for hook in hooks:
        hook.remove()
    return num_bytes


def measure_read_rate(num_bytes: int = 2**30) -> float:
    """Measures the bytes/s at which a sum over float32 reads memory, the best of five."""
    values = torch.ones(num_bytes // 4)
    return num_bytes / min(seconds(values.sum) for _ in range(5))


def format_captions(rows: Sequence[Mapping[str, Any]], read_rate: float) -> list[str]:
    lines = [
        f"Memory is read at {read_rate / 1e9:.1f} GB/s here.",
        "",
        "| captions of one image, 3 beams | ms | times torchscale | by CPU time | image, ms "
        "| a word, ms | MB of weights a word | of the memory's rate |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        times = row["times"]
        medians = {
            name: statistics.median(wall for wall, _ in values) for name, values in times.items()
        }
        for form in row["score"]:
            ratios = ["", ""]
            if TORCHSCALE in times:
                ratios = [f"{ratio:.2f}" for ratio in get_ratios(times, TORCHSCALE, form)]
            cells = [f"{row['size']} px, {form}", f"{1e3 * medians[form]:.0f}", *ratios]
            if form != TORCHSCALE:
                first = medians[f"{form}, image"]
                word = (medians[form] - first) / WORDS
                num_bytes = row["bytes"][form]
                cells += [f"{1e3 * first:.0f}", f"{1e3 * word:.1f}", f"{num_bytes / 1e6:.0f}"]
                cells.append(f"{num_bytes / word / read_rate:.0%}")
            else:
                cells += [""] * 4
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"auto at {row['size']} px: {row['choice']}" for row in rows)]


# Scores -------------------------------------------------------------------------------------------


def measure_scores(argument: str, split: str) -> dict[str, Any]:
    """Scores a split of WEIGHTS=ROOT in float32 and in bfloat16."""
    weights, _, root = argument.partition("=")
    exact = load(weights).task
    sources = open_split(type(exact), root, split)
    results = {"weights": weights}
    for form, task in ((FLOAT32, exact), ("bfloat16", change(exact, "bfloat16"))):
        predicted = predict_sources(task, sources, batch_size=8)
        results["records"] = sum(len(records) for _, records in predicted.values())
        results[form] = score_sources(type(task), predicted)
    return results


def format_scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "| weights | records | score | float32 | bfloat16 |", "|---" * 5 + "|"]
    for row in rows:
        label = "/".join(Path(row["weights"]).parts[-2:])
        for name, score in row[FLOAT32].items():
            lines.append(
                f"| {label} | {row['records']} | {name} | {100 * score:.2f} | "
                f"{100 * row['bfloat16'][name]:.2f} |"
            )
    return lines if rows else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchscale", default="", help="folder of `pip install --target`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=FORMS)
    parser.add_argument("--sizes", nargs="*", type=int, default=[224, 480])
    parser.add_argument("--score", nargs="*", default=[], metavar="WEIGHTS=ROOT")
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.torchscale:
        import_torchscale(options.torchscale)
    read_rate = measure_read_rate()
    results: dict[str, Any] = {"read_rate": read_rate, "captions": [], "scores": []}
    lines: list[str] = []
    if options.rounds and options.forms:
        results["images"] = measure_images(options.forms, options.rounds)
        lines += format_images(results["images"])
        print("\n".join(lines), flush=True)
    for size in options.sizes if options.rounds else ():
        row = measure_captions(size, options.torchscale, options.rounds)
        results["captions"].append(row)
        print("\n".join(format_captions([row], read_rate)), flush=True)
    if results["captions"]:
        lines += ["", *format_captions(results["captions"], read_rate)]
    results["scores"] = [measure_scores(argument, options.split) for argument in options.score]
    lines += format_scores(results["scores"])
    print("\n".join(format_scores(results["scores"])))
    if options.json:
        save_results(options.json, "\n".join(lines), results)


if __name__ == "__main__":
    main()
