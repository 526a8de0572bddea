"""Runs of the demo's pretraining on the embedded world, of which the programs make their rows."""

from dataclasses import replace
from typing import Any

from benchmarks.learning.runs import Run

TOKENIZER_STEPS, PAIR_STEPS, PRETRAINING_STEPS = 400, 600, 300


def make_tokenizer(changes: str = "", **fields: Any) -> Run:
    """Returns the run of a visual tokenizer, by default of the demo's."""
    return replace(Run("codes", "vqkd", "demo", TOKENIZER_STEPS, changes), **fields)


def make_pairs(changes: str = "", **fields: Any) -> Run:
    """Returns the demo's first part of pretraining: pairs alone."""
    needs = {"visual_tokenizer": make_tokenizer()}
    run = Run("pairs", "pretrain", "demo_pairs", PAIR_STEPS, changes, needs=needs)
    return replace(run, **fields)


def make_pretraining(init: Run | None = None, changes: str = "", **fields: Any) -> Run:
    """Returns the demo's second part, of images, texts and pairs, by default after the first."""
    init = init or make_pairs()
    needs = {"init": init, "visual_tokenizer": init.needs["visual_tokenizer"]}
    run = Run("pretrain", "pretrain", "demo", PRETRAINING_STEPS, changes, needs=needs)
    return replace(run, **fields)


def make_images_only(tokenizer: Run, changes: str = "", **fields: Any) -> Run:
    """Returns pretraining on images alone, from initial values."""
    needs = {"visual_tokenizer": tokenizer}
    run = Run("images", "pretrain", "demo", PAIR_STEPS, changes, {"images": 64}, needs)
    return replace(run, **fields)


def make_contrastive(init: Run | None = None, *, steps: int) -> Run:
    """Returns the contrastive stage on pretraining's pairs, by default from initial values."""
    needs = {"init": init} if init else {}
    return Run("contrastive", "retrieval", "demo_itc", steps, needs=needs)
