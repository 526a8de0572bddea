"""Panels of each task: parts of a report with images and what the networks predict for them.

Weights are read from `best/` of a run, or else `last/`; records are the held-out ones of the run's
own data directory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from beit3.report.answers import (
    make_captioning_panels,
    make_imagenet_panels,
    make_nlvr2_panels,
    make_vqa_panels,
)
from beit3.report.codebook import make_vqkd_panels
from beit3.report.detection import make_coco_panels
from beit3.report.gallery import make_retrieval_panels
from beit3.report.masking import make_pretrain_panels
from beit3.report.panel_inputs import Panel
from beit3.report.runs import Run
from beit3.report.segmentation import make_ade20k_panels

PANELS: Mapping[str, Callable[[Sequence[Run]], Iterable[Panel]]] = {
    "vqkd": make_vqkd_panels,
    "pretrain": make_pretrain_panels,
    "vqa": make_vqa_panels,
    "nlvr2": make_nlvr2_panels,
    "captioning": make_captioning_panels,
    "retrieval": make_retrieval_panels,
    "imagenet": make_imagenet_panels,
    "coco": make_coco_panels,
    "ade20k": make_ade20k_panels,
}
"""Task name -> function that makes the panels of runs of that task."""


def make_panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels of runs of one task; empty for a task that has none."""
    if not runs or runs[0].task not in PANELS:
        return []
    return list(PANELS[runs[0].task](runs))
