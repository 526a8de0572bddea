"""Panels of the visual tokenizer: how often its codes are used, and what they look like."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from beit3.data.loader import RecordDataset
from beit3.report.bars import compute_usage, draw_usage_bars
from beit3.report.cards import render_number_line
from beit3.report.images import (
    assemble_patches,
    cut_into_patches,
    draw_hatching,
    render_image,
    to_channels_last,
)
from beit3.report.panel_inputs import (
    Panel,
    load_run_weights,
    make_panel,
    make_title_suffix,
    open_run_records,
    pick_evenly,
)
from beit3.report.runs import Run
from beit3.task import Task
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.visual import VisualTokenizer
from beit3.training.evaluate import iterate_batches

MAX_PATCHES = 20_000
"""Patches that mean patches are computed from: 1250 images of the embedded world, or 102 images of
224 pixels. Both take seconds."""

MAX_TILES = 256
"""Codes in the mosaic, the most frequent ones."""

TILES_PER_ROW = 16

NUM_IMAGES = 12
"""Images shown as mean patches of their codes."""

BATCH_SIZE = 64


@dataclass(frozen=True)
class CodeStatistics:
    """The mean patch and the count of each of K codes."""

    mean_patches: np.ndarray
    """uint8 [K, s, s, 3]; hatched for codes with count 0."""
    counts: np.ndarray
    """Patches with this code [K]."""


TokenizerFunction = Callable[[], tuple[VQKD, CodeStatistics]]
"""Returns what `load_tokenizer` returns, which is computed once for both panels of a run."""


@torch.no_grad()
def compute_code_statistics(
    tokenizer: VisualTokenizer, task: Task, dataset: RecordDataset
) -> CodeStatistics:
    """Computes mean patches and counts of codes over some `MAX_PATCHES` patches, evenly spaced.

    `task` makes the examples; their field `token_image` goes into the visual tokenizer.
    """
    patch_size, num_codes = tokenizer.config.patch_size, tokenizer.config.num_codes
    max_images = max(1, MAX_PATCHES // tokenizer.config.encoder.num_patches)
    sums = np.zeros((num_codes, patch_size, patch_size, 3))
    counts = np.zeros(num_codes, dtype=np.int64)
    for batch in iterate_batches(task, pick_evenly(dataset, max_images), BATCH_SIZE):
        images = to_channels_last(batch["token_image"])
        patches = np.concatenate([cut_into_patches(image, patch_size) for image in images])
        codes = tokenizer.tokenize(batch["token_image"]).numpy().reshape(-1)
        np.add.at(sums, codes, patches)
        counts += np.bincount(codes, minlength=num_codes)
    means = (sums / np.maximum(1, counts)[:, None, None, None]).round().astype(np.uint8)
    means[counts == 0] = draw_hatching(patch_size, patch_size)
    return CodeStatistics(means, counts)


def make_vqkd_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields for each run a panel of its codebook, and one of images in mean patches of codes."""
    for run in runs:
        suffix = make_title_suffix(run, runs)
        get_tokenizer = cache(partial(load_tokenizer, run))
        lead = (
            "How often each code is given to held-out images, and what its patches look like on "
            "average."
        )
        yield make_panel(
            f"The codebook{suffix}", lead, partial(_render_codebook, run, get_tokenizer)
        )
        lead = (
            "Held-out images, and below each the same image with every patch replaced by the "
            "average patch of its code."
        )
        yield make_panel(
            f"Images in codes{suffix}", lead, partial(_render_code_images, run, get_tokenizer)
        )


def load_tokenizer(run: Run) -> tuple[VQKD, CodeStatistics]:
    """Loads a run's visual tokenizer and computes its statistics over training images."""
    task = load_run_weights(run, VQKD)
    records = open_run_records(run, "main", "train")
    return task, compute_code_statistics(task.backbone, task, records)


def _render_codebook(run: Run, get_tokenizer: TokenizerFunction) -> str:
    """Returns usage of the codebook on held-out images and the mean patches of training images."""
    task, training = get_tokenizer()
    held_out = compute_code_statistics(task.backbone, task, open_run_records(run, "main", "val"))
    order = np.argsort(-training.counts, kind="stable")[:MAX_TILES]
    used_fraction, perplexity = compute_usage(held_out.counts)
    numbers = render_number_line(
        (f"{used_fraction:.0%}", f"of {len(held_out.counts)} codes in use"),
        (f"{perplexity:.1f}", "perplexity"),
    )
    all_shown = len(order) == len(training.counts)
    selection = "" if all_shown else f" (the {len(order)} most frequent)"
    caption = f"average patch of each code{selection}, most frequent first; hatched = never given"
    grid = (-(-len(order) // TILES_PER_ROW), TILES_PER_ROW)
    mosaic = assemble_patches(training.mean_patches[order], grid, gap=1)
    return (
        f'{numbers}<div class="wide"><figure>{draw_usage_bars(held_out.counts)}</figure>'
        f"<figure>{render_image(mosaic, caption, sharp=True)}"
        f"<figcaption>{caption}</figcaption></figure></div>"
    )


@torch.no_grad()
def _render_code_images(run: Run, get_tokenizer: TokenizerFunction) -> str:
    """Returns pairs of an image and the same image in mean patches of its codes."""
    task, statistics = get_tokenizer()
    records = pick_evenly(open_run_records(run, "main", "val"), NUM_IMAGES)
    batch = task.collate([task.example(record, False) for record in records])
    codes = task.outputs(batch)["codes"].numpy()
    patch_size = task.config.model.patch_size
    figures = []
    images = to_channels_last(batch["token_image"])
    for number, (image, image_codes) in enumerate(zip(images, codes, strict=True), start=1):
        grid = (image.shape[0] // patch_size, image.shape[1] // patch_size)
        rebuilt = assemble_patches(statistics.mean_patches[image_codes], grid)
        original_tag = render_image(image, f"held-out image {number}")
        rebuilt_tag = render_image(rebuilt, f"image {number} in average patches")
        figures.append(f"<figure>{original_tag}{rebuilt_tag}</figure>")
    return f'<div class="pairs">{"".join(figures)}</div>'
