"""`beit3 demo`: the whole way on the embedded world, in minutes on two cores.

World -> text tokenizer -> visual tokenizer -> pretraining -> questions answered from those weights
and from scratch -> a
short run of every other task from those weights -> one table and report.html. Every stage is a run
of its own below the
demo's directory: stopped anywhere, the same command goes on where it was, and finished stages are
not run again.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from beit3.demo.probes import pretraining_figures
from beit3.progress import show_progress
from beit3.recipe import Recipe
from beit3.report.page import write_report
from beit3.segmentation.head import check_transformers
from beit3.task import load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.log import format_duration
from beit3.training.loop import train
from beit3.weights import store

LABELS = 1000
"""Labelled questions that fine-tuning sees: few, so that what pretraining brought can show."""


@dataclass(frozen=True)
class Length:
    """How long each stage trains."""

    tokenizer: int
    grounding: int
    pretraining: int
    vqa: int
    others: Mapping[str, int]
    """Each of `OTHERS`."""
    world: str
    """Which embedded world: `default` or `small`."""


OTHERS = {
    "nlvr2": ("statements on two pictures judged rightly", "accuracy"),
    "captioning": ("captions: CIDEr", "cider"),
    "retrieval": ("captions and pictures that find each other: mean recall", "mean_recall"),
    "imagenet": ("pictures classified", "accuracy"),
    "coco": ("objects found: AP of boxes at half overlap", "box_ap50"),
    "ade20k": ("pixels: mean intersection over union", "miou"),
}
"""The other tasks: what is measured, and its name among the scores."""

USUAL = Length(
    tokenizer=400,
    grounding=1400,
    pretraining=450,
    vqa=300,
    world="default",
    others={
        "nlvr2": 120,
        "captioning": 120,
        "retrieval": 120,
        "imagenet": 120,
        "coco": 150,
        "ade20k": 150,
    },
)
FAST = Length(
    tokenizer=60,
    grounding=50,
    pretraining=20,
    vqa=30,
    others=dict.fromkeys(OTHERS, 8),
    world="small",
)


def run(out: Path, *, fast: bool = False) -> Path:
    """Run or go on with the tour in `out`; returns the report's path."""
    started, length = time.monotonic(), FAST if fast else USUAL
    console = Console(highlight=False)
    vqkd, pretrain, vqa = load_task("vqkd"), load_task("pretrain"), load_task("vqa")
    kinds = {name: load_task(name) for name in others_here(console)}
    with show_progress("writing the world") as advance:
        for task in (vqkd, pretrain, vqa, *kinds.values()):
            root = prepare_embedded_world(task, length.world, progress=advance)

    def stage(
        title: str, task: Any, recipe: Recipe, steps: int, folder: str, init: str = ""
    ) -> dict:
        console.print(f"[bold]{title}[/bold]")
        recipe = replace(
            recipe, data=replace(recipe.data, root=str(root)), run=replace(recipe.run, steps=steps)
        )
        return train(recipe, task, out=out / folder, init=init, label=folder)

    codes = stage(
        "visual tokenizer: images -> codes (VQ-KD)",
        vqkd,
        vqkd.recipes["demo"],
        length.tokenizer,
        "vqkd",
    )
    grounding, full = (
        with_tokenizer(pretrain.recipes[name], out / "vqkd" / "last")
        for name in ("demo_pairs", "demo")
    )
    stage(
        "pretraining, part 1: pairs, words hidden", pretrain, grounding, length.grounding, "pairs"
    )
    stage(
        "pretraining, part 2: images, texts and pairs",
        pretrain,
        full,
        length.pretraining,
        "pretrain",
        str(out / "pairs" / "last"),
    )
    recipe = replace(vqa.recipes["demo"], data=replace(vqa.recipes["demo"].data, limit=LABELS))
    tuned = stage(
        f"{LABELS} questions, from the pretrained weights",
        vqa,
        recipe,
        length.vqa,
        "vqa",
        str(out / "pretrain" / "last"),
    )
    scratch = stage(f"{LABELS} questions, from scratch", vqa, recipe, length.vqa, "vqa-scratch")
    others, weights = {}, str(out / "pretrain" / "last")
    for name, kind in kinds.items():
        others[name] = stage(
            f"{name}, from the pretrained weights",
            kind,
            kind.recipes["demo"],
            length.others[name],
            name,
            weights,
        )

    console.print("[bold]looking at what was learnt[/bold]")
    rows = table(
        codes,
        pretraining_figures(out / "pretrain", cache=out / "figures.json"),
        tuned,
        scratch,
        others,
    )
    show(console, rows)
    runs = [out / folder for folder in ("vqkd", "pairs", "pretrain", "vqa", "vqa-scratch", *kinds)]
    report = write_report(runs, out / "report.html", title="BEiT-3 in miniature", table=rows)
    console.print(f"report: {report.resolve()}   ({format_duration(time.monotonic() - started)})")
    return report


def others_here(console: Console) -> list[str]:
    """Those of `OTHERS` that this installation can train; what is left out is said."""
    try:
        check_transformers()
    except ValueError as lacking:
        console.print(f"without ade20k: {lacking}")
        return [name for name in OTHERS if name != "ade20k"]
    return list(OTHERS)


def with_tokenizer(recipe: Recipe, weights: Path) -> Recipe:
    """A pretraining recipe with its visual tokenizer's weights and its number of codes."""
    task, codebook = recipe.task, store.read_config(weights).config.model
    assert isinstance(task, PretrainConfig) and isinstance(codebook, VisualTokenizerConfig)
    return replace(
        recipe, task=replace(task, visual_tokenizer=str(weights), num_codes=codebook.num_codes)
    )


def table(
    codes: dict, learnt: dict, tuned: dict, scratch: dict, others: Mapping[str, dict]
) -> list[dict[str, str]]:
    """The demo's table: what was measured, beside the guess that needs no learning."""
    percent = "{:.1%}".format
    rows = [
        ("visual tokenizer: codes in use", percent(codes["codebook_use"]), ""),
        (
            "visual tokenizer: perplexity",
            f"{codes['perplexity']:.1f}",
            f"of {codes['num_codes']:.0f} codes",
        ),
        (
            "hidden patches: loss (nats)",
            f"{learnt['image_loss']:.2f}",
            f"{learnt['nearest_patch']:.2f} from the nearest visible patch",
        ),
        (
            "hidden words of texts: loss (nats)",
            f"{learnt['text_loss']:.2f}",
            f"{learnt['frequency']:.2f} from word frequency",
        ),
        (
            "hidden words of pairs: loss (nats)",
            f"{learnt['text_right']:.2f}",
            f"{learnt['text_wrong']:.2f} with another's image",
        ),
        *(attribute_row(kind, learnt) for kind in ("color", "shape", "size")),
        (
            "questions answered, pretrained",
            percent(tuned["accuracy"]),
            f"{percent(tuned['most_frequent'])} for the most frequent answer",
        ),
        (
            "questions answered, from scratch",
            percent(scratch["accuracy"]),
            "same network, same steps",
        ),
        *(other_row(name, scores) for name, scores in others.items()),
    ]
    return [
        {"what": what, "measured": measured, "beside": beside} for what, measured, beside in rows
    ]


def other_row(name: str, scores: Mapping[str, float]) -> tuple[str, str, str]:
    """A short run of another task, beside the guess that needs no learning where there is one."""
    what, score = OTHERS[name]
    measured = f"{scores[score]:.2f}" if score == "cider" else f"{scores[score]:.1%}"
    return (
        what,
        measured,
        f"{scores['most_frequent']:.1%} for the most frequent answer"
        if "most_frequent" in scores
        else "a short run",
    )


def attribute_row(kind: str, learnt: dict) -> tuple[str, str, str]:
    right, wrong = learnt[f"single_right/{kind}"], learnt[f"single_wrong/{kind}"]
    return (
        f"hidden {kind} words filled correctly",
        f"{right:.1%}",
        f"{wrong:.1%} with another's image",
    )


def show(console: Console, rows: list[dict[str, str]]) -> None:
    """Print the table."""
    printed = Table(*rows[0], title="BEiT-3 on the embedded world, held-out records")
    for row in rows:
        printed.add_row(*row.values())
    console.print(printed)
