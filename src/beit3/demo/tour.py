"""`beit3 demo`: every stage of BEiT-3 on the embedded world, in minutes on two cores.

The stages are: embedded world, text tokenizer, visual tokenizer, pretraining, contrastive stage,
the tasks from those weights and from scratch, one table and report.html. Every stage is a run of
its own below the demo's directory. If the demo is stopped, the same command resumes it, and
finished stages are not run again. At the end it names the command that serves what it has trained.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from beit3.demo.parallel import Job, run_in_parallel
from beit3.demo.probes import measure_pretraining
from beit3.demo.tables import SCRATCH, TASK_SCORES, make_tour_rows, print_table
from beit3.progress import show_progress
from beit3.recipe import Recipe, RunConfig
from beit3.report.page import write_report
from beit3.segmentation.head import check_transformers
from beit3.task import Task, load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.log import format_duration
from beit3.training.loop import train
from beit3.weights import store

NUM_QUESTIONS = 1000
"""Labeled questions that fine-tuning is given: few, so that the effect of pretraining is
visible."""


CONTRASTIVE = "contrastive"
"""Folder of the contrastive stage."""
STARTS = {"imagenet": CONTRASTIVE}
"""Task -> folder of the weights it starts from, where that is not `pretrain`: classes of images
gain most from masked pretraining and the contrastive stage together (docs/lab_notes.md)."""


@dataclass(frozen=True)
class TourConfig:
    """Training steps of each stage, and the size of the world."""

    tokenizer_steps: int
    pair_steps: int
    """Steps on pairs alone, with only text masked."""
    pretraining_steps: int
    """Steps on images, texts and pairs."""
    contrastive_steps: int
    vqa_steps: int
    task_steps: Mapping[str, int]
    """Steps of each task beside VQA. Statements on two images need more steps than a demo has
    before pretraining shows (docs/lab_notes.md)."""
    world: str
    """Which embedded world: `default` or `small`."""
    eval_records: int = 0
    """Held-out records that a run is scored on; 0 = those of its recipe."""


USUAL = TourConfig(
    tokenizer_steps=300,
    pair_steps=700,
    pretraining_steps=250,
    contrastive_steps=200,
    vqa_steps=300,
    task_steps={
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
    vqa_steps=10,
    task_steps=dict.fromkeys(USUAL.task_steps, 4),
    world="small",
    eval_records=32,
)


@dataclass(frozen=True)
class Tour:
    """Trains the stages of one tour."""

    out: Path
    """Directory of the runs."""
    root: Path
    """Root of the embedded world's records."""
    config: TourConfig
    console: Console

    def train_stage(
        self,
        title: str,
        task: type[Task],
        recipe: Recipe,
        *,
        steps: int,
        folder: str,
        init: str | Path = "",
    ) -> dict:
        """Trains one stage in `folder`, or resumes it, and returns its final scores."""
        self.console.print(f"[bold]{title}[/bold]")
        recipe = replace(
            recipe,
            data=replace(recipe.data, root=str(self.root)),
            run=limit_run(recipe.run, steps, self.config.eval_records),
        )
        return train(recipe, task, out=self.out / folder, init=str(init), label=folder)

    def train_tokenizer(self) -> dict:
        """Trains the visual tokenizer and returns its scores."""
        task = load_task("vqkd")
        return self.train_stage(
            "visual tokenizer: images -> codes (VQ-KD)",
            task,
            task.recipes["demo"],
            steps=self.config.tokenizer_steps,
            folder="vqkd",
        )

    def pretrain(self) -> Path:
        """Pretrains in two parts and returns the weights directory."""
        task, tokenizer_weights = load_task("pretrain"), self.out / "vqkd" / "last"
        self.train_stage(
            "pretraining, part 1: pairs, only text masked",
            task,
            set_visual_tokenizer(task.recipes["demo_pairs"], tokenizer_weights),
            steps=self.config.pair_steps,
            folder="pairs",
        )
        self.train_stage(
            "pretraining, part 2: images, texts and pairs",
            task,
            set_visual_tokenizer(task.recipes["demo"], tokenizer_weights),
            steps=self.config.pretraining_steps,
            folder="pretrain",
            init=self.out / "pairs" / "last",
        )
        return self.out / "pretrain" / "last"

    def train_contrastive(self, weights: Path) -> None:
        """Trains the contrastive stage on the pretraining pairs."""
        task = load_task("retrieval")
        self.train_stage(
            "contrastive stage: images and captions that find each other",
            task,
            task.recipes["demo_itc"],
            steps=self.config.contrastive_steps,
            folder=CONTRASTIVE,
            init=weights,
        )

    def fine_tune(self, task_names: Iterable[str]) -> dict[str, dict]:
        """Fine-tunes VQA and these tasks from pretrained weights and from scratch, side by side.

        Returns the scores by folder.
        """
        names = ["vqa", *task_names]
        folders = [folder for name in names for folder in (name, f"{name}{SCRATCH}")]
        self.console.print("[bold]the tasks, from the pretrained weights and from scratch[/bold]")
        steps = {"vqa": self.config.vqa_steps, **self.config.task_steps}
        jobs: list[Job] = [
            (
                fine_tune_task,
                (
                    self.out,
                    self.root,
                    folder,
                    steps[folder.removesuffix(SCRATCH)],
                    self.config.eval_records,
                ),
            )
            for folder in folders
        ]
        return dict(zip(folders, run_in_parallel(jobs), strict=True))


def limit_run(run: RunConfig, steps: int, eval_records: int) -> RunConfig:
    """Returns a run of so many steps, scored on so many records; 0 = as many as it says."""
    return replace(run, steps=steps, eval_records=eval_records or run.eval_records)


def fine_tune_task(out: Path, root: Path, folder: str, steps: int, eval_records: int) -> dict:
    """Trains or resumes the run in `folder`, the task's name, with `SCRATCH` behind it where it
    starts without pretraining; returns its final scores."""
    name = folder.removesuffix(SCRATCH)
    task = load_task(name)
    recipe = task.recipes["demo"]
    limit = NUM_QUESTIONS if name == "vqa" else recipe.data.limit
    recipe = replace(
        recipe,
        data=replace(recipe.data, root=str(root), limit=limit),
        run=limit_run(recipe.run, steps, eval_records),
    )
    start = out / STARTS.get(name, "pretrain") / "last"
    init = "" if folder.endswith(SCRATCH) else str(start)
    return train(recipe, task, out=out / folder, init=init, label=folder)


def run(out: Path, *, fast: bool = False) -> Path:
    """Runs or resumes the tour in `out`; returns the path of the report."""
    started, config = time.monotonic(), FAST if fast else USUAL
    console = Console(highlight=False)
    task_names = [name for name in list_trainable_tasks(console) if name in config.task_steps]
    root = export_world(["vqkd", "pretrain", "vqa", *task_names], config.world)
    tour = Tour(out, root, config, console)
    scores = {"vqkd": tour.train_tokenizer()}
    weights = tour.pretrain()
    tour.train_contrastive(weights)
    scores |= tour.fine_tune(task_names)

    console.print("[bold]measuring what pretraining learned[/bold]")
    pretraining = measure_pretraining(out / "pretrain", cache=out / "figures.json")
    rows = make_tour_rows(scores, pretraining)
    print_table(console, rows, title="BEiT-3 on the embedded world, held-out records")
    folders = (
        "vqkd",
        "pairs",
        "pretrain",
        CONTRASTIVE,
        *(name for name in scores if name != "vqkd"),
    )
    report = write_report(
        [out / folder for folder in folders],
        out / "report.html",
        title="BEiT-3 in miniature",
        table=rows,
    )
    console.print(f"report: {report.resolve()}   ({format_duration(time.monotonic() - started)})")
    command = format_serve_command([out / name for name in ("vqa", *task_names)])
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
