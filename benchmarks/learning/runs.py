"""The engine of the programs beside it: rows of training runs, what they are measured by, results.

A row is a chain of runs, such as visual tokenizer, pairs, pretraining. Its last network is measured
by masked words, by linear probes, and by short fine-tunings. Equal runs of several rows and
programs are trained once: a run's folder below --out is named by a digest of its recipe and of the
runs that it starts from. A stopped program goes on when it is started again; after a change of the
package's code take another --out.

Runs that need nothing of each other are trained as many at a time as there are cores, each on one
thread.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import override
from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.data.views.preprocessing import Preprocessing
from beit3.demo.probes import measure_single_attributes
from beit3.demo.tables import TASK_SCORES
from beit3.demo.tour import export_world, set_visual_tokenizer
from beit3.files import read_json, write_text
from beit3.images import open_image
from beit3.machine import count_cores
from beit3.model.beit3 import BEiT3
from beit3.model.config import ModelConfig
from beit3.recipe import Recipe
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain
from beit3.tokenizer.text import MODEL_FILE
from beit3.training.loop import train
from beit3.weights.loading import load_backbone, load_weights
from benchmarks.learning.drawing import draw_results, make_table
from benchmarks.probe import save_results

TASKS = ("vqa", *TASK_SCORES)
SEEDS = (0, 1, 2)
RESULT = "result.json"
FAST_FACTOR = 0.01
MIN_STEPS = 2
PROBED_IMAGE = Preprocessing(32)
PENALTY = 1e-3
"""Of the linear probe's squared weights."""

Values = dict[str, dict[str, list[float]]]
"""Row -> measure -> its value for each seed."""


# What a program declares --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run."""

    label: str
    task: str
    recipe: str
    steps: int
    changes: str = ""
    """Fields of the recipe, as on the command line: `--task.image_mask_rate 0.6`."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Records of each source in a step, in place of the recipe's; empty = the recipe's."""
    needs: Mapping[str, "Run"] = field(default_factory=dict)
    """Runs whose weights this one needs: `init`, or a field of the task (`visual_tokenizer`)."""
    seed: int = 0
    keep: bool = True
    """Whether the weights are kept; of a fine-tuning only the scores are."""

    def with_seed(self, seed: int) -> "Run":
        """Returns this run and all that it needs with another seed."""
        needs = {name: run.with_seed(seed) for name, run in self.needs.items()}
        return replace(self, seed=seed, needs=needs)

    def change(self, changes: str) -> "Run":
        """Returns this run with further changes, which come last and so decide."""
        return replace(self, changes=f"{self.changes} {changes}".strip())

    def with_network(self, changes: str) -> "Run":
        """Returns this run and all that it needs with another network, but for the visual
        tokenizer."""
        if self.task == "vqkd":
            return self
        needs = {name: run.with_network(changes) for name, run in self.needs.items()}
        return replace(self.change(changes), needs=needs)


@dataclass(frozen=True)
class Row:
    """A network that is measured: that of `run`, or of initial values where there is none."""

    name: str
    run: Run | None = None
    network: str = ""
    """Changes of the network that fine-tunings must share: `--task.model.patch_size 4`."""


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning by the demo recipe of a task, by which rows are measured."""

    task: str
    steps: int
    labels: int = 0
    """Training records; 0 = all."""

    @property
    def score(self) -> str:
        """The key of the task's score."""
        return TASK_SCORES[self.task][1] if self.task in TASK_SCORES else "accuracy"

    @property
    def name(self) -> str:
        """The name of the measure: `vqa accuracy, 1000 labels, 300 steps`."""
        labels = f"{self.labels} labels" if self.labels else "all labels"
        return f"{self.task} {self.score.replace('_', ' ')}, {labels}, {self.steps} steps"


@dataclass(frozen=True)
class Study:
    """What a program compares."""

    name: str
    rows: Sequence[Row]
    tunings: Sequence[Tuning] = ()
    words: bool = True
    """Whether masked attribute words are predicted, where a row's last run is pretraining."""
    probes: bool = True
    """Whether the shape and the color of single objects are probed linearly."""
    rows_are_columns: bool = False
    """Whether the table has a column, not a line, for each row of the study."""


@dataclass(frozen=True)
class Options:
    """Where a program works and for how long."""

    out: Path
    factor: float = 1.0
    """Factor of all numbers of steps."""
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


# Runs of the demo's pretraining -------------------------------------------------------------------

TOKENIZER_STEPS, PAIR_STEPS, PRETRAINING_STEPS = 400, 600, 300


def make_tokenizer(changes: str = "", **fields: Any) -> Run:
    """Returns the run of a visual tokenizer, by default of the demo's."""
    return replace(Run("codes", "vqkd", "demo", TOKENIZER_STEPS, changes), **fields)


def make_pairs(changes: str = "", **fields: Any) -> Run:
    """Returns the demo's first part of pretraining: pairs alone."""
    needs = {"visual_tokenizer": make_tokenizer()}
    run = Run("pairs", "pretrain", "demo_pairs", PAIR_STEPS, changes, needs=needs)
    return replace(run, **fields)


def make_pretraining(init: Run | None = None, changes: str = "", **fields: Any) -> Run:
    """Returns the demo's second part, of images, texts and pairs, by default after the first."""
    init = init or make_pairs()
    needs = {"init": init, "visual_tokenizer": init.needs["visual_tokenizer"]}
    run = Run("pretrain", "pretrain", "demo", PRETRAINING_STEPS, changes, needs=needs)
    return replace(run, **fields)


def make_images_only(tokenizer: Run, changes: str = "", **fields: Any) -> Run:
    """Returns pretraining on images alone, from initial values."""
    needs = {"visual_tokenizer": tokenizer}
    run = Run("images", "pretrain", "demo", PAIR_STEPS, changes, {"images": 64}, needs)
    return replace(run, **fields)


def make_contrastive(init: Run | None = None, *, steps: int) -> Run:
    """Returns the contrastive stage on pretraining's pairs, by default from initial values."""
    needs = {"init": init} if init else {}
    return Run("contrastive", "retrieval", "demo", steps, batch={"pairs": 64}, needs=needs)


# Jobs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A function whose result is kept in a JSON file."""

    path: Path
    function: Callable[..., dict[str, float]]
    arguments: tuple[Any, ...]
    needs: tuple[Path, ...] = ()
    """Files of the jobs that must be done before."""


def execute(job: Job) -> None:
    """Calls the job's function and writes what it returns."""
    result = job.function(*job.arguments)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.path, json.dumps(result, indent=1) + "\n")


def execute_all(jobs: Mapping[Path, Job]) -> None:
    """Executes the jobs whose file is not there, each as soon as what it needs is done.

    As many at a time as there are cores, each in a process of one thread: networks this small use
    two cores badly.
    """
    left = {path: job for path, job in jobs.items() if not path.exists()}
    if not left:
        return
    running: dict[Future[None], Path] = {}
    with ProcessPoolExecutor(
        min(count_cores(), len(left)),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        try:
            while left or running:
                pending = {*left, *running.values()}
                for path in [path for path, job in left.items() if pending.isdisjoint(job.needs)]:
                    running[pool.submit(execute, left.pop(path))] = path
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# Training -----------------------------------------------------------------------------------------


def make_recipe(run: Run, root: Path) -> Recipe:
    """Returns the recipe of a run, without the weights that it needs."""
    recipe = override(load_task(run.task).recipes[run.recipe], run.changes.split())
    return replace(
        recipe,
        data=replace(recipe.data, root=str(root), batch=dict(run.batch or recipe.data.batch)),
        run=replace(recipe.run, steps=run.steps, seed=run.seed),
    )


def compute_digest(run: Run, root: Path) -> str:
    """Returns what tells a run from all others: its recipe, and the runs whose weights it needs."""
    recipe = make_recipe(run, root)
    return digest(
        {
            "task": run.task,
            "recipe": replace(recipe, data=replace(recipe.data, root=root.name)).to_dict(),
            "needs": {name: compute_digest(need, root) for name, need in run.needs.items()},
        }
    )


def digest(value: Any) -> str:
    """Returns a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def get_folder(run: Run, root: Path, out: Path) -> Path:
    """Returns the folder of a run below `out`."""
    return out / f"{run.label}-seed{run.seed}-{compute_digest(run, root)}"


def make_training_jobs(run: Run, root: Path, out: Path) -> dict[Path, Job]:
    """Returns the jobs of a run and of all that it needs, by their files."""
    jobs: dict[Path, Job] = {}
    for need in run.needs.values():
        jobs |= make_training_jobs(need, root, out)
    needs = tuple(get_folder(need, root, out) / RESULT for need in run.needs.values())
    path = get_folder(run, root, out) / RESULT
    return jobs | {path: Job(path, train_run, (run, root, out), needs)}


def train_run(run: Run, root: Path, out: Path) -> dict[str, float]:
    """Trains or resumes a run and returns its scores and the seconds of this call."""
    folder, started = get_folder(run, root, out), time.monotonic()
    recipe, init = make_recipe(run, root), ""
    if run.task == "imagenet":
        recipe = replace(recipe, data=replace(recipe.data, root=str(get_mixed_root(root, out))))
    for name, need in run.needs.items():
        weights = get_folder(need, root, out) / "last"
        if name == "init":
            init = str(weights)
        elif name == "visual_tokenizer":
            recipe = set_visual_tokenizer(recipe, weights)
        else:
            recipe = override(recipe, [f"--task.{name}", str(weights)])
    scores = train(recipe, load_task(run.task), out=folder, init=init, label=folder.name)
    for name in ("checkpoints", "best", *(() if run.keep else ("last",))):
        shutil.rmtree(folder / name, ignore_errors=True)
    return scores | {"seconds": time.monotonic() - started}


def get_mixed_root(root: Path, out: Path) -> Path:
    """Returns where `mix_classes` writes."""
    return out / f"{root.name}-mixed"


def mix_classes(root: Path, out: Path) -> None:
    """Writes ImageNet's records with an image of each class in turn, which `data.limit` needs: it
    takes the first records, and those of the world are sorted by class."""
    mixed = get_mixed_root(root, out)
    if (mixed / MODEL_FILE).exists():
        return
    folder = mixed / "imagenet" / "main"
    shutil.copytree(root / "imagenet" / "main", folder, dirs_exist_ok=True)
    for split in ("train", "val"):
        records = list(RecordDataset(locate_split(root, "imagenet", "main", split), root))
        counts: Counter[int] = Counter()
        places = []
        for record in records:
            places.append(counts[record["label"]])
            counts[record["label"]] += 1
        order = sorted(range(len(records)), key=lambda index: (places[index], index))
        lines = [json.dumps(records[index]) + "\n" for index in order]
        write_text(folder / f"{split}.jsonl", "".join(lines))
    shutil.copyfile(root / MODEL_FILE, mixed / MODEL_FILE)


# Measures -----------------------------------------------------------------------------------------


def measure_words(folder: Path, root: Path) -> dict[str, float]:
    """Returns the accuracy of attribute words that are masked one at a time, by kind, with the
    right image and with another record's."""
    task = load_weights(folder / "last").eval()
    assert isinstance(task, Pretrain)
    pairs = RecordDataset(locate_split(root, "pretrain", "pairs", "val"), root)
    return {
        f"{kind} words" + (", other image" if side == "wrong" else ""): value
        for name, value in measure_single_attributes(task, pairs).items()
        for side, kind in [name.removeprefix("single_").split("/")]
    }


def probe(folder: Path, root: Path) -> dict[str, float]:
    """Returns `probe_backbone` of a run's last weights."""
    return probe_backbone(load_backbone(str(folder / "last")), root)


def probe_initial(model: ModelConfig, seed: int, root: Path) -> dict[str, float]:
    """Returns `probe_backbone` of initial values."""
    backbone = BEiT3(model)
    backbone.init_weights(seed)
    return probe_backbone(backbone, root)


def probe_backbone(backbone: BEiT3, root: Path) -> dict[str, float]:
    """Returns the held-out accuracy of linear classifiers of shape and color on the mean state of
    the patches. Each image shows one object."""
    backbone.eval()
    (train_states, train_labels), (states, labels) = (
        compute_states(backbone, root, split) for split in ("train", "val")
    )
    mean, deviation = train_states.mean(0), train_states.std(0) + 1e-6
    scores = {}
    for kind in labels:
        classifier = fit_classifier((train_states - mean) / deviation, train_labels[kind])
        predicted = classifier((states - mean) / deviation).argmax(1)
        scores[f"{kind} probe"] = float((predicted == labels[kind]).float().mean())
    return scores


@torch.no_grad()
def compute_states(backbone: BEiT3, root: Path, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean patch states [N, D] of ImageNet's images, and their labels [N] by kind."""
    records = list(RecordDataset(locate_split(root, "imagenet", "main", split), root))
    images = torch.stack([PROBED_IMAGE.preprocess(open_image(item["image"])) for item in records])
    batches = PROBED_IMAGE.normalize(images).split(100)
    states = torch.cat([backbone(batch).of("image")[:, 1:].mean(1) for batch in batches])
    # The folder of an image is its class: blue_circle.
    names = [Path(item["image"]).parent.name.split("_") for item in records]
    labels = {}
    for index, kind in enumerate(("color", "shape")):
        values = sorted({name[index] for name in names})
        labels[kind] = torch.tensor([values.index(name[index]) for name in names])
    return states, labels


def fit_classifier(states: Tensor, labels: Tensor) -> nn.Linear:
    """Returns a logistic regression from states [N, D] to labels [N], fitted by L-BFGS."""
    classifier = nn.Linear(states.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(states), labels)
        loss = loss + PENALTY * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return classifier.requires_grad_(False)


# A study ------------------------------------------------------------------------------------------


def run_study(study: Study, options: Options) -> Values:
    """Trains and measures all rows; returns the values."""
    root = export_world(["vqkd", "pretrain", *TASKS], options.world)
    mix_classes(root, options.out)
    jobs: dict[Path, Job] = {}
    results: list[tuple[str, Path, dict[str, str]]] = []  # row, file, its key -> measure
    for row, seed in product(study.rows, options.seeds):
        run = row.run and options.scale(row.run).with_seed(seed)
        row_jobs = make_training_jobs(run, root, options.out) if run else {}
        for job in make_measuring_jobs(study, row, run, seed, root, options.out):
            row_jobs[job.path] = job
            results.append((row.name, job.path, {}))
        for tuning in map(options.scale, study.tunings):
            tuning_run = make_tuning_run(tuning, row, run, seed, options)
            row_jobs |= make_training_jobs(tuning_run, root, options.out)
            path = get_folder(tuning_run, root, options.out) / RESULT
            results.append((row.name, path, {tuning.score: tuning.name}))
        jobs |= row_jobs
    execute_all(jobs)
    values: Values = {row.name: {} for row in study.rows}
    for row_name, path, names in results:
        for key, value in read_json(path).items():
            if not names or key in names:
                values[row_name].setdefault(names.get(key, key), []).append(value)
    return values


def make_measuring_jobs(
    study: Study, row: Row, run: Run | None, seed: int, root: Path, out: Path
) -> Iterator[Job]:
    """Yields the jobs that measure a row without fine-tuning."""
    if run is None:
        model = override(load_task("pretrain").recipes["demo"], row.network.split()).task.model
        path = out / f"initial-seed{seed}-{digest([repr(model), root.name])}" / "probe.json"
        if study.probes:
            yield Job(path, probe_initial, (model, seed, root))
        return
    folder = get_folder(run, root, out)
    if study.words and issubclass(load_task(run.task), Pretrain) and reads_pairs(run):
        yield Job(folder / "words.json", measure_words, (folder, root), (folder / RESULT,))
    if study.probes:
        yield Job(folder / "probe.json", probe, (folder, root), (folder / RESULT,))


def reads_pairs(run: Run) -> bool:
    """Returns whether pretraining has pairs, without which words do not follow images."""
    return not run.batch or "pairs" in run.batch


def make_tuning_run(tuning: Tuning, row: Row, run: Run | None, seed: int, options: Options) -> Run:
    """Returns the run of a fine-tuning from a row's weights."""
    changes = f"--data.limit {tuning.labels} --run.save_every 100 --run.keep 1 {row.network}"
    return Run(
        tuning.task,
        tuning.task,
        "demo",
        tuning.steps,
        f"{changes} --run.eval_records {options.eval_records}",
        needs={"init": run} if run else {},
        seed=seed,
        keep=False,
    )


def run_program(study: Study, description: str) -> None:
    """Reads the command line, runs a study, prints its table and writes JSON, table and plot."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", type=Path, help="file of the results; by default below --out")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of all numbers of steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", help="tasks whose fine-tunings are run", choices=TASKS)
    parser.add_argument("--fast", action="store_true", help="a few steps of a small world")
    arguments = parser.parse_args()
    tunings = [item for item in study.tunings if item.task in (arguments.only or TASKS)]
    options = Options(arguments.out, arguments.steps, seeds=tuple(arguments.seeds))
    if arguments.fast:
        tunings = list({item.task: item for item in reversed(tunings)}.values())[::-1]
        options = Options(arguments.out, FAST_FACTOR, "small", (0,), eval_records=20)
    study, started = replace(study, tunings=tunings), time.monotonic()
    values = run_study(study, options)
    path = arguments.json or arguments.out / f"{study.name}.json"
    table = make_table(values, rows_are_columns=study.rows_are_columns)
    save_results(path, table, values)
    write_text(path.with_suffix(".md"), table)
    write_text(path.with_suffix(".svg"), draw_results(values))
    print(table)
    print(f"{path}, {path.with_suffix('.svg')}   ({(time.monotonic() - started) / 60:.1f} minutes)")
