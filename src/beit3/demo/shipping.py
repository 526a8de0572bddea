"""`make weights`: trains the weights that ship with the package, on the embedded world.

    python -m beit3.demo.shipping

Pairs are pretrained first, with masked text. From these weights each task is fine-tuned by its demo
recipe, two runs at a time with one thread each. Every run is what the command in the model card
does, so `beit3 train` makes the same weights. A stopped run is resumed by the same call. The
weights are then written in float16, loaded from there, and scored on the world's val split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from beit3.config import override
from beit3.demo.parallel import Job, run_jobs
from beit3.task import Task, load_task
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import evaluate
from beit3.training.loop import train
from beit3.training.sources import open_split
from beit3.weights import loading, store
from beit3.weights.card import RunRecord, read_run, write_card
from beit3.weights.names import SHIPPED

WORLD = "world"
"""What the names of these weights begin with: world/vqa."""

NETWORK = ("--task.model.ffn_dim", "384")
"""TINY's feed-forward layers have 512 units. With 384 four tasks fit into 12 MB."""


@dataclass(frozen=True)
class Stage:
    """One training run: a recipe, what is changed in it, and what it starts from."""

    task: str
    recipe: str
    fields: tuple[str, ...]
    """Changes as `beit3 train` takes them."""
    init: str = ""
    """Folder of the run it starts from."""

    def train(self, out: Path, folder: str) -> dict:
        """Trains in `folder` below `out`, or resumes that run; returns its final scores."""
        task = load_task(self.task)
        recipe = override(task.recipes[self.recipe], self.fields)
        init = str(out / self.init / "last") if self.init else ""
        return train(recipe, task, out=out / folder, init=init, label=folder)

    def format_command(self, out: str, folder: str) -> str:
        """Returns the command that does the same."""
        words = ["beit3", "train", self.task, self.recipe, *self.fields]
        if self.init:
            words += ["--init", f"{out}/{self.init}/last"]
        return " ".join([*words, "--out", f"{out}/{folder}"])


PAIRS = Stage("pretrain", "demo_pairs", (*NETWORK, "--run.steps", "1400"))
STAGES = {
    "vqa": Stage("vqa", "demo", (*NETWORK, "--run.steps", "2000"), "pairs"),
    "captioning": Stage("captioning", "demo", (*NETWORK, "--run.steps", "400"), "pairs"),
    "retrieval": Stage("retrieval", "demo_matching", NETWORK, "pairs"),
    "coco": Stage("coco", "demo", (*NETWORK, "--task.detector.box_dim", "64"), "pairs"),
}
"""Name of shipped weights -> how they are trained."""

DRAWINGS = "beit3 world --out shapes --scenes 48 --seed 1"
"""The command that draws the images of the examples in the model cards."""

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "vqa": ("shapes/pairs/images/000000.png", "what color is the square ?"),
    "captioning": ("shapes/pairs/images/000000.png",),
    "retrieval": ("shapes/pairs/images/000000.png", "a small orange square"),
    "coco": ("shapes/coco/val/000000000003.png",),
}
"""Name of shipped weights -> inputs of the example in its model card."""

RUNS = "runs/world"
"""Directory of the runs in the model cards, and of `make weights`."""


def make_weights(runs: Path, shipped: Path) -> None:
    """Trains all stages in `runs` and writes their weights below `shipped`, one folder each."""
    console = Console(highlight=False)
    for stage in (PAIRS, *STAGES.values()):
        prepare_embedded_world(load_task(stage.task))  # once, before several processes need it
    # The detector takes longest and goes first.
    names = sorted(STAGES, key=lambda name: name != "coco")
    run_jobs(
        {"pairs": Job(PAIRS.train, (runs, "pairs"))}
        | {name: Job(STAGES[name].train, (runs, name), needs=("pairs",)) for name in names}
    )
    for name in STAGES:
        scores = write_shipped(runs, name, shipped / name)
        headline = load_task(STAGES[name].task).headline
        console.print(f"{WORLD}/{name}: {headline} {scores[headline]:.4g}")


def write_shipped(runs: Path, name: str, folder: Path) -> dict[str, float]:
    """Writes the last weights of a run to `folder` in float16, with a model card.

    Returns the scores of what was written, on the world's val split.
    """
    source = runs / name / "last"
    task = loading.load_weights(source)
    if "text" not in task.record_fields:
        task = drop_tokenizer(task)
    task.half()
    with store.replace_directory(folder) as new:
        store.write_weights_files(task, new)
        scores = measure(new)
        card = format_card(task, name, scores, read_run(source, type(task)))
        (new / "README.md").write_text(card, encoding="utf-8")
    return scores


def drop_tokenizer(task: Task) -> Task:
    """Returns a task that reads no text without the text tokenizer that training gives to all."""
    bare = type(task)(task.config)
    bare.load_state_dict(task.state_dict())
    return bare


def measure(folder: Path, root: str = "") -> dict[str, float]:
    """Returns the scores of a weights directory on the val split of records, by default of the
    embedded world."""
    task = loading.load_weights(folder).eval()
    scores = evaluate(task, open_split(type(task), root, "val"), batch_size=100)
    # Average precision is -1 for sizes of which there are no objects.
    return {key: value for key, value in scores.items() if value >= 0}


def format_card(task: Task, name: str, scores: Mapping[str, float], run: RunRecord | None) -> str:
    """Returns the model card: what `write_card` knows, and the commands that made the weights."""
    settings = run.settings if run else {}
    title = f"{WORLD}/{name}"
    known = write_card(
        task,
        title=title,
        license="mit",
        run=RunRecord(settings, scores),
        example=title,
        example_inputs=EXAMPLES[name],
    )
    commands = [PAIRS.format_command(RUNS, "pairs"), STAGES[name].format_command(RUNS, name)]
    return known + "\n".join(
        [
            "\n## How they were made\n",
            "`make weights` makes all weights that ship. For these it runs, with one thread:\n",
            "```bash",
            *commands,
            "```\n",
            "The records are the embedded world's: drawings of 32 x 32 pixels with one to three",
            "colored shapes, and sentences, questions and answers made from a small grammar. The",
            f"example's image is one of them: `{DRAWINGS}`",
            "draws it. The weights know these and nothing else: they are for trying the package,",
            "not for photographs. They are stored in float16 and computed in float32, and the",
            "scores are of the stored weights. Other machines round differently; there the",
            "weights differ slightly.",
            "",
        ]
    )


if __name__ == "__main__":
    make_weights(Path(RUNS), SHIPPED / WORLD)
