"""What a trained network sees and says, as HTML: panels per task, each with pictures and a sentence
on what they show.

`PANELS`: task name -> function(runs of that task) -> panels; here are those of tokenizers and
pretraining. Weights are
read from best/, else last/; records are the held-out ones of the run's own root. Pixels cross inner
borders as uint8
[H, W, 3]; a patch of s x s as [s, s, 3].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import islice, repeat

import numpy as np
import torch
from torch import Tensor

from beit3.report.answers import (
    captioning_panels,
    imagenet_panels,
    nlvr2_panels,
    retrieval_panels,
    vqa_panels,
)
from beit3.report.curves import usage_bars, usage_figures
from beit3.report.dense import ade20k_panels, coco_panels
from beit3.report.panel_inputs import Panel, panel, records, spread, weights
from beit3.report.pictures import assemble, cut, hatch, picture, pixels
from beit3.report.runs import Run
from beit3.task import Batch, Record, Task
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer
from beit3.training.evaluate import iterate_batches

MAX_PATCHES = 20_000
"""Patches behind the mean patches: 1250 pictures of the embedded world or 102 of 224 pixels, both
in seconds."""

MAX_TILES, COUNTED_PAIRS = 256, 128
"""Codes in the mosaic, the commonest; held-out pairs behind the shares of rightly named words."""


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels of runs of one task; none for a task without any."""
    return list(PANELS[runs[0].task](runs)) if runs and runs[0].task in PANELS else []


def vqkd_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Codebook usage, what each code looks like, and pictures as their codes see them."""
    for run, name in named(runs):
        lead = (
            "How often each code is given to held-out pictures, and what its patches look like on "
            "average."
        )
        yield panel(f"The codebook{name}", lead, partial(_codebook, run))
        lead = (
            "Held-out pictures, and beneath each the same with every patch replaced by its code's "
            "average."
        )
        yield panel(f"Pictures in codes{name}", lead, partial(_code_maps, run))


def pretrain_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Hidden patches filled in as codes, hidden words filled in with and without the picture."""
    for run, name in named(runs):
        lead = (
            "Held-out pictures with patches hidden, filled in with the average patches of the "
            "guessed codes."
        )
        yield panel(f"Hidden patches{name}", lead, partial(_hidden_patches, run))
        lead = (
            "Captions of held-out pictures with words hidden, filled in with the picture in view "
            "and without it."
        )
        yield panel(f"Hidden words{name}", lead, partial(_hidden_words, run))


PANELS: Mapping[str, Callable[[Sequence[Run]], Iterable[Panel]]] = {
    "vqkd": vqkd_panels,
    "pretrain": pretrain_panels,
    "vqa": vqa_panels,
    "nlvr2": nlvr2_panels,
    "captioning": captioning_panels,
    "retrieval": retrieval_panels,
    "imagenet": imagenet_panels,
    "coco": coco_panels,
    "ade20k": ade20k_panels,
}


def named(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Runs with what a title adds to tell them apart."""
    return [(run, f": {run.label}" if len(runs) > 1 else "") for run in runs]


def figures(*pairs: tuple[str, str]) -> str:
    """Large figures, each with the words that follow it."""
    spans = (f"<span><b>{value}</b> {escape(words)}</span>" for value, words in pairs)
    return f'<p class="figures">{" ".join(spans)}</p>'


# Visual tokenizer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeBook:
    """What stands behind each code: its mean patch [K, s, s, 3] uint8, hatched where `counts` [K]
    is 0."""

    patches: np.ndarray
    counts: np.ndarray


@torch.no_grad()
def code_book(network: VisualTokenizer, task: Task, found: Iterable[Record]) -> CodeBook:
    """Mean patches and counts of the codes over the first `MAX_PATCHES` patches of records, read as
    `task` does."""
    side, num_codes = network.config.patch_size, network.config.num_codes
    limit = max(1, MAX_PATCHES // network.config.encoder.num_patches)
    sums, counts = np.zeros((num_codes, side, side, 3)), np.zeros(num_codes, dtype=np.int64)
    for batch in iterate_batches(task, islice(iter(found), limit), 64):
        codes = network.tokenize(batch["token_image"]).numpy().reshape(-1)
        np.add.at(
            sums,
            codes,
            np.concatenate([cut(image, side) for image in pixels(batch["token_image"])]),
        )
        counts += np.bincount(codes, minlength=num_codes)
    means = (sums / np.maximum(1, counts)[:, None, None, None]).round().astype(np.uint8)
    means[counts == 0] = hatch(side, side)
    return CodeBook(means, counts)


def _codebook(run: Run) -> str:
    tokenizer = weights(run, VQKD)
    held_out = code_book(tokenizer.backbone, tokenizer, records(run, "main", "val"))
    seen = code_book(tokenizer.backbone, tokenizer, records(run, "main", "train"))
    order = np.argsort(-seen.counts, kind="stable")[:MAX_TILES]
    share, perplexity = usage_figures(held_out.counts)
    rest = "" if len(order) == len(seen.counts) else f" (the {len(order)} commonest)"
    caption = f"average patch of each code{rest}, commonest first; hatched = never given"
    mosaic = assemble(seen.patches[order], (-(-len(order) // 16), 16), gap=1)
    return (
        figures(
            (f"{share:.0%}", f"of {len(held_out.counts)} codes in use"),
            (f"{perplexity:.1f}", "perplexity"),
        )
        + f'<div class="wide"><figure>{usage_bars(held_out.counts)}</figure>'
        + f"<figure>{picture(mosaic, caption, mosaic=True)}"
        f"<figcaption>{caption}</figcaption></figure></div>"
    )


@torch.no_grad()
def _code_maps(run: Run) -> str:
    tokenizer = weights(run, VQKD)
    book = code_book(tokenizer.backbone, tokenizer, records(run, "main", "train"))
    batch = tokenizer.collate(
        [tokenizer.example(record, False) for record in spread(records(run, "main", "val"), 12)]
    )
    codes = tokenizer.outputs(batch)["codes"].numpy()
    side = tokenizer.config.model.patch_size
    shown = []
    for number, (image, row) in enumerate(
        zip(pixels(batch["token_image"]), codes, strict=True), start=1
    ):
        rebuilt = assemble(book.patches[row], (image.shape[0] // side, image.shape[1] // side))
        above, below = f"held-out picture {number}", f"picture {number} in average patches"
        shown.append(f"<figure>{picture(image, above)}{picture(rebuilt, below)}</figure>")
    return f'<div class="pairs">{"".join(shown)}</div>'


# Pretraining --------------------------------------------------------------------------------------


def trained_on(run: Run, kind: str) -> list[str]:
    """The sources in which this run hid `kind` ("image" or "text"), the source of that kind alone
    first."""
    visited = [name for name in (f"{kind}s", "pairs") if run.recipe["data"]["batch"].get(name)]
    other = {"image": "text_only", "text": "image_only"}[kind]
    return [
        name
        for name in visited
        if name != "pairs" or run.recipe["task"].get("pair_masking") != other
    ]


@torch.no_grad()
def _hidden_patches(run: Run) -> str:
    sources = trained_on(run, "image")
    if not sources:
        raise ValueError(
            "this run hid no patches in training, so it has not learnt to fill them in"
        )
    task = weights(run, Pretrain)
    if task.visual_tokenizer is None:
        raise ValueError("these weights name no visual tokenizer, so their codes cannot be shown")
    book = code_book(task.visual_tokenizer, task, records(run, sources[0], "train"))
    examples = (
        task.example(record, False) for record in spread(records(run, sources[0], "val"), 24)
    )
    masked = [example for example in examples if example["image_mask"].any()]
    batch = task.collate(masked[:: max(1, len(masked) // 6)][:6])
    guesses = task.outputs(batch)["image_logits"].argmax(-1).numpy()
    truth, masks = task.compute_codes(batch).numpy(), batch["image_mask"].numpy()
    rows = map(patch_row, pixels(batch["token_image"]), masks, guesses, truth, repeat(book))
    heads = "".join(
        f"<span>{name}</span>" for name in ("picture", "as seen", "filled in", "true codes")
    )
    return (
        f'<div class="quads">{"".join(f"<div class=quad>{heads}{row}</div>" for row in rows)}</div>'
    )


def patch_row(
    image: np.ndarray, mask: np.ndarray, guess: np.ndarray, true: np.ndarray, book: CodeBook
) -> str:
    """Four pictures of one masked image and how many of its hidden patches were named exactly.

    image [H, W, 3]; mask [P] bool; guess and true: codes [P].
    """
    side = book.patches.shape[1]
    grid = (image.shape[0] // side, image.shape[1] // side)
    visible = cut(image, side)
    masked = np.where(mask[:, None, None, None], hatch(side, side), visible)
    filled = np.where(mask[:, None, None, None], book.patches[guess], visible)
    right, hidden = int((guess == true)[mask].sum()), int(mask.sum())
    shown = (
        picture(image, "a held-out picture"),
        picture(assemble(masked, grid), f"the same with {hidden} of {len(mask)} patches hidden"),
        picture(assemble(filled, grid), "its hidden patches filled in from predicted codes"),
        picture(
            assemble(book.patches[true], grid),
            "the whole picture in average patches of its true codes",
        ),
    )
    return f"{''.join(shown)}<small>{right} of {hidden} hidden patches named exactly</small>"


@torch.no_grad()
def _hidden_words(run: Run) -> str:
    if "pairs" not in trained_on(run, "text"):
        raise ValueError(
            "this run hid no words of image-text pairs in training, so it has not learnt to fill "
            "them in"
        )
    task = weights(run, Pretrain, frozen=False)
    batch = word_batch(task, spread(records(run, "pairs", "val"), COUNTED_PAIRS))
    guesses = (fill_words(task, batch, seeing=True), fill_words(task, batch, seeing=False))
    hidden = batch["text_target"] != IGNORE_INDEX
    seeing, blind = (
        float((guess == batch["text_target"])[hidden].float().mean()) for guess in guesses
    )
    caveat = (
        ""
        if run.recipe["data"]["batch"].get("texts")
        else " It has never trained on a text without a picture."
    )
    rows = np.unique(np.linspace(0, len(batch["id"]) - 1, 8).round().astype(int))
    cards = "".join(word_card(task, batch, guesses, row) for row in rows)
    return (
        figures(
            (f"{seeing:.0%}", "of hidden words right with the picture"),
            (f"{blind:.0%}", "without it"),
        )
        + f"<p>Over {len(batch['id'])} held-out pairs.{caveat} "
        + '<mark class="right">✓ right</mark> '
        '<mark class="wrong">✗ wrong <i>true word</i></mark></p>'
        + f'<div class="cards">{cards}</div>'
    )


def word_batch(task: Pretrain, found: Sequence[Record]) -> Batch:
    """Pairs whose every chosen word is hidden; evaluation itself leaves a tenth and replaces a
    tenth."""
    examples = [task.example(record, False) for record in found]
    examples = [example for example in examples if (example["text_target"] != IGNORE_INDEX).any()]
    if not examples:
        raise ValueError("no held-out pair has a hidden word")
    batch = task.collate(examples)
    return batch | {
        "text": batch["text"].masked_fill(batch["text_target"] != IGNORE_INDEX, task.tokenizer.mask)
    }


def fill_words(task: Pretrain, batch: Batch, *, seeing: bool) -> Tensor:
    """Likeliest ids [B, L], with the image in view or of the text alone; few at a time, since
    logits are [B, L, V]."""
    chosen = ("text", "text_padding", "image", "image_mask") if seeing else ("text", "text_padding")
    names = [name for name in chosen if name in batch]
    parts = zip(*(batch[name].split(16) for name in names), strict=True)
    return torch.cat(
        [
            task.outputs(dict(zip(names, part, strict=True)))["text_logits"].argmax(-1)
            for part in parts
        ]
    )


def word_card(task: Pretrain, batch: Batch, guesses: tuple[Tensor, Tensor], row: int) -> str:
    """One picture as the network saw it, beside the gapped caption and its two fillings."""
    image = pixels(batch["image"][row])
    if "image_mask" in batch:
        side = task.config.model.patch_size
        mask = batch["image_mask"][row].numpy()[:, None, None, None]
        image = assemble(
            np.where(mask, hatch(side, side), cut(image, side)), task.config.model.grid
        )
    target = batch["text_target"][row]
    whole = torch.where(target == IGNORE_INDEX, batch["text"][row], target).tolist()
    hidden = (target != IGNORE_INDEX).tolist()
    seeing, blind = (guess[row].tolist() for guess in guesses)
    body = "".join(
        f"<dt>{name}</dt><dd>{sentence(task.tokenizer, whole, hidden, guess)}</dd>"
        for name, guess in (("as seen", ()), ("with picture", seeing), ("without", blind))
    )
    shown = picture(image, f"picture of: {task.tokenizer.decode(whole)}")
    return f'<div class="card">{shown}<dl>{body}</dl></div>'


def sentence(
    tokenizer: TextTokenizer, ids: Sequence[int], hidden: Sequence[bool], guess: Sequence[int]
) -> str:
    """A caption as HTML: hidden pieces as guessed, marked right, or wrong beside the truth; as gaps
    without a guess."""
    parts = []
    for place, (true, is_hidden) in enumerate(zip(ids, hidden, strict=True)):
        word = tokenizer.id_to_piece(true)
        if true < tokenizer.first_piece and true != tokenizer.unk:
            continue
        space, shown = (" " if word.startswith(" ") else ""), escape(word.strip())
        if is_hidden and not guess:
            shown = '<mark class="gap" aria-label="hidden">&nbsp;</mark>'
        elif is_hidden:
            said = escape(tokenizer.id_to_piece(guess[place]).strip())
            wrong = f'<mark class="wrong">✗ {said} <i>{shown}</i></mark>'
            shown = f'<mark class="right">✓ {said}</mark>' if guess[place] == true else wrong
        parts.append(space + shown)
    return "".join(parts).strip()
