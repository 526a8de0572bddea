"""What detection and segmentation find in held-out pictures, as HTML: the truth beside what each
run says, and how good each class is.

All runs are asked about the records of the first one. COCO's twelve figures are those of the runs
themselves; what stands by
class is counted here, over as many pictures as `SECONDS` allow, and says over how many.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from html import escape
from typing import Any

import numpy as np
import torch

from beit3.data.views.label_maps import IGNORE_INDEX, open_label_map
from beit3.images import open_image
from beit3.metrics.detection import COCO_METRICS, IouKind, compute_coco_ap
from beit3.metrics.segmentation import compute_class_ious
from beit3.metrics.segmentation import summarize_confusion as segmentation_figures
from beit3.report.answers import beside, source_of
from beit3.report.compare import ABSENT
from beit3.report.curves import class_bars, run_class, spelled
from beit3.report.drawing import (
    MIN_SCORE,
    color,
    draw_map,
    draw_objects,
    name_of,
    percent,
    shares,
    true_objects,
)
from beit3.report.panel_inputs import Panel, panel, records, weights
from beit3.report.pictures import LARGEST, picture
from beit3.report.runs import Run
from beit3.task import Prediction, Record, Task
from beit3.tasks.ade20k import Ade20k, decode_label_map, label_map_options, sum_confusion
from beit3.tasks.coco import Coco
from beit3.training.evaluate import iterate_batches

SHOWN = 8
"""Pictures that are drawn."""

COUNTED, SECONDS = 200, 60.0
"""Pictures that classes are counted over, and how long the first run may take for them; those that
are drawn are always asked."""

BATCH = 2
"""Pictures asked at once: at 1024 pixels eight would take several GB."""

CHIPS = 12
"""Classes in the legend of a picture, the commonest."""


@dataclass(frozen=True)
class Asked:
    """Held-out records [N] in a fixed shuffled order, and what each run says of all of them.
    `task`: of the first run."""

    task: Task
    records: Sequence[Record]
    said: Sequence[Sequence[Prediction]]


def coco_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """COCO's figures, pictures with boxes and masks, and the average precision of each class."""
    asked = cache(partial(ask, runs, Coco))
    lead = (
        f"Average precision and recall on held-out records; {ABSENT} where they show no object of "
        "that size."
    )
    yield panel("COCO's twelve figures", lead, partial(figure_table, runs))
    lead = (
        "Held-out pictures: what is in them, and what is found with a score of at least "
        f"{MIN_SCORE:.0%}{beside(runs)}."
    )
    yield panel("Objects", lead, lambda: _cards(runs, asked(), object_card))
    lead = (
        "Average precision of each class, the best first. A class that these pictures do not show "
        "is left out."
    )
    yield panel("Classes", lead, lambda: _precisions(runs, asked()))


def ade20k_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Pictures with their maps of labels, and the intersection over union of each class."""
    asked = cache(partial(ask, runs, Ade20k))
    lead = (
        f"Held-out pictures in their true labels and in those found{beside(runs)}. Where the "
        "picture alone shows, nothing is labelled."
    )
    yield panel("Scenes", lead, lambda: _cards(runs, asked(), scene_card))
    lead = (
        "Intersection over union of each class, the best first. A class that is neither shown nor "
        "found is left out."
    )
    yield panel("Classes", lead, lambda: _overlaps(runs, asked()))


@torch.no_grad()
def ask(runs: Sequence[Run], kind: type[Task]) -> Asked:
    """Held-out records of the first run, and the predictions of all runs."""
    source = records(runs[0], source_of(runs[0]), "val")
    order = np.random.default_rng(0).permutation(len(source))[:COUNTED]
    found: list[Record] = [source[int(place)] for place in order]
    first, said = weights(runs[0], kind), []
    for run in runs:
        task = first if run is runs[0] else weights(run, kind)
        started, predictions = time.monotonic(), []
        for batch in iterate_batches(task, found, BATCH):
            predictions += task.predict(batch)
            if (
                run is runs[0]
                and len(predictions) >= SHOWN
                and time.monotonic() - started > SECONDS
            ):
                break
        found = found[: len(predictions)]
        said.append(predictions)
    return Asked(first, found, said)


def _cards(runs: Sequence[Run], asked: Asked, draw: Any) -> str:
    """A card for each of the first records."""
    labels = [run.label for run in runs]
    drawn = (
        draw(asked.task, record, labels, given)
        for record, *given in zip(asked.records[:SHOWN], *asked.said, strict=False)
    )
    return f'<div class="cards">{"".join(drawn)}</div>'


def views(shown: Sequence[tuple[str, str]], below: str = "", *, lettered: bool = False) -> str:
    """Pictures side by side under their names, both HTML, and what stands below them. lettered:
    they are large enough to be read."""
    kind = " lettered" if lettered else ""
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption>{image}</figure>" for name, image in shown
    )
    return f'<div class="card tall"><div class="views{kind}">{figures}</div>{below}</div>'


def run_names(labels: Sequence[str]) -> list[str]:
    """What each run's picture is called, as HTML."""
    names = [
        f'<span class="run {run_class(index)}">{escape(label)}</span>'
        for index, label in enumerate(labels)
    ]
    return names if len(labels) > 1 else ["found"]


# Objects ------------------------------------------------------------------------------------------


def figure_table(runs: Sequence[Run]) -> str:
    """A row per figure, a column per run and kind; of percent only the number, as papers have
    it."""
    kinds = [kind for kind in ("box", "mask") if any(f"{kind}_ap" in run.scores for run in runs)]
    if not kinds:
        raise ValueError("there are no held-out scores yet")
    several = len(runs) > 1
    heads = [
        f'<th scope="col" class="number">{escape(run.label) if several else ""} {kind}</th>'
        for run in runs
        for kind in kinds
    ]
    rows = []
    for name in COCO_METRICS:
        values = [run.scores.get(f"{kind}_{name}") for run in runs for kind in kinds]
        cells = (
            "<td "
            f'class="number">{ABSENT if value is None or value < 0 else f"{100 * value:.1f}"}</td>'
            for value in values
        )
        title = spelled(f"box_{name}").removeprefix("box ")
        rows.append(f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>')
    head = f'<th scope="col">percent</th>{"".join(heads)}'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll narrow" tabindex="0">{table}</div>'


def object_card(
    task: Task, record: Record, labels: Sequence[str], given: Sequence[Prediction]
) -> str:
    """A picture with its true objects, and with those that each run is sure enough of."""
    image, truth = (
        open_image(record["image"]).permute(1, 2, 0).numpy(),
        true_objects(record, task.class_names),
    )
    shown = [(f"truth: {counted(truth)}", _drawn(image, truth, "what is there"))]
    for name, prediction in zip(run_names(labels), given, strict=True):
        found = [each for each in prediction["objects"] if each["score"] >= MIN_SCORE]
        shown.append((f"{name}: {counted(found)}", _drawn(image, found, "what was found")))
    return views(shown, lettered=True)


def _drawn(image: np.ndarray, objects: Sequence[Mapping[str, Any]], what: str) -> str:
    said = (
        ", ".join(name_of(each["label"], (), each.get("name", "")) for each in objects) or "nothing"
    )
    return picture(
        np.asarray(draw_objects(image, objects, side=LARGEST)),
        f"held-out picture with {what}: {said}",
    )


def counted(objects: Sequence[Any]) -> str:
    return "1 object" if len(objects) == 1 else f"{len(objects) or 'no'} objects"


def _precisions(runs: Sequence[Run], asked: Asked) -> str:
    """Bars of each class's average precision, of boxes and, where there are any, of masks."""
    names, charts = asked.task.class_names, []
    outlined = all("mask" in each for said in asked.said for row in said for each in row["objects"])
    outlined = outlined and all(
        each.get("segmentation") for record in asked.records for each in record["objects"]
    )
    kinds: tuple[IouKind, ...] = ("box", "mask") if outlined else ("box",)
    for kind in kinds:
        found = [
            compute_coco_ap(said, asked.records, kind=kind)["per_class"] for said in asked.said
        ]
        known = [label for label in found[0] if found[0][label] >= 0]
        values = [(name_of(label, names), [each[label] for each in found]) for label in known]
        charts += class_bars(
            f"{spelled(f'{kind}_ap')} of each class", values, [run.label for run in runs]
        )
    return _over(runs, asked) + _grid(charts)


# Scenes -------------------------------------------------------------------------------------------


def scene_card(
    task: Task, record: Record, labels: Sequence[str], given: Sequence[Prediction]
) -> str:
    """A picture, its true labels, and those that each run gives, over the names of their
    colours."""
    names, image = task.class_names, open_image(record["image"]).permute(1, 2, 0).numpy()
    truth = open_label_map(record["label_map"], **label_map_options(record)).numpy().astype(int)
    maps, known = [decode_label_map(prediction) for prediction in given], truth != IGNORE_INDEX
    shown = [
        ("picture", picture(image, "held-out picture", largest=LARGEST)),
        ("truth", _mapped(image, truth, names, "true")),
    ]
    for name, found in zip(run_names(labels), maps, strict=True):
        right = f", {(found == truth)[known].mean():.0%} right" if known.any() else ""
        shown.append((f"{name}{right}", _mapped(image, found, names, "found")))
    pixels = np.concatenate([each.ravel() for each in (truth, *maps)])
    return views(shown, legend(shares(pixels, names, ignore=IGNORE_INDEX)))


def _mapped(image: np.ndarray, labels: np.ndarray, names: Sequence[str], what: str) -> str:
    said = (
        ", ".join(
            f"{row['name']} {percent(row['share'])}"
            for row in shares(labels, names, ignore=IGNORE_INDEX)
        )
        or "none"
    )
    return picture(
        np.asarray(draw_map(image, labels, side=LARGEST, ignore=IGNORE_INDEX)),
        f"the same in its {what} labels: {said}",
    )


def legend(rows: Sequence[Mapping[str, Any]]) -> str:
    """The colours and names of classes."""
    chips = [
        f'<span class="chip" style="--chip:rgb{color(row["label"])}">{escape(row["name"])}</span>'
        for row in rows[:CHIPS]
    ]
    chips += [f"and {len(rows) - CHIPS} more"] if len(rows) > CHIPS else []
    return f'<p class="chips">{" ".join(chips)}</p>'


def _overlaps(runs: Sequence[Run], asked: Asked) -> str:
    """Bars of each class's intersection over union, below the means of all."""
    names, matrices = (
        asked.task.class_names,
        [sum_confusion(said, asked.records) for said in asked.said],
    )
    ious, lines = [compute_class_ious(each) for each in matrices], []
    for name, each in zip(run_names([run.label for run in runs]), matrices, strict=True):
        said = "".join(
            f"<span><b>{value:.1%}</b> {escape(spelled(key))}</span> "
            for key, value in segmentation_figures(each).items()
        )
        lines.append(f'<p class="figures">{name if len(runs) > 1 else ""} {said}</p>')
    known = [
        label for label in range(len(ious[0])) if not all(np.isnan(each[label]) for each in ious)
    ]
    values = [
        (name_of(label, names), [float(np.nan_to_num(each[label])) for each in ious])
        for label in known
    ]
    return (
        "".join(lines)
        + _over(runs, asked)
        + _grid(class_bars("IoU of each class", values, [run.label for run in runs]))
    )


def _over(runs: Sequence[Run], asked: Asked) -> str:
    names = f" {' '.join(run_names([run.label for run in runs]))}" if len(runs) > 1 else ""
    return f'<p class="legend">Over {len(asked.records)} held-out pictures.{names}</p>'


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="curves">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'
