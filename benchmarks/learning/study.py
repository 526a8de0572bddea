"""The engine of the programs beside it: rows of training runs, what they are measured by, results.

A row is a chain of runs, such as visual tokenizer, pairs, pretraining. Its last network is measured
by masked words, by linear probes, and by short fine-tunings. Runs that need nothing of each other
are trained as many at a time as there are cores, each on one thread.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from beit3.config import override
from beit3.demo.parallel import Job
from beit3.demo.tables import TASK_SCORES
from beit3.demo.tour import export_world
from beit3.files import read_json, write_text
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain
from benchmarks.learning.drawing import draw_results, make_table
from benchmarks.learning.jobs import run_kept_jobs
from benchmarks.learning.probes import OBJECTS, Probe, measure_words, probe_initial, probe_run
from benchmarks.learning.runs import (
    RESULT,
    Run,
    digest,
    get_folder,
    make_training_jobs,
)
from benchmarks.probe import save_results

TASKS = ("vqa", *TASK_SCORES)
SEEDS = (0, 1, 2)
FAST_FACTOR = 0.01
MIN_STEPS = 2

Values = dict[str, dict[str, list[float]]]
"""Row -> measure -> its value for each seed."""


# What a program declares --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A network that is measured: that of `run`, or of initial values where there is none."""

    name: str
    run: Run | None = None
    network: str = ""
    """Changes of the network that fine-tunings must share: `--task.model.patch_size 4`."""
    starts: Mapping[str, Run] = field(default_factory=dict)
    """Task -> the run whose weights it starts from, where that is not `run`."""
    tasks: Sequence[str] = TASKS
    """Tasks by whose fine-tunings the row is measured."""


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning, by which rows are measured."""

    task: str
    steps: int
    labels: int = 0
    """Training records; 0 = all."""
    recipe: str = ""
    """Empty: that of the study."""
    records: str = ""
    """Folder of the records below the study's root."""

    @property
    def score(self) -> str:
        """The key of the task's score."""
        return TASK_SCORES[self.task][1] if self.task in TASK_SCORES else "accuracy"

    @property
    def name(self) -> str:
        """The name of the measure: `vqa accuracy, 1000 labels, 300 steps`."""
        labels = f"{self.labels} labels" if self.labels else "all labels"
        what = " ".join(filter(None, (self.records, self.task, self.score.replace("_", " "))))
        return f"{what}, {labels}, {self.steps} steps"


@dataclass(frozen=True)
class Study:
    """What a program compares."""

    name: str
    rows: Sequence[Row]
    tunings: Sequence[Tuning] = ()
    words: bool = True
    """Whether masked attribute words are predicted, where a row's last run is pretraining."""
    probe: Probe = OBJECTS
    rows_are_columns: bool = False
    """Whether the table has a column, not a line, for each row of the study."""
    recipe: str = "demo"
    """Of fine-tunings, and of pretraining for the network of initial values."""
    shares_pretraining: bool = False
    """Whether fine-tunings of all seeds start from the weights of the first seed."""
    write_records: Callable[["Options"], Path] | None = None
    """Writes all records and returns their root; None = those of the embedded world."""


@dataclass(frozen=True)
class Options:
    """Where a program works and for how long."""

    out: Path
    factor: float = 1.0
    """Factor of all numbers of steps."""
    data: Path = Path()
    """Folder of the datasets that `Study.write_records` reads."""
    world: str = "default"
    seeds: tuple[int, ...] = SEEDS
    eval_records: int = 0
    """Records that a fine-tuning is scored on; 0 = all of the val split."""

    def scale(self, run: Any) -> Any:
        """Returns a run, and all that it needs, or a tuning with its number of steps scaled."""
        scaled = replace(run, steps=max(MIN_STEPS, round(run.steps * self.factor)))
        if isinstance(run, Run):
            needs = {name: self.scale(need) for name, need in run.needs.items()}
            scaled = replace(scaled, needs=needs)
        return scaled


# A study ------------------------------------------------------------------------------------------


def run_study(study: Study, options: Options) -> Values:
    """Trains and measures all rows; returns the values."""
    root = (study.write_records or write_world)(options)
    jobs: dict[Path, Job] = {}
    results: dict[tuple[str, Path], dict[str, str]] = {}  # row and file -> its key -> measure
    for row, seed in product(study.rows, options.seeds):
        start_seed = options.seeds[0] if study.shares_pretraining else seed
        run = row.run and options.scale(row.run).with_seed(start_seed)
        jobs |= make_training_jobs(run, root, options.out) if run else {}
        measuring_jobs = make_measuring_jobs(study, row, run, start_seed, root, options.out)
        jobs |= measuring_jobs
        results |= {(row.name, path): {} for path in measuring_jobs}
        for tuning in map(options.scale, study.tunings):
            if tuning.task not in row.tasks:
                continue
            start = row.starts.get(tuning.task)
            start = options.scale(start).with_seed(start_seed) if start else run
            tuning_run = make_tuning_run(study, tuning, row, start, seed, options)
            jobs |= make_training_jobs(tuning_run, root, options.out)
            path = get_folder(tuning_run, root, options.out) / RESULT
            results[row.name, path] = {tuning.score: tuning.name}
    run_kept_jobs(jobs)
    values: Values = {row.name: {} for row in study.rows}
    for (row_name, path), names in results.items():
        for key, value in read_json(path).items():
            if not names or key in names:
                values[row_name].setdefault(names.get(key, key), []).append(value)
    return values


def write_world(options: Options) -> Path:
    """Writes the records of the embedded world."""
    return export_world(["vqkd", "pretrain", *TASKS], options.world)


def make_measuring_jobs(
    study: Study, row: Row, run: Run | None, seed: int, root: Path, out: Path
) -> dict[Path, Job]:
    """Returns the jobs that measure a row without fine-tuning, by their files."""
    probe = study.probe
    if run is None:
        recipe = override(load_task("pretrain").recipes[study.recipe], row.network.split())
        model = recipe.task.model
        path = out / f"initial-seed{seed}-{digest([repr(model), root.name])}" / "probe.json"
        return {path: Job(probe_initial, (model, seed, probe, root))}
    folder = get_folder(run, root, out)
    needs = (folder / RESULT,)
    jobs = {folder / "probe.json": Job(probe_run, (folder, probe, root), needs)}
    if study.words and issubclass(load_task(run.task), Pretrain) and reads_pairs(run):
        jobs[folder / "words.json"] = Job(measure_words, (folder, root), needs)
    return jobs


def reads_pairs(run: Run) -> bool:
    """Returns whether pretraining has pairs, without which words do not follow images."""
    return not run.batch or "pairs" in run.batch


def make_tuning_run(
    study: Study, tuning: Tuning, row: Row, run: Run | None, seed: int, options: Options
) -> Run:
    """Returns the run of a fine-tuning from a row's weights."""
    changes = f"--data.limit {tuning.labels} --run.save_every 100 --run.keep 1 {row.network}"
    return Run(
        tuning.task,
        tuning.task,
        tuning.recipe or study.recipe,
        tuning.steps,
        f"{changes} --run.eval_records {options.eval_records}",
        needs={"init": run} if run else {},
        records=tuning.records,
        seed=seed,
        keep=False,
    )


def run_program(study: Study, description: str) -> None:
    """Reads the command line, runs a study, prints its table and writes JSON, table and plot."""
    arguments = read_arguments(study, description)
    tunings = [item for item in study.tunings if item.task in (arguments.only or TASKS)]
    rows = [row for row in study.rows if not arguments.rows or row.name in arguments.rows]
    options = Options(arguments.out, arguments.steps, arguments.data, seeds=tuple(arguments.seeds))
    if arguments.fast:
        tunings = list({item.task: item for item in reversed(tunings)}.values())[::-1]
        options = replace(options, factor=FAST_FACTOR, world="small", seeds=(0,), eval_records=20)
    study, started = replace(study, rows=rows, tunings=tunings), time.monotonic()
    values = run_study(study, options)
    path = arguments.json or arguments.out / f"{study.name}.json"
    table = make_table(values, rows_are_columns=study.rows_are_columns)
    save_results(path, table, values)
    write_text(path.with_suffix(".md"), table)
    write_text(path.with_suffix(".svg"), draw_results(values))
    print(table)
    print(f"{path}, {path.with_suffix('.svg')}   ({(time.monotonic() - started) / 60:.1f} minutes)")


def read_arguments(study: Study, description: str) -> argparse.Namespace:
    """Reads the command line of a program."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(),
        required=study.write_records is not None,
        help="folder of the datasets; programs on the embedded world need none",
    )
    parser.add_argument("--json", type=Path, help="file of the results; by default below --out")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of all numbers of steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", help="tasks whose fine-tunings are run", choices=TASKS)
    parser.add_argument(
        "--rows", nargs="+", help="rows that are run", choices=[row.name for row in study.rows]
    )
    parser.add_argument("--fast", action="store_true", help="a few steps of a small world")
    return parser.parse_args()
