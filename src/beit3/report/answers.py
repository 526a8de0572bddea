"""Panels of tasks with one prediction per record: answers, judgments, captions and classes.

All runs of a task predict for the records of the first run. Images are shown as its network gets
them, uint8 [H, W, 3], that is after resizing and cropping.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape

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
from beit3.task import Prediction, Record, Task
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import ANSWERS, NLVR2
from beit3.tasks.vqa import VQA

NUM_CARDS = 12
"""Records in a panel."""

MAX_CLASSES = 3
"""Classes listed for an image, the most probable ones."""

MAX_HUMAN_CAPTIONS = 5
"""Human captions listed for an image."""

CardFunction = Callable[[Task, Record, np.ndarray, Sequence[str], Sequence[Prediction]], str]
"""(task, record, image, labels of the runs, prediction of each run) -> HTML of a card."""


def make_vqa_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of questions with the answers of all runs."""
    lead = (
        "Held-out images and questions with the most probable answer and its "
        f"probability{make_lead_suffix(runs)}."
    )
    body = partial(_render_cards, runs, VQA, render_question_card)
    yield make_panel("Questions and answers", lead, body)


def make_nlvr2_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of statements on two images with the judgments of all runs."""
    lead = (
        "Held-out pairs of images and a statement on both, with the judgment and its "
        f"probability{make_lead_suffix(runs)}."
    )
    body = partial(_render_cards, runs, NLVR2, render_statement_card)
    yield make_panel("Statements and judgments", lead, body)


def make_captioning_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of images with the captions of all runs and human ones."""
    lead = (
        f"Held-out images with the caption that was generated for each{make_lead_suffix(runs)}, "
        "and human captions below it."
    )
    body = partial(_render_cards, runs, Captioning, render_caption_card)
    yield make_panel("Captions", lead, body)


def make_imagenet_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of images with the most probable classes of all runs."""
    lead = (
        "Held-out images with the most probable classes and their "
        f"probabilities{make_lead_suffix(runs)}."
    )
    body = partial(_render_cards, runs, ImageNet, render_class_card)
    yield make_panel("Images and classes", lead, body)


@torch.no_grad()
def _render_cards(runs: Sequence[Run], task_class: type[Task], card_function: CardFunction) -> str:
    """Returns a card per record with the predictions of all runs."""
    records = pick_evenly(open_held_out_records(runs[0]), NUM_CARDS)
    first_task = load_run_weights(runs[0], task_class)
    images: list[np.ndarray] = []
    predictions_by_run = []
    for run in runs:
        task = first_task if run is runs[0] else load_run_weights(run, task_class)
        batch = task.collate([task.example(record, False) for record in records])
        if run is runs[0]:
            images = [*to_channels_last(batch["image"])]
        predictions_by_run.append(task.predict(batch))
    labels = [run.label for run in runs]
    cards = [
        card_function(first_task, record, image, labels, predictions)
        for record, image, *predictions in zip(records, images, *predictions_by_run, strict=True)
    ]
    return f'<div class="cards answers">{"".join(cards)}</div>'


def render_question_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[Prediction],
) -> str:
    """Returns a card of an image, its question, the predicted answers and the true one.

    An answer is right if an annotator gave it; the true one is that which most annotators gave.
    """
    scores = record.get("answers", {})
    right_answers = [answer for answer, score in scores.items() if score > 0]
    question = decode_text(task, record["text"])
    lines = []
    for prediction in predictions:
        mark = render_mark(prediction["answer"], prediction["answer"] in right_answers)
        lines.append([f"{mark} {prediction['score']:.0%}"])
    truth = max(right_answers, key=scores.get, default="(not in the answer list)")
    terms = render_run_terms(labels, lines, "answer") + render_term("truth", [truth])
    return render_card(render_image(image, f"image of the question: {question}"), terms, question)


def render_statement_card(
    task: Task,
    record: Record,
    images: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[Prediction],
) -> str:
    """Returns a card of two images [2, H, W, 3], and below them the statement and its judgments."""
    truth = ANSWERS[int(record["label"])] if "label" in record else ""
    statement = decode_text(task, record["text"])
    lines = []
    for prediction in predictions:
        is_right = prediction["answer"] == truth if truth else None
        mark = render_mark(prediction["answer"], is_right)
        lines.append([f"{mark} {prediction['score']:.0%}"])
    terms = render_run_terms(labels, lines, "judgment")
    terms += render_term("truth", [truth or "(no label)"])
    image_tags = "".join(
        render_image(image, f"{side} image of the statement: {statement}")
        for side, image in zip(("left", "right"), images, strict=True)
    )
    row = f'<div class="row">{image_tags}</div>'
    return render_card(row, terms, statement, images_on_top=True)


def render_caption_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[Prediction],
) -> str:
    """Returns a card of an image, the captions generated for it, and human ones."""
    captions = get_captions(record)[:MAX_HUMAN_CAPTIONS]
    human_captions = [decode_text(task, caption) for caption in captions]
    lines = [[escape(prediction["caption"]) or "<i>(empty)</i>"] for prediction in predictions]
    terms = render_run_terms(labels, lines, "generated")
    if human_captions:
        terms += render_term("human", human_captions)
    description = human_captions[0] if human_captions else "without human captions"
    return render_card(render_image(image, f"image to caption: {description}"), terms)


def render_class_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[Prediction],
) -> str:
    """Returns a card of an image, its most probable classes and the true one."""
    assert isinstance(task, ImageNet)
    true_label = int(record.get("label", -1))
    lines = []
    for prediction in predictions:
        candidates = enumerate(prediction["candidates"][:MAX_CLASSES])
        lines.append([_render_class_line(rank, item, true_label) for rank, item in candidates])
    true_name = _get_class_name(task, true_label)
    terms = render_run_terms(labels, lines, "class") + render_term("truth", [true_name])
    return render_card(render_image(image, f"image of the class {true_name}"), terms)


def _get_class_name(task: ImageNet, label: int) -> str:
    """Returns the name of a class, or its number where the task has no names."""
    if label < 0:
        return "(no label)"
    class_names = task.config.classes
    return class_names[label] if class_names else f"class {label}"


def _render_class_line(rank: int, candidate: Prediction, true_label: int) -> str:
    """Returns a candidate class and its probability, as HTML; a true label below 0 is unknown."""
    name = str(candidate.get("name", f"class {candidate['label']}"))
    mark = None
    if true_label >= 0:
        mark = select_mark(rank, candidate["label"] == true_label)
    return f"{render_mark(name, mark)} {candidate['score']:.0%}"
