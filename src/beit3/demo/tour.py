"""`beit3 demo`: every stage of BEiT-3 on the embedded world, in minutes on two cores.

The stages are: embedded world, text tokenizer, visual tokenizer, pretraining, contrastive stage,
the tasks from those weights and from scratch, one table and report.html. Every stage is a run of
its own below the demo's directory, and begins as soon as a core is free and what it needs is done.
If the demo is stopped, the same command resumes it, and finished stages are not run again. At the
end it names the command that serves what it has trained.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from beit3.demo.parallel import Job, run_jobs
from beit3.demo.probes import measure_pretraining
from beit3.demo.tables import SCRATCH, TASK_SCORES, make_tour_rows, print_table
from beit3.progress import show_progress
from beit3.recipe import Recipe
from beit3.report.page import write_report
from beit3.segmentation.head import check_transformers
from beit3.task import load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.log import format_duration
from beit3.training.loop import train
from beit3.weights import store

NUM_QUESTIONS = 1000
"""Labeled questions that fine-tuning is given: few, so that the effect of pretraining is
visible."""


TOKENIZER = "vqkd"
"""Folder of the visual tokenizer."""
CONTRASTIVE = "contrastive"
"""Folder of the contrastive stage."""
STARTS = {"imagenet": CONTRASTIVE}
"""Task -> folder of the weights it starts from, where that is not `pretrain`: classes of images
gain most from masked pretraining and the contrastive stage together (docs/lab_notes.md)."""

LONGEST = ("coco", "ade20k")
"""Tasks that are begun first, so that none of them is left for the end."""

OVERVIEW = """\
[bold]training[/bold], one run on each core:
  vqkd          the visual tokenizer: images -> codes
  pairs         pretraining, part 1: images with texts, only text masked
  pretrain      pretraining, part 2: images, texts and pairs
  contrastive   images and captions that find each other
  TASK          a task from the pretrained weights
  TASK-scratch  the same task without pretraining"""


@dataclass(frozen=True)
class TourConfig:
    """Training steps of each stage, and the size of the world."""

    tokenizer_steps: int
    pair_steps: int
    """Steps on pairs alone, with only text masked."""
    pretraining_steps: int
    """Steps on images, texts and pairs."""
    contrastive_steps: int
    task_steps: Mapping[str, int]
    """Steps of each task. Statements on two images need more steps than a demo has before
    pretraining shows (docs/lab_notes.md)."""
    world: str
    """Which embedded world: `default` or `small`."""
    eval_records: int = 0
    """Held-out records that a run is scored on; 0 = those of its recipe."""


USUAL = TourConfig(
    tokenizer_steps=300,
    pair_steps=700,
    pretraining_steps=220,
    contrastive_steps=200,
    task_steps={
        "vqa": 300,
        "captioning": 120,
        "retrieval": 120,
        "imagenet": 120,
        "coco": 120,
        "ade20k": 120,
    },
    world="default",
)
FAST = TourConfig(
    tokenizer_steps=30,
    pair_steps=20,
    pretraining_steps=10,
    contrastive_steps=4,
    task_steps=dict.fromkeys(USUAL.task_steps, 4),
    world="small",
    eval_records=32,
)


@dataclass(frozen=True)
class Stage:
    """One training run of the tour."""

    task: str
    recipe: str
    steps: int
    start: str = ""
    """Folder of the stage whose weights it starts from; empty = initial values."""
    limit: int = 0
    """Training records; 0 = as many as the recipe says."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Folders of the stages that must be done before."""
        codes = (TOKENIZER,) if self.task == "pretrain" else ()
        return (*codes, self.start) if self.start else codes

    def train(self, out: Path, root: Path, folder: str, eval_records: int) -> dict:
        """Trains in `folder` below `out`, or resumes that run; returns its final scores."""
        task = load_task(self.task)
        recipe = task.recipes[self.recipe]
        if self.task == "pretrain":
            recipe = set_visual_tokenizer(recipe, out / TOKENIZER / "last")
        run = recipe.run
        recipe = replace(
            recipe,
            data=replace(recipe.data, root=str(root), limit=self.limit or recipe.data.limit),
            run=replace(run, steps=self.steps, eval_records=eval_records or run.eval_records),
        )
        init = str(out / self.start / "last") if self.start else ""
        return train(recipe, task, out=out / folder, init=init, label=folder)


def make_stages(config: TourConfig, task_names: Iterable[str]) -> dict[str, Stage]:
    """Returns the stages by folder. Of those that can be trained the first comes first."""
    stages = {
        TOKENIZER: Stage("vqkd", "demo", config.tokenizer_steps),
        "pairs": Stage("pretrain", "demo_pairs", config.pair_steps),
        "pretrain": Stage("pretrain", "demo", config.pretraining_steps, start="pairs"),
        CONTRASTIVE: Stage("retrieval", "demo_itc", config.contrastive_steps, start="pretrain"),
    }
    tasks = {
        name: Stage(
            name, "demo", config.task_steps[name], limit=NUM_QUESTIONS if name == "vqa" else 0
        )
        for name in sorted(task_names, key=lambda name: name not in LONGEST)
    }
    for name, stage in tasks.items():
        stages[name] = replace(stage, start=STARTS.get(name, "pretrain"))
    for name, stage in tasks.items():
        stages[f"{name}{SCRATCH}"] = stage
    return stages


def run(out: Path, *, fast: bool = False) -> Path:
    """Runs or resumes the tour in `out`; returns the path of the report."""
    started, config = time.monotonic(), FAST if fast else USUAL
    console = Console(highlight=False)
    trainable = ("vqa", *list_trainable_tasks(console))
    task_names = [name for name in trainable if name in config.task_steps]
    root = export_world(["vqkd", "pretrain", *task_names], config.world)
    stages = make_stages(config, task_names)
    console.print(OVERVIEW)
    scores = run_jobs(
        {
            folder: Job(stage.train, (out, root, folder, config.eval_records), stage.needs)
            for folder, stage in stages.items()
        }
    )

    console.print("[bold]measuring what pretraining learned[/bold]")
    pretraining = measure_pretraining(out / "pretrain", cache=out / "figures.json")
    rows = make_tour_rows(scores, pretraining)
    print_table(console, rows, title="BEiT-3 on the embedded world, held-out records")
    report = write_report(
        [out / folder for folder in stages],
        out / "report.html",
        title="BEiT-3 in miniature",
        table=rows,
    )
    console.print(f"report: {report.resolve()}   ({format_duration(time.monotonic() - started)})")
    command = format_serve_command([out / name for name in task_names])
    console.print("to try it in a browser:")
    console.print(command, soft_wrap=True, markup=False)  # one line, which can be copied
    return report


def format_serve_command(runs: Iterable[Path]) -> str:
    """Returns the command that serves the weights of runs, as a shell takes it."""
    return shlex.join([find_program(), "serve", *(run.as_posix() for run in runs)])


def find_program() -> str:
    """Returns what starts this program: `beit3`, or its path where the shell does not find it.

    `make demo` runs it in an environment that is not active.
    """
    started, on_path = Path(sys.argv[0]), shutil.which("beit3")
    if started.stem != "beit3" or (on_path and Path(on_path).resolve() == started.resolve()):
        return "beit3"
    return started.as_posix()


def export_world(task_names: Iterable[str], world: str) -> Path:
    """Prepares the embedded world's records of these tasks; returns their root."""
    with show_progress("writing the world") as advance:
        for name in task_names:
            root = prepare_embedded_world(load_task(name), world, progress=advance)
    return root


def list_trainable_tasks(console: Console) -> list[str]:
    """Returns the tasks of `TASK_SCORES` that this installation can train, and prints which one is
    left out."""
    try:
        check_transformers()
    except ValueError as error:
        console.print(f"without ade20k: {error}")
        return [name for name in TASK_SCORES if name != "ade20k"]
    return list(TASK_SCORES)


def set_visual_tokenizer(recipe: Recipe, weights: Path) -> Recipe:
    """Returns a pretraining recipe with a visual tokenizer's weights and its number of codes."""
    task, tokenizer = recipe.task, store.read_config(weights).config.model
    assert isinstance(task, PretrainConfig) and isinstance(tokenizer, VisualTokenizerConfig)
    return replace(
        recipe, task=replace(task, visual_tokenizer=str(weights), num_codes=tokenizer.num_codes)
    )
