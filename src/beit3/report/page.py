"""One run or several as one HTML file of scores, curves and images.

Everything is inline (style, SVG, PNG as data URIs), so that the file can be mailed and nothing is
fetched. Runs of one task share a section and its charts; each run has a color and a dash.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from beit3.files import write_text
from beit3.report.curve_panels import render_curves, render_gradient_curves
from beit3.report.document import render_document, render_panel, render_section, render_table
from beit3.report.panels import make_panels
from beit3.report.run_panels import (
    render_differences,
    render_environments,
    render_run_summary,
    render_scores,
    render_source_scores,
)
from beit3.report.runs import Run, read_runs

HEADINGS: Mapping[str, tuple[str, str]] = {
    "vqkd": (
        "Visual tokenizer",
        "A codebook of patches, learned from a teacher: what its codes mean.",
    ),
    "pretrain": (
        "Pretraining",
        "Masked tokens and patches: how many are predicted right, and what the predictions are.",
    ),
    "vqa": (
        "Visual question answering",
        "Questions about held-out images, and the network's answers.",
    ),
    "nlvr2": (
        "Visual reasoning",
        "Statements about two images: whether the network judges them true.",
    ),
    "captioning": (
        "Image captioning",
        "Held-out images, and the captions that the network generates.",
    ),
    "retrieval": (
        "Image-text retrieval",
        "Captions and images in one space: which of them lie nearest to one another.",
    ),
    "imagenet": (
        "Image classification",
        "Held-out images, and the classes that the network predicts.",
    ),
    "coco": (
        "Detection and instance segmentation",
        "Objects in held-out images. The losses of stages may rise at first: as proposals get "
        "better, there are more objects among them whose class and box are to be learned.",
    ),
    "ade20k": (
        "Semantic segmentation",
        "Held-out images, and the class that the network predicts for every pixel.",
    ),
}
"""Heading and lead of each task's section."""

MAX_TITLE_RUNS = 3
"""Runs up to which the title of a page names each."""


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    table: Sequence[Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page of run directories, atomically, and returns its path.

    Records or weights that are gone leave one line in the place of their panel.

    Args:
        runs: Run directories.
        out: The HTML file to write.
        title: Title of the page; by default the labels of the runs.
        table: Rows as column name -> text, shown first.
        notes: Lines under the title.

    Raises:
        ValueError: If a directory holds no run.
    """
    runs_by_task: dict[str, list[Run]] = {}
    for run in read_runs(runs):
        runs_by_task.setdefault(run.task, []).append(run)
    title = title or _make_title(runs_by_task)
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    if table:
        lead = "The scores of these runs side by side."
        parts.append(render_section("At a glance", lead, [render_table(table)]))
    parts += [render_task_section(task_runs) for task_runs in runs_by_task.values()]
    out = Path(out)
    write_text(out, render_document(title, "\n".join(parts)))
    return out


def _make_title(runs_by_task: Mapping[str, Sequence[Run]]) -> str:
    """Returns a title that names few runs, or counts many."""
    labels = [run.label for task_runs in runs_by_task.values() for run in task_runs]
    if len(labels) <= MAX_TITLE_RUNS:
        return " and ".join(labels)
    return f"{len(labels)} runs of {' and '.join(runs_by_task)}"


def render_task_section(runs: Sequence[Run]) -> str:
    """Returns the section of runs of one task: numbers, curves, and panels of what it predicts."""
    task = runs[0].task
    title, lead = HEADINGS.get(task, (task, f"Scores and curves of the task {task}."))
    several = len(runs) > 1
    summaries = [render_run_summary(run, index, several=several) for index, run in enumerate(runs)]
    task_panels = [
        render_panel(panel.title, panel.lead, panel.body)
        for panel in make_panels(select_final_runs(runs))
    ]
    parts = [
        *summaries,
        render_scores(runs),
        render_source_scores(runs),
        render_differences(runs),
        render_curves(runs),
        render_gradient_curves(runs),
        *task_panels,
        render_environments(runs),
    ]
    return render_section(title, lead, parts)


def select_final_runs(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs from whose weights no other one of them started.

    An earlier stage of the same training has curves, but no panels of predictions.
    """
    initial_weights = [Path(run.init).resolve() for run in runs if run.init]
    return [
        run
        for run in runs
        if not any(run.path in (weights, *weights.parents) for weights in initial_weights)
    ]
