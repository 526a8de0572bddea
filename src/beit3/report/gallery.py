"""Panels of image-text retrieval: captions with their nearest images, and the other way around."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from beit3.report.cards import (
    decode_text,
    get_captions,
    render_card,
    render_mark,
    render_run_terms,
    render_term,
    select_mark,
)
from beit3.report.images import render_image, to_channels_last
from beit3.report.panel_inputs import (
    Panel,
    load_run_weights,
    make_lead_suffix,
    make_panel,
    open_held_out_records,
    pick_evenly,
)
from beit3.report.runs import Run
from beit3.task import Record
from beit3.tasks.retrieval import Retrieval
from beit3.training.evaluate import iterate_batches

NUM_SEARCHES = 6
"""Searches in a panel."""

NUM_RESULTS = 3
"""Results shown of a search."""

MAX_IMAGES = 150
"""Images that are searched; a network of base size encodes them in minutes on CPU."""

BATCH_SIZE = 16

RESULT_SIDE = 160
"""Longest side in pixels of an image among the results."""


@dataclass(frozen=True)
class Gallery:
    """N held-out images with T captions, and how similar each run finds them."""

    images: Sequence[np.ndarray]
    """N images, uint8 [H, W, 3]."""
    captions: Sequence[str]
    image_indices: np.ndarray
    """For each caption the index of its image [T]."""
    similarities: Sequence[np.ndarray]
    """For each run the similarity of every caption to every image [T, N]."""

    def get_first_caption(self, image_index: int) -> int:
        """Returns the index of an image's first caption."""
        return int(np.flatnonzero(self.image_indices == image_index)[0])


SearchCardFunction = Callable[[Gallery, int, Sequence[str]], str]
"""(gallery, index of the image, labels of the runs) -> HTML of a card."""


def make_retrieval_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of captions with their nearest images, and one of the reverse."""
    get_gallery = cache(partial(encode_gallery, runs))
    lead = (
        f"Held-out captions and the {NUM_RESULTS} images nearest to each{make_lead_suffix(runs)}; "
        "the right one is framed."
    )
    yield make_panel(
        "Images found by a caption",
        lead,
        lambda: _render_searches(runs, get_gallery(), render_image_search_card),
    )
    lead = (
        f"Held-out images and the {NUM_RESULTS} captions nearest to each{make_lead_suffix(runs)}; "
        "the image's own are marked ✓."
    )
    yield make_panel(
        "Captions found by an image",
        lead,
        lambda: _render_searches(runs, get_gallery(), render_caption_search_card),
    )


@torch.no_grad()
def encode_gallery(runs: Sequence[Run]) -> Gallery:
    """Encodes up to `MAX_IMAGES` distinct held-out images and their captions with every run."""
    records = _pick_captioned_records(runs[0])
    images: list[np.ndarray] = []
    captions: list[str] = []
    image_indices: list[int] = []
    similarities = []
    for run in runs:
        task = load_run_weights(run, Retrieval)
        predictions = []
        for batch in iterate_batches(task, records, BATCH_SIZE):
            predictions += task.predict(batch)
            if run is runs[0]:
                images += [*to_channels_last(batch["image"])]
        if run is runs[0]:
            for index, record in enumerate(records):
                texts = [decode_text(task, caption) for caption in get_captions(record)]
                captions += texts
                image_indices += [index] * len(texts)
        text_features = np.concatenate([prediction["texts"] for prediction in predictions])
        image_features = np.stack([prediction["image"] for prediction in predictions])
        similarities.append(text_features @ image_features.T)
    return Gallery(images, captions, np.array(image_indices), similarities)


def _pick_captioned_records(run: Run) -> list[Record]:
    """Returns held-out records with captions, one per image; ValueError if there are none."""
    records_by_image: dict[str, Record] = {}
    for record in pick_evenly(open_held_out_records(run), MAX_IMAGES):
        if get_captions(record):
            records_by_image[str(record.get("image_id", record["image"]))] = record
    if not records_by_image:
        raise ValueError("no held-out image has a caption")
    return list(records_by_image.values())


def _render_searches(
    runs: Sequence[Run], gallery: Gallery, card_function: SearchCardFunction
) -> str:
    """Returns a card for each of some evenly spaced images of the gallery."""
    num_images, labels = len(gallery.images), [run.label for run in runs]
    indices = np.unique(np.linspace(0, num_images - 1, NUM_SEARCHES).round().astype(int))
    cards = "".join(card_function(gallery, int(index), labels) for index in indices)
    counts = f"Among {num_images} held-out images with {len(gallery.captions)} captions."
    return f'<p>{counts}</p><div class="cards answers">{cards}</div>'


def render_image_search_card(gallery: Gallery, image_index: int, labels: Sequence[str]) -> str:
    """Returns a card of an image's first caption and the images nearest to it in each run.

    The right image has a frame.
    """
    query = gallery.get_first_caption(image_index)
    lines = []
    for similarity in gallery.similarities:
        order = np.argsort(-similarity[query], kind="stable")
        results = "".join(
            _render_image_result(gallery.images[index], rank, index == image_index)
            for rank, index in enumerate(order[:NUM_RESULTS], start=1)
        )
        rank_note = _render_rank_note(order == image_index)
        lines.append([f'<div class="row">{results}</div>', *rank_note])
    terms = render_run_terms(labels, lines, "nearest")
    return render_card("", terms, gallery.captions[query], images_on_top=True)


def _render_image_result(image: np.ndarray, rank: int, is_right: bool) -> str:
    """Returns an image among the results of a search; the first has rank 1."""
    css_class, word = ("hit", "right") if is_right else ("", "wrong")
    tag = render_image(image, f"{word} image at rank {rank}", max_side=RESULT_SIDE)
    return f'<figure class="{css_class}">{tag}</figure>'


def render_caption_search_card(gallery: Gallery, image_index: int, labels: Sequence[str]) -> str:
    """Returns a card of an image, the captions nearest to it in each run, and its first one."""
    lines = []
    for similarity in gallery.similarities:
        order = np.argsort(-similarity[:, image_index], kind="stable")
        is_right = gallery.image_indices[order] == image_index
        results = [
            render_mark(gallery.captions[order[rank]], select_mark(rank, is_right[rank]))
            for rank in range(min(NUM_RESULTS, len(order)))
        ]
        lines.append(results + _render_rank_note(is_right))
    own_caption = gallery.captions[gallery.get_first_caption(image_index)]
    image_tag = render_image(gallery.images[image_index], f"image of the search: {own_caption}")
    terms = render_run_terms(labels, lines, "nearest") + render_term("its own", [own_caption])
    return render_card(image_tag, terms)


def _render_rank_note(is_right: np.ndarray) -> list[str]:
    """Returns a line, as HTML, with the rank of the first right result if it is not shown.

    `is_right` [R] bool has all results, the nearest first.
    """
    first = int(np.argmax(is_right))
    return [f"<small>right one at rank {first + 1}</small>"] if first >= NUM_RESULTS else []
