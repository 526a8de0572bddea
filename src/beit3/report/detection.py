"""Panels of detection: COCO's metrics, images with objects, and average precision by class."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from html import escape
from typing import Any

import numpy as np

from beit3.images import open_image
from beit3.metrics.detection import COCO_METRICS, IouKind, compute_coco_ap
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
from beit3.report.drawing import MIN_SCORE
from beit3.report.images import MAX_SIDE, render_image
from beit3.report.lettering import get_label_name
from beit3.report.object_drawing import draw_objects, list_true_objects
from beit3.report.panel_inputs import Panel, make_lead_suffix, make_panel
from beit3.report.runs import Run
from beit3.report.scores import ABSENT, format_score_name
from beit3.task import Prediction, Record, Task
from beit3.tasks.coco import Coco


def make_coco_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Yields panels of COCO's metrics, of images with objects, and of scores by class."""
    get_held_out = cache(partial(predict_held_out, runs, Coco))
    lead = (
        f"Average precision and recall on held-out records; {ABSENT} where they show no object of "
        "that size."
    )
    yield make_panel("COCO's twelve metrics", lead, partial(render_metric_table, runs))
    lead = (
        "Held-out images: the true objects, and those predicted with a score of at least "
        f"{MIN_SCORE:.0%}{make_lead_suffix(runs)}."
    )
    yield make_panel(
        "Objects", lead, lambda: render_cards(runs, get_held_out(), render_object_card)
    )
    lead = (
        "Average precision of each class, the best first. A class that these images do not show "
        "is left out."
    )
    yield make_panel("Classes", lead, lambda: render_class_precisions(runs, get_held_out()))


# Metrics of the runs ------------------------------------------------------------------------------


def render_metric_table(runs: Sequence[Run]) -> str:
    """Returns a table of COCO's metrics in percent, without the sign as in papers.

    It has a row per metric, and a column per run and kind, of boxes and masks.
    """
    kinds = [kind for kind in ("box", "mask") if any(f"{kind}_ap" in run.scores for run in runs)]
    if not kinds:
        raise ValueError("there are no held-out scores yet")
    several = len(runs) > 1
    head = '<th scope="col">percent</th>' + "".join(
        f'<th scope="col" class="number">{escape(run.label) if several else ""} {kind}</th>'
        for run in runs
        for kind in kinds
    )
    rows = "".join(_render_metric_row(name, runs, kinds) for name in COCO_METRICS)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll narrow" tabindex="0">{table}</div>'


def _render_metric_row(name: str, runs: Sequence[Run], kinds: Sequence[str]) -> str:
    """Returns the table row of one of `COCO_METRICS`; a negative score is not defined."""
    title = format_score_name(f"box_{name}").removeprefix("box ")
    cells = []
    for run in runs:
        for kind in kinds:
            score = run.scores.get(f"{kind}_{name}")
            text = ABSENT if score is None or score < 0 else f"{100 * score:.1f}"
            cells.append(f'<td class="number">{text}</td>')
    return f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


# Images with objects ------------------------------------------------------------------------------


def render_object_card(
    task: Task, record: Record, labels: Sequence[str], predictions: Sequence[Prediction]
) -> str:
    """Returns a card of an image with its true objects, and with those that each run predicts.

    Objects with a score below `drawing.MIN_SCORE` are left out.
    """
    image = open_image(record["image"]).permute(1, 2, 0).numpy()
    true_objects = list_true_objects(record, task.class_names)
    true_image = _render_drawing(image, true_objects, "true objects")
    images = [(f"truth: {count_objects(true_objects)}", true_image)]
    names = render_run_labels(labels, "predicted")
    for name, prediction in zip(names, predictions, strict=True):
        objects = [item for item in prediction["objects"] if item["score"] >= MIN_SCORE]
        predicted_image = _render_drawing(image, objects, "predicted objects")
        images.append((f"{name}: {count_objects(objects)}", predicted_image))
    return render_image_card(images, has_text=True)


def count_objects(objects: Sequence[Any]) -> str:
    """Returns the number of objects in words, such as "1 object" or "no objects"."""
    return "1 object" if len(objects) == 1 else f"{len(objects) or 'no'} objects"


def _render_drawing(
    image: np.ndarray, objects: Sequence[Mapping[str, Any]], description: str
) -> str:
    """Returns an image with objects drawn onto it."""
    names = [get_label_name(item["label"], (), item.get("name", "")) for item in objects]
    alt = f"held-out image with its {description}: {', '.join(names) or 'none'}"
    return render_image(np.asarray(draw_objects(image, objects, side=MAX_SIDE)), alt)


# Scores by class ----------------------------------------------------------------------------------


def render_class_precisions(runs: Sequence[Run], held_out: HeldOutPredictions) -> str:
    """Returns bar charts of each class's average precision, of boxes and, if present, of masks."""
    labels, class_names = [run.label for run in runs], held_out.task.class_names
    kinds: tuple[IouKind, ...] = ("box", "mask") if _have_masks(held_out) else ("box",)
    charts: list[str] = []
    for kind in kinds:
        precisions = [
            compute_coco_ap(predictions, held_out.records, kind=kind)["per_class"]
            for predictions in held_out.predictions
        ]
        rows = []
        for label, first_precision in precisions[0].items():
            if first_precision >= 0:  # -1 for a class without a true object
                name = get_label_name(label, class_names)
                rows.append((name, [by_class[label] for by_class in precisions]))
        charts += draw_class_bars(f"{format_score_name(f'{kind}_ap')} of each class", rows, labels)
    return render_count_note(runs, held_out) + render_figure_grid(charts)


def _have_masks(held_out: HeldOutPredictions) -> bool:
    """Returns whether all predicted and all true objects have masks."""
    predicted_objects = [
        item
        for predictions in held_out.predictions
        for prediction in predictions
        for item in prediction["objects"]
    ]
    true_objects = [item for record in held_out.records for item in record["objects"]]
    predicted_have_masks = all("mask" in item for item in predicted_objects)
    return predicted_have_masks and all(item.get("segmentation") for item in true_objects)
