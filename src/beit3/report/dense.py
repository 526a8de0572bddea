"""What the panels of detection and segmentation share: predictions, cards and notes.

All runs of a task predict for the records of the first run. Scores by class are computed here, over
as many images as `MAX_SECONDS` allows, and the panel says how many.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from beit3.report.cards import render_run_labels
from beit3.report.panel_inputs import load_run_weights, open_held_out_records
from beit3.report.runs import Run
from beit3.task import Prediction, Record, Task
from beit3.training.evaluate import iterate_batches

NUM_CARDS = 8
"""Images that are drawn. All of them are predicted, however long it takes."""

MAX_RECORDS = 200
"""Images over which scores by class are computed."""

MAX_SECONDS = 60.0
"""Time that the first run may take to predict."""

BATCH_PIXELS = 2 * 1024**2
"""Pixels of the images predicted at once; eight images at 1024 pixels would take several GB."""

CardFunction = Callable[[Task, Record, Sequence[str], Sequence[Prediction]], str]
"""(task, record, labels of the runs, prediction of each run) -> HTML of a card."""


@dataclass(frozen=True)
class HeldOutPredictions:
    """N held-out records in a fixed shuffled order, and the predictions of each run for them."""

    task: Task
    """The task of the first run."""
    records: Sequence[Record]
    predictions: Sequence[Sequence[Prediction]]
    """For each run N predictions."""


@torch.no_grad()
def predict_held_out(runs: Sequence[Run], task_class: type[Task]) -> HeldOutPredictions:
    """Predicts with all runs for held-out records of the first run.

    The first run stops after `MAX_SECONDS`, or after `NUM_CARDS` records if these take longer. The
    other runs predict for the same records.
    """
    dataset = open_held_out_records(runs[0])
    order = np.random.default_rng(0).permutation(len(dataset))[:MAX_RECORDS]
    records: list[Record] = [dataset[int(index)] for index in order]
    first_task = load_run_weights(runs[0], task_class)
    predictions_by_run = []
    for run in runs:
        is_first = run is runs[0]
        task = first_task if is_first else load_run_weights(run, task_class)
        start_time = time.monotonic()
        predictions: list[Prediction] = []
        for batch in iterate_batches(task, records, count_batch_images(task)):
            predictions += task.predict(batch)
            is_late = time.monotonic() - start_time > MAX_SECONDS
            if is_first and is_late and len(predictions) >= NUM_CARDS:
                break
        records = records[: len(predictions)]
        predictions_by_run.append(predictions)
    return HeldOutPredictions(first_task, records, predictions_by_run)


def count_batch_images(task: Task) -> int:
    """Returns how many images are predicted at once, at most as many as are drawn."""
    num_pixels = task.config.image.image_size**2
    return max(1, min(NUM_CARDS, BATCH_PIXELS // num_pixels))


def render_cards(
    runs: Sequence[Run], held_out: HeldOutPredictions, card_function: CardFunction
) -> str:
    """Returns a card for each of the first records."""
    labels = [run.label for run in runs]
    cards = []
    for index, record in enumerate(held_out.records[:NUM_CARDS]):
        predictions = [run_predictions[index] for run_predictions in held_out.predictions]
        cards.append(card_function(held_out.task, record, labels, predictions))
    return f'<div class="cards">{"".join(cards)}</div>'


def render_image_card(
    images: Sequence[tuple[str, str]], footer: str = "", *, has_text: bool = False
) -> str:
    """Returns a card of images side by side.

    Args:
        images: (caption, image) of each, both HTML.
        footer: HTML below the images.
        has_text: Show the images large enough to read the names drawn onto them.
    """
    css_class = "views lettered" if has_text else "views"
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{image}</figure>" for caption, image in images
    )
    return f'<div class="card tall"><div class="{css_class}">{figures}</div>{footer}</div>'


def render_count_note(runs: Sequence[Run], held_out: HeldOutPredictions) -> str:
    """Returns a line on how many images were predicted, with the runs' names if there are many."""
    note = f"Over {len(held_out.records)} held-out images."
    if len(runs) > 1:
        note += f" {' '.join(render_run_labels([run.label for run in runs], ''))}"
    return f'<p class="legend">{note}</p>'
