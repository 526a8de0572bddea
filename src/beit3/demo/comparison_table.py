"""Rows of the comparison's table: means over the seeds, with minimum and maximum in parentheses."""

from collections.abc import Iterator, Mapping
from itertools import product

from beit3.demo.comparison_runs import LABEL_COUNTS, SEEDS, STEP_FACTORS, VARIANTS, VQA_STEPS
from beit3.demo.tables import (
    ATTRIBUTES,
    TASK_SCORES,
    format_spread,
    get_score_format,
    make_row,
)
from beit3.task import load_task


def make_pretraining_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """Yields what pretraining learned, with guesses that need no learning as reference."""
    seeds = list(results["seeds"].values())

    def format_measure(name: str, form: str = ".2f") -> str:
        return format_spread([seed[name] for seed in seeds], form)

    yield make_row("visual tokenizer: codes in use", format_measure("codebook_use", ".0%"), "")
    yield make_row(
        "visual tokenizer: perplexity",
        format_measure("perplexity", ".1f"),
        f"of {seeds[0]['num_codes']:.0f} codes",
    )
    yield make_row(
        "masked patches: loss (nats)",
        format_measure("image_loss"),
        f"{format_measure('nearest_patch')} from the nearest visible patch",
    )
    yield make_row(
        "masked tokens of texts: loss (nats)",
        format_measure("text_loss"),
        f"{format_measure('frequency')} from token frequency",
    )
    yield make_row(
        "masked tokens of pairs: loss (nats)",
        format_measure("text_right"),
        f"{format_measure('text_wrong')} with another record's image",
    )
    maskings = (("single_", "one masked at a time"), ("", "half of the caption masked"))
    for (prefix, masking), attribute in product(maskings, ATTRIBUTES):
        wrong = format_measure(f"{prefix}wrong/{attribute}", ".1%")
        yield make_row(
            f"{attribute} words predicted correctly, {masking}",
            format_measure(f"{prefix}right/{attribute}", ".1%"),
            f"{wrong} with another record's image",
        )


def make_vqa_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """Yields the VQA accuracy from pretrained weights per label count and length, with that from
    scratch as reference."""
    runs = results["questions"]
    for num_labels, factor in product(LABEL_COUNTS, STEP_FACTORS):
        accuracy, rates = {}, {}
        for variant in VARIANTS:
            names = [f"{num_labels}-{variant}-{factor}x-seed{seed}" for seed in SEEDS]
            accuracy[variant] = format_spread([runs[name]["accuracy"] for name in names])
            rates[variant] = runs[names[0]]["rate"]
        yield make_row(
            f"questions answered, {num_labels} labels, {VQA_STEPS * factor} steps, pretrained",
            accuracy["pretrained"],
            f"{accuracy['scratch']} from scratch "
            f"(learning rates {rates['pretrained']} and {rates['scratch']})",
        )
    most_frequent = next(iter(runs.values()))["most_frequent"]
    yield make_row("questions answered, most frequent answer", f"{most_frequent:.1%}", "")


def make_task_rows(results: Mapping) -> Iterator[dict[str, str]]:
    """Yields the other tasks' scores from pretrained weights, with those from scratch as reference,
    at the demo recipes' steps."""
    runs = results["tasks"]
    for name, (metric, score) in TASK_SCORES.items():
        if f"{name}-{VARIANTS[0]}-seed{SEEDS[0]}" not in runs:
            continue
        values = {
            variant: format_spread(
                [runs[f"{name}-{variant}-seed{seed}"][score] for seed in SEEDS],
                get_score_format(score),
            )
            for variant in VARIANTS
        }
        steps = load_task(name).recipes["demo"].run.steps
        yield make_row(
            f"{metric}, {steps} steps, pretrained",
            values["pretrained"],
            f"{values['scratch']} from scratch",
        )
