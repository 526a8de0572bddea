"""Panels of segmentation: images with their label maps, and intersection over union by class."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from html import escape
from typing import Any

import numpy as np

from beit3.data.views.label_maps import IGNORE_INDEX, open_label_map
from beit3.images import open_image
from beit3.metrics.segmentation import compute_class_ious, summarize_confusion
from beit3.report.bars import draw_class_bars
from beit3.report.cards import render_run_labels
from beit3.report.dense import (
    HeldOutPredictions,
    predict_held_out,
    render_cards,
    render_count_note,
    render_image_card,
)
from beit3.report.document import render_figure_grid
from beit3.report.images import MAX_SIDE, render_image
from beit3.report.label_map_drawing import draw_label_map, measure_classes
from beit3.report.lettering import format_percent, get_label_name
from beit3.report.palette import get_color
from beit3.report.panel_inputs import Panel, make_lead_suffix, make_panel
from beit3.report.runs import Run
from beit3.report.scores import format_score_name
from beit3.segmentation.records import decode_label_map, get_label_map_options
from beit3.task import Prediction, Record, Task
from beit3.tasks.ade20k import Ade20k, sum_confusion

MAX_CARD_CLASSES = 12
"""Classes in the legend of a card, the most frequent ones."""


def make_ade20k_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields a panel of images with label maps, and one of scores by class."""
    get_held_out = cache(partial(predict_held_out, runs, Ade20k))
    lead = (
        f"Held-out images with their true labels and the predicted ones{make_lead_suffix(runs)}. "
        "Where only the image shows, there is no true label."
    )
    yield make_panel(
        "Label maps", lead, lambda: render_cards(runs, get_held_out(), render_label_map_card)
    )
    lead = (
        "Intersection over union of each class, the best first. A class that is neither shown nor "
        "predicted is left out."
    )
    yield make_panel("Classes", lead, lambda: render_class_ious(runs, get_held_out()))


# Images with label maps ---------------------------------------------------------------------------


def render_label_map_card(
    task: Task, record: Record, labels: Sequence[str], predictions: Sequence[Prediction]
) -> str:
    """Returns a card of an image, its true label map and those that each run predicts."""
    class_names = task.class_names
    image = open_image(record["image"]).permute(1, 2, 0).numpy()
    options = get_label_map_options(record)
    true_map = open_label_map(record["label_map"], **options).numpy().astype(int)
    predicted_maps = [decode_label_map(prediction) for prediction in predictions]
    images = [
        ("image", render_image(image, "held-out image")),
        ("truth", _render_drawing(image, true_map, class_names, "true")),
    ]
    is_labeled = true_map != IGNORE_INDEX
    names = render_run_labels(labels, "predicted")
    for name, predicted_map in zip(names, predicted_maps, strict=True):
        caption = name
        if is_labeled.any():
            caption += f", {(predicted_map == true_map)[is_labeled].mean():.0%} right"
        images.append((caption, _render_drawing(image, predicted_map, class_names, "predicted")))
    all_labels = np.concatenate([true_map.ravel(), *(item.ravel() for item in predicted_maps)])
    classes = measure_classes(all_labels, class_names, ignore_index=IGNORE_INDEX)
    return render_image_card(images, render_color_legend(classes))


def _render_drawing(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], description: str
) -> str:
    """Returns an image with a label map drawn over it."""
    classes = measure_classes(labels, class_names, ignore_index=IGNORE_INDEX)
    parts = [f"{item['name']} {format_percent(item['share'])}" for item in classes]
    alt = f"the same with its {description} labels: {', '.join(parts) or 'none'}"
    drawing = draw_label_map(image, labels, side=MAX_SIDE, ignore_index=IGNORE_INDEX)
    return render_image(np.asarray(drawing), alt)


def render_color_legend(classes: Sequence[Mapping[str, Any]]) -> str:
    """Returns the colors and names of the first `MAX_CARD_CLASSES` classes."""
    chips = [
        f'<span class="chip" style="--chip:rgb{get_color(item["label"])}">'
        f"{escape(item['name'])}</span>"
        for item in classes[:MAX_CARD_CLASSES]
    ]
    if len(classes) > MAX_CARD_CLASSES:
        chips.append(f"and {len(classes) - MAX_CARD_CLASSES} more")
    return f'<p class="chips">{" ".join(chips)}</p>'


# Scores by class ----------------------------------------------------------------------------------


def render_class_ious(runs: Sequence[Run], held_out: HeldOutPredictions) -> str:
    """Returns the mean scores of each run, and bar charts of the IoU of each class."""
    labels = [run.label for run in runs]
    matrices = [
        sum_confusion(predictions, held_out.records) for predictions in held_out.predictions
    ]
    lines = [
        _render_score_line(name, matrix)
        for name, matrix in zip(render_run_labels(labels, ""), matrices, strict=True)
    ]
    ious = np.stack([compute_class_ious(matrix) for matrix in matrices])
    rows = []
    for label in np.flatnonzero(~np.isnan(ious).all(axis=0)):
        name = get_label_name(int(label), held_out.task.class_names)
        rows.append((name, np.nan_to_num(ious[:, label]).tolist()))
    charts = draw_class_bars("IoU of each class", rows, labels)
    return "".join(lines) + render_count_note(runs, held_out) + render_figure_grid(charts)


def _render_score_line(run_name: str, matrix: Any) -> str:
    """Returns the means over all classes of one confusion matrix."""
    spans = "".join(
        f"<span><b>{score:.1%}</b> {escape(format_score_name(name))}</span> "
        for name, score in summarize_confusion(matrix).items()
    )
    return f'<p class="figures">{run_name} {spans}</p>'
