"""`beit3 demo --full`: every demo recipe at full length, with and without pretraining, over several
seeds.

It trains a visual tokenizer and a pretraining per seed; then VQA with few and with many labeled
questions, from each seed's pretrained weights and from scratch, at 1, 2 and 4 times the usual
steps; and every other task from both. The learning rate of VQA is tuned for each variant and label
count on training questions that neither is trained on. Every run can be stopped and resumed.
results.json and results.md hold the numbers, one row each, with their spread over seeds.
"""

import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.console import Console

from beit3.demo.comparison_runs import (
    LABEL_COUNTS,
    SEEDS,
    VARIANTS,
    fine_tune_task,
    fine_tune_vqa,
    pretrain_seed,
)
from beit3.demo.comparison_table import make_pretraining_rows, make_task_rows, make_vqa_rows
from beit3.demo.parallel import Job, run_jobs
from beit3.demo.tables import format_markdown
from beit3.demo.tour import list_trainable_tasks
from beit3.files import write_text
from beit3.report.page import write_report
from beit3.task import load_task
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.log import format_duration


def run(out: Path) -> Path:
    """Runs or resumes the comparison in `out`; returns the path of results.md."""
    started, console = time.monotonic(), Console(highlight=False)
    task_names = list_trainable_tasks(console)
    for name in ("pretrain", "vqkd", "vqa", *task_names):
        prepare_embedded_world(load_task(name))  # once, before several processes need it
    results = train_all(out, task_names)
    results["minutes"] = (time.monotonic() - started) / 60
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    rows = [
        *make_pretraining_rows(results),
        *make_vqa_rows(results),
        *make_task_rows(results),
    ]
    write_text(out / "results.md", format_markdown(rows))
    console.print(format_markdown(rows))
    write_report(
        [out / "seed0" / folder for folder in ("vqkd", "pairs", "pretrain")],
        out / "report.html",
        title="BEiT-3 in miniature, at full length",
        table=rows,
    )
    duration = format_duration(time.monotonic() - started)
    console.print(f"{out / 'results.md'} and {out / 'report.html'}   ({duration})")
    return out / "results.md"


def train_all(out: Path, task_names: Sequence[str]) -> dict:
    """Trains all runs and returns their numbers: `seeds`, `questions` and `tasks`."""
    seeds = tuple(f"seed{seed}" for seed in SEEDS)
    pretraining = {
        key: Job(pretrain_seed, (out, seed)) for key, seed in zip(seeds, SEEDS, strict=True)
    }
    questions, tasks = (
        {
            (item, variant): Job(function, (out, item, variant), get_needs(variant, seeds))
            for variant, item in product(VARIANTS, items)
        }
        for function, items in ((fine_tune_vqa, LABEL_COUNTS), (fine_tune_task, task_names))
    )
    results = run_jobs({**pretraining, **questions, **tasks})
    return {
        "seeds": {str(seed): results[key] for key, seed in zip(seeds, SEEDS, strict=True)},
        "questions": merge_results([results[key] for key in questions]),
        "tasks": merge_results([results[key] for key in tasks]),
    }


def get_needs(variant: str, seeds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the jobs that fine-tunings of a variant wait for: they train all seeds."""
    return () if variant == "scratch" else seeds


def merge_results(results: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """Returns the results of several jobs as one dictionary by run name."""
    return {name: scores for job_results in results for name, scores in job_results.items()}
