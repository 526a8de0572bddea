"""Names, units, digits and direction of scores, as the page shows them.

A score's name may have a source in front of it: "pairs/text_loss".
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from beit3 import task as tasks
from beit3.metrics.detection import COCO_METRICS
from beit3.report.runs import is_finite_number

ABSENT = "—"
"""Stands for a value that a run does not have."""

CROSS_ENTROPY_TASKS = ("pretrain", "vqa", "nlvr2", "captioning", "retrieval", "imagenet")
"""Tasks whose losses are cross-entropies, in nats."""

CAPTION_SCORES = {
    **{f"bleu{order}": f"BLEU-{order}" for order in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "cider_d": "CIDEr-D",
    "cider_unclipped": "CIDEr unclipped",
    "meteor": "METEOR",
    "spice": "SPICE",
}
"""Display names of caption scores. They are plain numbers; papers print them times 100."""

DETECTION_SCORES = {
    f"{kind}_{name}": f"{kind} {name[:2].upper()}{name[2:].replace('_', ' ')}"
    for kind in ("box", "mask")
    for name in COCO_METRICS
}
"""Display names of COCO's scores: "box AP50", "mask AR small". A score of -1 is undefined."""

DETAIL_SCORES = tuple(name for name in DETECTION_SCORES if not name.endswith(("_ap", "_ap50")))
"""Scores that have a table of their own; elsewhere they would crowd out the others."""

RATE_ENDINGS = (
    "accuracy",
    "consistency",
    "official",
    "top5",
    "recall",
    "@1",
    "@5",
    "@10",
    "miou",
    "aacc",
    "macc",
    *DETECTION_SCORES,
)
"""Endings of names whose values are fractions that are better when larger."""

PERCENT_ENDINGS = (*RATE_ENDINGS, "codebook_use", "most_frequent")
"""Endings of names whose values are fractions, shown in percent."""

DISPLAY_NAMES = {
    **CAPTION_SCORES,
    **DETECTION_SCORES,
    "top5": "top-5 accuracy",
    "official": "official accuracy",
    "miou": "mIoU",
    "aacc": "aAcc",
    "macc": "mAcc",
    "rpn_objectness": "proposals, object or not",
    "rpn_box": "proposals, box",
    **{
        f"box{stage}_{part}": f"stage {stage + 1}, {part}"
        for stage in range(3)
        for part in ("class", "box")
    },
}
"""Display names of scores and losses whose own names do not read well."""


def get_headline(task: str) -> str:
    """Returns the name of a task's headline metric; empty for a task that is not installed."""
    try:
        return tasks.load_task(task).headline
    except (ImportError, ValueError):
        return ""


def get_direction(name: str, task: str) -> int:
    """Returns 1 if larger scores of a name are better, -1 if smaller ones are, 0 if unknown."""
    last = get_last_part(name)
    is_better_larger = (
        last == get_headline(task)
        or last.endswith(RATE_ENDINGS)
        or last in CAPTION_SCORES
        or last.startswith("negative_")
    )
    if is_better_larger:
        return 1
    return -1 if last.endswith(("loss", "error", "distance")) else 0


def get_last_part(name: str) -> str:
    """Returns a name without the source in front of it."""
    return name.rpartition("/")[2]


def format_score_name(name: str) -> str:
    """Returns the display name of a score: "text_loss" -> "text loss", "cider" -> "CIDEr"."""
    return DISPLAY_NAMES.get(name, name.replace("_", " "))


def format_unit(name: str, task: str) -> str:
    """Returns the unit that follows a score's name, or "" if it has none.

    It is " (nats)" for a cross-entropy and " (codes)" for a perplexity of codes.
    """
    last = get_last_part(name)
    if last == "perplexity":
        return " (codes)"
    return " (nats)" if last.endswith("loss") and task in CROSS_ENTROPY_TASKS else ""


def format_score(name: str, value: Any) -> str:
    """Returns one score as text, with four digits where its name asks for no other format."""
    if value is None or (value == -1 and get_last_part(name) in DETECTION_SCORES):
        return ABSENT
    if not is_finite_number(value):
        return json.dumps(value)
    return f"{value:{choose_format(name, '.4g')}}"


def format_column(name: str, values: Sequence[float | None]) -> list[str]:
    """Returns scores of one name as texts with equally many decimals, "" for None."""
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(sizes, default=0)
    decimals = max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 0
    number_format = choose_format(name, f".{min(decimals, 8)}f")
    return ["" if value is None else f"{value:{number_format}}" for value in values]


def choose_format(name: str, default: str) -> str:
    """Returns the format specification of a score.

    Fractions are in percent, caption scores have the three decimals that papers print, and all
    others have the format `default`.
    """
    parts = name.split("/")
    if CAPTION_SCORES.keys() & set(parts):
        return ".3f"
    return ".1%" if parts[-1].endswith(PERCENT_ENDINGS) else default
