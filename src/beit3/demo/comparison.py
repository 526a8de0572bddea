"""`beit3 demo --full`: every demo recipe at full length, with and without pretraining, over several
seeds.

What it trains: per seed a visual tokenizer and a pretraining; then VQA with few and with many
labelled questions, from
each seed's pretrained weights and from scratch, at 1, 2 and 4 times the usual steps; and every
other task from both. The
questions' learning rate is tuned for each side and label count on training questions that neither
sees. Every run can be
stopped and goes on; results.json and results.md carry the figures, one row each, with their spread
over seeds.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.demo.probes import pretraining_figures
from beit3.demo.tour import OTHERS, others_here, with_tokenizer
from beit3.files import write_text
from beit3.machine import count_cores
from beit3.recipe import Recipe
from beit3.report.page import write_report
from beit3.task import load_task
from beit3.tasks.vqa import VQA
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import predict
from beit3.training.log import format_duration
from beit3.training.loop import train
from beit3.weights import loading

SEEDS = (0, 1, 2)
LABELS = (1000, 8000)
LENGTHS = (1, 2, 4)
SIDES = ("pretrained", "scratch")
RATES = ((1e-4, 20.0), (3e-4, 20.0), (3e-4, 1.0), (1e-3, 1.0))
"""Learning rates that are compared, and how many times larger the head's is (20 in the release)."""
TUNING_SEED = 100
TUNING_QUESTIONS = (8000, 9000)
"""Training questions on which learning rates are compared: beyond the largest label count."""
STEPS = VQA.recipes["demo"].run.steps


def run(out: Path) -> Path:
    """Run or go on with the comparison in `out`; returns results.md."""
    started, console = time.monotonic(), Console(highlight=False)
    others_known = others_here(console)
    for task in ("pretrain", "vqkd", "vqa", *others_known):
        prepare_embedded_world(load_task(task))  # once, before processes ask for it side by side
    first = [(pretrain_seed, (out, seed)) for seed in SEEDS] + [
        (answer_questions, (out, labels, "scratch")) for labels in LABELS
    ]
    *figures, few, many = side_by_side(first)
    answers = few | many
    for found in side_by_side(
        [(answer_questions, (out, labels, "pretrained")) for labels in LABELS]
    ):
        answers |= found
    others: dict[str, dict] = {}
    for found in side_by_side(
        [(other_task, (out, name, side)) for name, side in product(others_known, SIDES)]
    ):
        others |= found
    results = {
        "seeds": dict(zip(map(str, SEEDS), figures, strict=True)),
        "questions": answers,
        "tasks": others,
        "minutes": (time.monotonic() - started) / 60,
    }
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    rows = [*learning_rows(results), *question_rows(results), *other_rows(results)]
    write_text(out / "results.md", markdown(rows))
    console.print(markdown(rows))
    shown = [out / "seed0" / folder for folder in ("vqkd", "pairs", "pretrain")]
    write_report(
        shown, out / "report.html", title="BEiT-3 in miniature, at full length", table=rows
    )
    console.print(
        f"{out / 'results.md'} and {out / 'report.html'}   "
        f"({format_duration(time.monotonic() - started)})"
    )
    return out / "results.md"


def side_by_side(jobs: Sequence[tuple[Callable[..., dict], tuple]]) -> list[dict]:
    """The jobs' results, in order; as many at a time as there are cores, each on one thread.

    Networks this small share two cores badly: two runs side by side were measured to do 700 records
    a second, one run on
    two threads 400 to 550.
    """
    workers = min(count_cores(), len(jobs))
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return [
            future.result()
            for future in [pool.submit(call, *arguments) for call, arguments in jobs]
        ]


def pretrain_seed(out: Path, seed: int) -> dict:
    """Visual tokenizer and pretraining of one seed at full length; its figures."""
    vqkd, pretrain, folder = load_task("vqkd"), load_task("pretrain"), out / f"seed{seed}"

    def seeded(recipe: Recipe, task: Any) -> Recipe:
        return replace(
            recipe,
            data=replace(recipe.data, root=str(prepare_embedded_world(task))),
            run=replace(recipe.run, seed=seed),
        )

    codes = train(
        seeded(vqkd.recipes["demo"], vqkd), vqkd, out=folder / "vqkd", label=f"seed{seed} vqkd"
    )
    init = ""
    for name, stage in (("demo_pairs", "pairs"), ("demo", "pretrain")):
        recipe = with_tokenizer(seeded(pretrain.recipes[name], pretrain), folder / "vqkd" / "last")
        train(recipe, pretrain, out=folder / stage, init=init, label=f"seed{seed} {stage}")
        init = str(folder / stage / "last")
    figures = pretraining_figures(folder / "pretrain", cache=folder / "figures.json")
    return figures | {key: codes[key] for key in ("codebook_use", "perplexity", "num_codes")}


def answer_questions(out: Path, labels: int, side: str) -> dict[str, dict]:
    """One side with so many labels: its learning rate tuned, then every length and seed; figures by
    name of the run."""
    rate = tune(out, labels, side)
    found = {}
    for length, seed in product(LENGTHS, SEEDS):
        name = f"{labels}-{side}-{length}x-seed{seed}"
        recipe = question_recipe(labels, rate, steps=STEPS * length, seed=seed)
        scores = train(recipe, VQA, out=out / "vqa" / name, init=start(out, side, seed), label=name)
        found[name] = {
            "accuracy": scores["accuracy"],
            "most_frequent": scores["most_frequent"],
            "rate": named(rate),
        }
    return found


def other_task(out: Path, name: str, side: str) -> dict[str, dict]:
    """One side of another task by its demo recipe, every seed; scores by name of the run."""
    kind, found = load_task(name), {}
    recipe = kind.recipes["demo"]
    for seed in SEEDS:
        label = f"{name}-{side}-seed{seed}"
        seeded = replace(
            recipe,
            data=replace(recipe.data, root=str(prepare_embedded_world(kind))),
            run=replace(recipe.run, seed=seed, save_every=0),
        )
        found[label] = train(
            seeded, kind, out=out / "tasks" / label, init=start(out, side, seed), label=label
        )
    return found


def start(out: Path, side: str, seed: int) -> str:
    """Where a side's fine-tuning begins: the seed's pretrained weights, or nothing."""
    return str(out / f"seed{seed}" / "pretrain" / "last") if side == "pretrained" else ""


def question_recipe(labels: int, rate: tuple[float, float], *, steps: int, seed: int) -> Recipe:
    """The VQA demo recipe with so many labels, at this rate and head's factor, and length."""
    recipe = VQA.recipes["demo"]
    return replace(
        recipe,
        data=replace(recipe.data, root=str(prepare_embedded_world(VQA)), limit=labels),
        optim=replace(recipe.optim, lr=rate[0], head_lr_scale=rate[1]),
        run=replace(recipe.run, steps=steps, seed=seed, save_every=0),
    )


def tune(out: Path, labels: int, side: str) -> tuple[float, float]:
    """The best of `RATES` for one side and label count at the usual steps, by questions set aside
    from training."""
    root = prepare_embedded_world(VQA)
    aside = RecordDataset(locate_split(root, "vqa", "main", "train"), root)
    questions = [aside[index] for index in range(*TUNING_QUESTIONS) if index < len(aside)]
    found = {}
    for rate in RATES:
        folder = out / "tune" / f"{labels}-{side}-{named(rate)}"
        recipe = question_recipe(labels, rate, steps=STEPS, seed=TUNING_SEED)
        train(recipe, VQA, out=folder, init=start(out, side, SEEDS[0]), label=f"tune {folder.name}")
        task = loading.load_weights(folder / "last")
        found[rate] = VQA.score(predict(task, questions, batch_size=100), questions)["accuracy"]
        print(f"{folder.name}: {found[rate]:.3f} on questions set aside", flush=True)
    return max(found, key=lambda rate: found[rate])


def named(rate: tuple[float, float]) -> str:
    """`0.0003-head-x20`."""
    return f"{rate[0]:g}-head-x{rate[1]:g}"


def spread(values: Sequence[float], form: str = ".1%") -> str:
    """Mean and, behind it, lowest to highest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def learning_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """What pretraining learnt, over seeds, beside the guess that needs no learning."""
    seeds = list(results["seeds"].values())

    def column(name: str, form: str = ".2f") -> str:
        return spread([seed[name] for seed in seeds], form)

    yield row("visual tokenizer: codes in use", column("codebook_use", ".0%"), "")
    yield row(
        "visual tokenizer: perplexity",
        column("perplexity", ".1f"),
        f"of {seeds[0]['num_codes']:.0f} codes",
    )
    yield row(
        "hidden patches: loss (nats)",
        column("image_loss"),
        f"{column('nearest_patch')} from the nearest visible patch",
    )
    yield row(
        "hidden words of texts: loss (nats)",
        column("text_loss"),
        f"{column('frequency')} from word frequency",
    )
    yield row(
        "hidden words of pairs: loss (nats)",
        column("text_right"),
        f"{column('text_wrong')} with another's image",
    )
    for prefix, how in (("single_", "one hidden at a time"), ("", "half of the caption hidden")):
        for kind in ("color", "shape", "size"):
            beside = f"{column(f'{prefix}wrong/{kind}', '.1%')} with another's image"
            yield row(
                f"{kind} words filled correctly, {how}",
                column(f"{prefix}right/{kind}", ".1%"),
                beside,
            )


def question_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """Questions answered from pretrained weights beside from scratch, per label count and
    length."""
    questions = results["questions"]
    for labels, length in product(LABELS, LENGTHS):
        runs = {
            side: [questions[f"{labels}-{side}-{length}x-seed{seed}"] for seed in SEEDS]
            for side in SIDES
        }
        accuracy = {side: spread([run["accuracy"] for run in runs[side]]) for side in SIDES}
        what = f"questions answered, {labels} labels, {STEPS * length} steps, pretrained"
        rates = " and ".join(runs[side][0]["rate"] for side in SIDES)
        yield row(
            what, accuracy["pretrained"], f"{accuracy['scratch']} from scratch (rates {rates})"
        )
    yield row(
        "questions answered, most frequent answer",
        f"{next(iter(questions.values()))['most_frequent']:.1%}",
        "",
    )


def other_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """The other tasks, from pretrained weights beside from scratch, at the demo recipes' steps."""
    for name, (what, score) in OTHERS.items():
        if f"{name}-{SIDES[0]}-seed{SEEDS[0]}" not in results["tasks"]:
            continue
        form = ".2f" if score == "cider" else ".1%"
        sides = [
            spread([results["tasks"][f"{name}-{side}-seed{seed}"][score] for seed in SEEDS], form)
            for side in SIDES
        ]
        yield row(
            f"{what}, {load_task(name).recipes['demo'].run.steps} steps, pretrained",
            sides[0],
            f"{sides[1]} from scratch",
        )


def row(what: str, measured: str, beside: str) -> dict[str, str]:
    return {"what": what, "measured": measured, "beside": beside}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose figures are means over the seeds, with lowest and highest in brackets."""
    lines = [
        "| what | measured | beside |",
        "|---|---|---|",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
