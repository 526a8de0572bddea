"""Rows of the demo's tables: a metric, its value, and a reference to compare it with."""

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

TASK_SCORES = {
    "nlvr2": ("statements about two images judged correctly", "accuracy"),
    "captioning": ("captions: CIDEr", "cider"),
    "retrieval": ("image-text retrieval: mean recall", "mean_recall"),
    "imagenet": ("images classified correctly", "accuracy"),
    "coco": ("object detection: box AP50", "box_ap50"),
    "ade20k": ("semantic segmentation: mIoU", "miou"),
}
"""For each task besides pretraining and VQA: what the tables call its score, and its key among the
scores."""

TOUR_SCORES = {"vqa": ("questions answered", "accuracy"), **TASK_SCORES}
"""The same with VQA."""

SCRATCH = "-scratch"
"""What the folders of the tour's runs without pretraining end in."""

ATTRIBUTES = ("color", "shape", "size")
"""Kinds of words that name an attribute of an object of the embedded world."""


def make_row(metric: str, value: str, reference: str) -> dict[str, str]:
    """Returns a row of a table by column name."""
    return {"metric": metric, "value": value, "reference": reference}


def format_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows of `make_row` as a Markdown table."""
    lines = [
        "| metric | value | reference |",
        "|---|---|---|",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def print_table(console: Console, rows: Sequence[Mapping[str, str]], *, title: str) -> None:
    """Prints rows of `make_row` to the terminal."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def format_spread(values: Sequence[float], form: str = ".1%") -> str:
    """Returns the mean with minimum and maximum: `60.0% (50.0% to 70.0%)`."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def get_score_format(score: str) -> str:
    """Returns the format of a task's score: CIDEr is a number, all others are fractions."""
    return ".2f" if score == "cider" else ".1%"


# The tour's table ---------------------------------------------------------------------------------


def make_tour_rows(
    scores: Mapping[str, Mapping[str, float]], pretraining: Mapping[str, float]
) -> list[dict[str, str]]:
    """Returns the rows of the tour's table.

    Args:
        scores: Final scores of each stage, by the name of its folder.
        pretraining: What `measure_pretraining` returns.
    """
    tokenizer = scores["vqkd"]
    return [
        make_row("visual tokenizer: codes in use", f"{tokenizer['codebook_use']:.1%}", ""),
        make_row(
            "visual tokenizer: perplexity",
            f"{tokenizer['perplexity']:.1f}",
            f"of {tokenizer['num_codes']:.0f} codes",
        ),
        make_row(
            "masked patches: loss (nats)",
            f"{pretraining['image_loss']:.2f}",
            f"{pretraining['nearest_patch']:.2f} from the nearest visible patch",
        ),
        make_row(
            "masked tokens of texts: loss (nats)",
            f"{pretraining['text_loss']:.2f}",
            f"{pretraining['frequency']:.2f} from token frequency",
        ),
        make_row(
            "masked tokens of pairs: loss (nats)",
            f"{pretraining['text_right']:.2f}",
            f"{pretraining['text_wrong']:.2f} with another record's image",
        ),
        *(
            make_row(
                f"masked {attribute} words predicted correctly",
                f"{pretraining[f'single_right/{attribute}']:.1%}",
                f"{pretraining[f'single_wrong/{attribute}']:.1%} with another record's image",
            )
            for attribute in ATTRIBUTES
        ),
        *(
            make_task_row(name, scores[name], scores[f"{name}{SCRATCH}"])
            for name in TOUR_SCORES
            if name in scores
        ),
    ]


def make_task_row(
    name: str, pretrained: Mapping[str, float], scratch: Mapping[str, float]
) -> dict[str, str]:
    """Returns the row of a task: its score from pretrained weights, beside that from scratch and
    that of the most frequent answer where there is one."""
    metric, score = TOUR_SCORES[name]
    form = get_score_format(score)
    reference = f"{scratch[score]:{form}} from scratch"
    if "most_frequent" in pretrained:
        reference += f", {pretrained['most_frequent']:.1%} for the most frequent answer"
    return make_row(metric, f"{pretrained[score]:{form}}", reference)
