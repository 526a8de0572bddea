"""Panels of pretraining: masked patches and masked tokens, and what the network predicts there."""

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape

import numpy as np
import torch
from torch import Tensor

from beit3.report.cards import render_number_line
from beit3.report.codebook import CodeStatistics, compute_code_statistics
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
from beit3.task import Batch, Record
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain
from beit3.tokenizer.text import TextTokenizer

NUM_IMAGES, NUM_CANDIDATES = 6, 24
"""Images with masked patches that are shown, and records they are picked from."""

MAX_COUNTED_PAIRS = 128
"""Held-out pairs over which the accuracy on masked tokens is computed."""

NUM_CAPTIONS = 8
"""Captions with masked tokens that are shown."""

BATCH_SIZE = 16
"""Captions predicted at once; their logits are [B, L, V]."""


def make_pretrain_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields for each run a panel of masked patches and one of masked tokens."""
    for run in runs:
        suffix = make_title_suffix(run, runs)
        lead = (
            "Held-out images with masked patches, filled in with the average patches of the "
            "predicted codes."
        )
        yield make_panel(f"Masked patches{suffix}", lead, partial(_render_patch_rows, run))
        lead = (
            "Captions of held-out images with masked tokens, filled in with the image and without "
            "it."
        )
        yield make_panel(f"Masked tokens{suffix}", lead, partial(_render_token_cards, run))


def list_masked_sources(run: Run, modality: str) -> list[str]:
    """Returns the sources in which a run masked a modality, "image" or "text".

    The source of that modality alone comes before pairs.
    """
    batch = run.batch
    sources = [name for name in (f"{modality}s", "pairs") if batch.get(name)]
    unmasked_by = {"image": "text_only", "text": "image_only"}[modality]
    if run.recipe.get("task", {}).get("pair_masking") == unmasked_by:
        sources = [name for name in sources if name != "pairs"]
    return sources


# Masked patches -----------------------------------------------------------------------------------


@torch.no_grad()
def _render_patch_rows(run: Run) -> str:
    """Returns rows of four images: original, masked, filled in, and in its true codes."""
    sources = list_masked_sources(run, "image")
    if not sources:
        raise ValueError(
            "this run masked no patches in training, so it has not learned to predict them"
        )
    task = load_run_weights(run, Pretrain)
    if task.visual_tokenizer is None:
        raise ValueError("these weights name no visual tokenizer, so their codes cannot be shown")
    statistics = compute_code_statistics(
        task.visual_tokenizer, task, open_run_records(run, sources[0], "train")
    )
    records = pick_evenly(open_run_records(run, sources[0], "val"), NUM_CANDIDATES)
    examples = [task.example(record, False) for record in records]
    masked_examples = [example for example in examples if example["image_mask"].any()]
    stride = max(1, len(masked_examples) // NUM_IMAGES)
    batch = task.collate(masked_examples[::stride][:NUM_IMAGES])
    predicted_codes = task.outputs(batch)["image_logits"].argmax(-1).numpy()
    true_codes, masks = task.compute_codes(batch).numpy(), batch["image_mask"].numpy()
    images = to_channels_last(batch["token_image"])
    column_names = ("image", "masked", "filled in", "true codes")
    head = "".join(f"<span>{name}</span>" for name in column_names)
    rows = [
        f"<div class=quad>{head}{render_patch_row(*fields, statistics)}</div>"
        for fields in zip(images, masks, predicted_codes, true_codes, strict=True)
    ]
    return f'<div class="quads">{"".join(rows)}</div>'


def render_patch_row(
    image: np.ndarray,
    mask: np.ndarray,
    predicted_codes: np.ndarray,
    true_codes: np.ndarray,
    statistics: CodeStatistics,
) -> str:
    """Returns four images of one masked image, and how many codes were predicted right.

    Args:
        image: Pixels uint8 [H, W, 3].
        mask: True where a patch is masked [P].
        predicted_codes: Codes [P].
        true_codes: Codes [P].
        statistics: Mean patches of all codes.
    """
    patch_size = statistics.mean_patches.shape[1]
    grid = (image.shape[0] // patch_size, image.shape[1] // patch_size)
    patches = cut_into_patches(image, patch_size)
    is_masked = mask[:, None, None, None]
    masked = np.where(is_masked, draw_hatching(patch_size, patch_size), patches)
    filled = np.where(is_masked, statistics.mean_patches[predicted_codes], patches)
    true_patches = statistics.mean_patches[true_codes]
    num_right, num_masked = int((predicted_codes == true_codes)[mask].sum()), int(mask.sum())
    tags = (
        render_image(image, "a held-out image"),
        render_image(
            assemble_patches(masked, grid),
            f"the same with {num_masked} of {len(mask)} patches masked",
        ),
        render_image(
            assemble_patches(filled, grid), "its masked patches filled in from predicted codes"
        ),
        render_image(
            assemble_patches(true_patches, grid),
            "the whole image in average patches of its true codes",
        ),
    )
    note = f"{num_right} of {num_masked} masked patches predicted exactly"
    return f"{''.join(tags)}<small>{note}</small>"


# Masked tokens ------------------------------------------------------------------------------------


@torch.no_grad()
def _render_token_cards(run: Run) -> str:
    """Returns the accuracy on masked tokens with and without the image, and some captions."""
    if "pairs" not in list_masked_sources(run, "text"):
        raise ValueError(
            "this run masked no text of image-text pairs in training, so it has not learned to "
            "predict it"
        )
    task = load_run_weights(run, Pretrain, load_frozen=False)
    records = pick_evenly(open_run_records(run, "pairs", "val"), MAX_COUNTED_PAIRS)
    batch = collate_masked_pairs(task, records)
    with_image = predict_token_ids(task, batch, use_image=True)
    without_image = predict_token_ids(task, batch, use_image=False)
    numbers = render_number_line(
        (f"{_compute_accuracy(with_image, batch):.0%}", "of masked tokens right with the image"),
        (f"{_compute_accuracy(without_image, batch):.0%}", "without it"),
    )
    trained_on_texts = bool(run.batch.get("texts"))
    caveat = "" if trained_on_texts else " It was never trained on a text without an image."
    indices = np.unique(np.linspace(0, len(batch["id"]) - 1, NUM_CAPTIONS).round().astype(int))
    cards = "".join(
        render_token_card(task, batch, with_image, without_image, index) for index in indices
    )
    return (
        f"{numbers}<p>Over {len(batch['id'])} held-out pairs.{caveat} "
        '<mark class="right">✓ right</mark> '
        '<mark class="wrong">✗ wrong <i>true token</i></mark></p>'
        f'<div class="cards">{cards}</div>'
    )


def collate_masked_pairs(task: Pretrain, records: Sequence[Record]) -> Batch:
    """Returns a batch of pairs in which every target token is masked.

    The evaluation of pretraining leaves a tenth of them unchanged and replaces another tenth.
    """
    examples = [task.example(record, False) for record in records]
    examples = [example for example in examples if (example["text_target"] != IGNORE_INDEX).any()]
    if not examples:
        raise ValueError("no held-out pair has a masked token")
    batch = task.collate(examples)
    is_target = batch["text_target"] != IGNORE_INDEX
    return batch | {"text": batch["text"].masked_fill(is_target, task.tokenizer.mask)}


def predict_token_ids(task: Pretrain, batch: Batch, *, use_image: bool) -> Tensor:
    """Returns the most probable token ids [B, L], with the image or from the text alone."""
    names = ["text", "text_padding"]
    if use_image:
        names += ["image", "image_mask"]
    names = [name for name in names if name in batch]
    predicted_ids = []
    for tensors in zip(*(batch[name].split(BATCH_SIZE) for name in names), strict=True):
        outputs = task.outputs(dict(zip(names, tensors, strict=True)))
        predicted_ids.append(outputs["text_logits"].argmax(-1))
    return torch.cat(predicted_ids)


def _compute_accuracy(predicted_ids: Tensor, batch: Batch) -> float:
    """Returns the fraction of target tokens that were predicted right."""
    targets = batch["text_target"]
    return float((predicted_ids == targets)[targets != IGNORE_INDEX].float().mean())


def render_token_card(
    task: Pretrain, batch: Batch, with_image: Tensor, without_image: Tensor, index: int
) -> str:
    """Returns a card of one pair: the image as the network gets it, and three captions.

    Args:
        task: The task, for its tokenizer and patch size.
        batch: The batch of `collate_masked_pairs`.
        with_image: Token ids [B, L] predicted with the image.
        without_image: Token ids [B, L] predicted from the text alone.
        index: The pair's position in the batch.
    """
    image = to_channels_last(batch["image"][index])
    if "image_mask" in batch:
        patch_size = task.config.model.patch_size
        is_masked = batch["image_mask"][index].numpy()[:, None, None, None]
        hatching = draw_hatching(patch_size, patch_size)
        patches = np.where(is_masked, hatching, cut_into_patches(image, patch_size))
        image = assemble_patches(patches, task.config.model.grid)
    targets = batch["text_target"][index]
    is_target = targets != IGNORE_INDEX
    true_ids = torch.where(is_target, targets, batch["text"][index]).tolist()
    captions: tuple[tuple[str, Sequence[int]], ...] = (
        ("masked", ()),
        ("with image", with_image[index].tolist()),
        ("without", without_image[index].tolist()),
    )
    terms = ""
    for name, predicted_ids in captions:
        caption = render_caption(task.tokenizer, true_ids, is_target.tolist(), predicted_ids)
        terms += f"<dt>{name}</dt><dd>{caption}</dd>"
    image_tag = render_image(image, f"image of: {task.tokenizer.decode(true_ids)}")
    return f'<div class="card">{image_tag}<dl>{terms}</dl></div>'


def render_caption(
    tokenizer: TextTokenizer,
    true_ids: Sequence[int],
    is_masked: Sequence[bool],
    predicted_ids: Sequence[int],
) -> str:
    """Returns a caption as HTML with its masked tokens as predicted.

    A prediction is marked as right, or as wrong beside the true token. Without `predicted_ids`,
    masked tokens are gaps. Special tokens are left out.
    """
    parts = []
    for index, true_id in enumerate(true_ids):
        if true_id < tokenizer.first_piece and true_id != tokenizer.unk:
            continue
        piece = tokenizer.id_to_piece(true_id)
        html = escape(piece.strip())
        if is_masked[index] and not predicted_ids:
            html = '<mark class="gap" aria-label="masked">&nbsp;</mark>'
        elif is_masked[index]:
            predicted = escape(tokenizer.id_to_piece(predicted_ids[index]).strip())
            if predicted_ids[index] == true_id:
                html = f'<mark class="right">✓ {predicted}</mark>'
            else:
                html = f'<mark class="wrong">✗ {predicted} <i>{html}</i></mark>'
        parts.append(f" {html}" if piece.startswith(" ") else html)
    return "".join(parts).strip()
