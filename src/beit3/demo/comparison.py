"""`beit3 demo --full`: every demo recipe at full length, with and without pretraining, over several seeds.

What it trains: per seed a visual tokenizer and a pretraining; then VQA with few and with many labelled questions, from
each seed's pretrained weights and from scratch, at 1, 2 and 4 times the usual steps. The learning rate is tuned for
each side and label count on training questions that neither sees. Every run can be stopped and goes on; results.json
and results.md carry the figures, one row each, with their spread over seeds.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from beit3.data.loader import Source
from beit3.data.records import locate, write_text
from beit3.demo.probes import pretraining_figures
from beit3.demo.tour import USUAL, with_tokenizer
from beit3.recipe import Recipe
from beit3.report.page import write_report
from beit3.task import load
from beit3.tasks.vqa import VQA
from beit3.train.evaluate import predict
from beit3.train.log import duration
from beit3.train.loop import train
from beit3.train.root import embedded_root
from beit3.weights import store

SEEDS = (0, 1, 2)
LABELS = (1000, 8000)
LENGTHS = (1, 2, 4)
SIDES = ("pretrained", "scratch")
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
TUNING_QUESTIONS = (8000, 9000)
"""Training questions on which learning rates are compared: beyond the largest label count."""
STEPS = USUAL.vqa


def run(out: Path) -> Path:
    """Run or go on with the comparison in `out`; returns results.md."""
    started, console = time.monotonic(), Console(highlight=False)
    seeds = {seed: pretrain_seed(out / f"seed{seed}", seed, console) for seed in SEEDS}
    rates = {
        (labels, side): tune(out, labels, side, seeds[0]["weights"], console) for labels, side in product(LABELS, SIDES)
    }  # fmt: skip
    scores: dict[str, dict] = {}
    runs = list(product(LABELS, LENGTHS, SIDES, SEEDS))
    for number, (labels, length, side, seed) in enumerate(runs, 1):
        name = f"{labels}-{side}-{length}x-seed{seed}"
        console.print(f"[bold]questions {number}/{len(runs)}: {name}[/bold]")
        init = seeds[seed]["weights"] if side == "pretrained" else ""
        recipe = question_recipe(labels, rates[labels, side], steps=STEPS * length, seed=seed)
        scores[name] = train(recipe, VQA, out=out / "vqa" / name, init=init, label=name)
    results = {
        "seeds": {str(seed): found["figures"] for seed, found in seeds.items()},
        "rates": {f"{labels}-{side}": rate for (labels, side), rate in rates.items()},
        "questions": {name: score["accuracy"] for name, score in scores.items()},
        "most_frequent": next(iter(scores.values()))["most_frequent"],
        "minutes": (time.monotonic() - started) / 60,
    }
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    rows = [*learning_rows(results), *question_rows(results)]
    text = markdown(rows)
    write_text(out / "results.md", text)
    console.print(text)
    shown = [out / "seed0" / folder for folder in ("vqkd", "pairs", "pretrain")]
    write_report(shown, out / "report.html", title="BEiT-3 in miniature, at full length", table=rows)
    console.print(f"{out / 'results.md'} and {out / 'report.html'}   ({duration(time.monotonic() - started)})")
    return out / "results.md"


def pretrain_seed(out: Path, seed: int, console: Console) -> dict:
    """Visual tokenizer and pretraining of one seed at full length: weights directory and figures."""
    vqkd, pretrain = load("vqkd"), load("pretrain")
    console.print(f"[bold]seed {seed}: visual tokenizer and pretraining[/bold]")

    def seeded(recipe: Recipe, task) -> Recipe:
        return replace(recipe, data=replace(recipe.data, root=str(embedded_root(task))), run=replace(recipe.run, seed=seed))

    codes = train(seeded(vqkd.recipes["demo"], vqkd), vqkd, out=out / "vqkd", label=f"seed{seed} vqkd")
    init = ""
    for name in ("demo_pairs", "demo"):
        recipe = with_tokenizer(seeded(pretrain.recipes[name], pretrain), out / "vqkd" / "last")
        folder = {"demo_pairs": "pairs", "demo": "pretrain"}[name]
        train(recipe, pretrain, out=out / folder, init=init, label=f"seed{seed} {folder}")
        init = str(out / folder / "last")
    figures = pretraining_figures(out / "pretrain", cache=out / "figures.json")
    kept = {key: codes[key] for key in ("codebook_use", "perplexity", "num_codes")}
    return {"weights": init, "figures": figures | kept}


def question_recipe(labels: int, lr: float, *, steps: int, seed: int) -> Recipe:
    """The VQA demo recipe with so many labels, at this rate and length."""
    recipe = VQA.recipes["demo"]
    return replace(
        recipe, data=replace(recipe.data, root=str(embedded_root(VQA)), limit=labels), optim=replace(recipe.optim, lr=lr),
        run=replace(recipe.run, steps=steps, seed=seed, save_every=0),
    )  # fmt: skip


def tune(out: Path, labels: int, side: str, weights: str, console: Console) -> float:
    """The best of `RATES` for one side and label count at the usual steps, by questions set aside from training."""
    root = embedded_root(VQA)
    aside = Source(locate(root, "vqa", "main", "train"), root)
    questions = [aside[index] for index in range(*TUNING_QUESTIONS) if index < len(aside)]
    found = {}
    for lr in RATES:
        folder = out / "tune" / f"{labels}-{side}-{lr:g}"
        console.print(f"[bold]learning rate {lr:g} for {labels} questions, {side}[/bold]")
        recipe = question_recipe(labels, lr, steps=STEPS, seed=TUNING_SEED)
        train(recipe, VQA, out=folder, init=weights if side == "pretrained" else "", label=folder.name)
        task = store.load(folder / "last")
        found[lr] = VQA.score(predict(task, questions, batch_size=100), questions)["accuracy"]
        console.print(f"{folder.name}: {found[lr]:.3f} on questions set aside")
    return max(found, key=lambda lr: found[lr])


def spread(values: Sequence[float], form: str = ".1%") -> str:
    """Mean and, behind it, lowest to highest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def learning_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """What pretraining learnt, over seeds, beside the guess that needs no learning."""
    seeds = list(results["seeds"].values())

    def column(name: str, form: str = ".2f") -> str:
        return spread([seed[name] for seed in seeds], form)

    yield row("visual tokenizer: codes in use", column("codebook_use", ".0%"), "")
    yield row("visual tokenizer: perplexity", column("perplexity", ".1f"), f"of {seeds[0]['num_codes']:.0f} codes")
    yield row("hidden patches: loss (nats)", column("image_loss"), f"{column('nearest_patch')} from the nearest visible patch")
    yield row("hidden words of texts: loss (nats)", column("text_loss"), f"{column('frequency')} from word frequency")
    yield row("hidden words of pairs: loss (nats)", column("text_right"), f"{column('text_wrong')} with another's image")
    for kind in ("color", "shape", "size"):
        beside = f"{column(f'wrong/{kind}', '.1%')} with another's image"
        yield row(f"hidden {kind} words filled correctly", column(f"right/{kind}", ".1%"), beside)


def question_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """Questions answered from pretrained weights beside from scratch, per label count and length."""
    for labels, length in product(LABELS, LENGTHS):
        accuracy = {side: [results["questions"][f"{labels}-{side}-{length}x-seed{seed}"] for seed in SEEDS] for side in SIDES}
        what = f"questions answered, {labels} labels, {STEPS * length} steps, pretrained"
        rates = " and ".join(f"{results['rates'][f'{labels}-{side}']:g}" for side in SIDES)
        yield row(what, spread(accuracy["pretrained"]), f"{spread(accuracy['scratch'])} from scratch (rates {rates})")
    yield row("questions answered, most frequent answer", f"{results['most_frequent']:.1%}", "")


def row(what: str, measured: str, beside: str) -> dict[str, str]:
    return {"what": what, "measured": measured, "beside": beside}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose figures are means over the seeds, with lowest and highest in brackets."""
    lines = ["| what | measured | beside |", "|---|---|---|", *("| " + " | ".join(row.values()) + " |" for row in rows)]
    return "\n".join(lines) + "\n"
