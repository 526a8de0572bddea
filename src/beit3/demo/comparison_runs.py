"""The training runs of the comparison: each function is a job of its own process.

A variant is `pretrained` or `scratch`: what a fine-tuning run starts from.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.demo.probes import measure_pretraining
from beit3.demo.tour import CONTRASTIVE, STARTS, set_visual_tokenizer
from beit3.recipe import Recipe
from beit3.task import Task, load_task
from beit3.tasks.vqa import VQA
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import predict
from beit3.training.loop import train
from beit3.weights import loading

SEEDS = (0, 1, 2)
LABEL_COUNTS = (1000, 8000)
STEP_FACTORS = (1, 2, 4)
VARIANTS = ("pretrained", "scratch")
VQA_STEPS = VQA.recipes["demo"].run.steps
TUNING_SEED = 100
TUNING_QUESTIONS = (8000, 9000)
"""Training questions on which learning rates are compared: beyond the largest label count."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate of VQA, and the factor by which the head's is larger."""

    lr: float
    head_scale: float

    def __str__(self) -> str:
        """Returns the form in results and folder names, `0.0003-head-x20`."""
        return f"{self.lr:g}-head-x{self.head_scale:g}"


LEARNING_RATES = (
    LearningRate(1e-4, 20.0),
    LearningRate(3e-4, 20.0),
    LearningRate(3e-4, 1.0),
    LearningRate(1e-3, 1.0),
)
"""The learning rates that are compared; the release's head has a factor of 20."""


def pretrain_seed(out: Path, seed: int) -> dict:
    """Trains one seed's visual tokenizer, pretraining and contrastive stage at full length; returns
    their measures."""
    vqkd, pretrain, folder = load_task("vqkd"), load_task("pretrain"), out / f"seed{seed}"
    tokenizer_scores = train(
        prepare_recipe(vqkd.recipes["demo"], vqkd, seed),
        vqkd,
        out=folder / "vqkd",
        label=f"seed{seed} vqkd",
    )
    init = ""
    for recipe_name, stage in (("demo_pairs", "pairs"), ("demo", "pretrain")):
        recipe = prepare_recipe(pretrain.recipes[recipe_name], pretrain, seed)
        recipe = set_visual_tokenizer(recipe, folder / "vqkd" / "last")
        train(recipe, pretrain, out=folder / stage, init=init, label=f"seed{seed} {stage}")
        init = str(folder / stage / "last")
    retrieval = load_task("retrieval")
    recipe = prepare_recipe(retrieval.recipes["demo_itc"], retrieval, seed)
    train(recipe, retrieval, out=folder / CONTRASTIVE, init=init, label=f"seed{seed} {CONTRASTIVE}")
    measures = measure_pretraining(folder / "pretrain", cache=folder / "figures.json")
    tokenizer_keys = ("codebook_use", "perplexity", "num_codes")
    return measures | {key: tokenizer_scores[key] for key in tokenizer_keys}


def prepare_recipe(recipe: Recipe, task: type[Task], seed: int) -> Recipe:
    """Returns a recipe on the embedded world's records with this seed."""
    return replace(
        recipe,
        data=replace(recipe.data, root=str(prepare_embedded_world(task))),
        run=replace(recipe.run, seed=seed),
    )


def fine_tune_vqa(out: Path, num_labels: int, variant: str) -> dict[str, dict]:
    """Fine-tunes VQA with so many labels for every length and seed, after tuning the learning rate.

    Returns the results by run name.
    """
    rate = tune_learning_rate(out, num_labels, variant)
    results = {}
    for factor, seed in product(STEP_FACTORS, SEEDS):
        name = f"{num_labels}-{variant}-{factor}x-seed{seed}"
        recipe = make_vqa_recipe(num_labels, rate, steps=VQA_STEPS * factor, seed=seed)
        init = find_initial_weights(out, variant, seed, "vqa")
        scores = train(recipe, VQA, out=out / "vqa" / name, init=init, label=name)
        results[name] = {
            "accuracy": scores["accuracy"],
            "most_frequent": scores["most_frequent"],
            "rate": str(rate),
        }
    return results


def fine_tune_task(out: Path, name: str, variant: str) -> dict[str, dict]:
    """Fine-tunes another task by its demo recipe for every seed; returns the scores by run name."""
    task, results = load_task(name), {}
    for seed in SEEDS:
        label = f"{name}-{variant}-seed{seed}"
        recipe = prepare_recipe(task.recipes["demo"], task, seed)
        recipe = replace(recipe, run=replace(recipe.run, save_every=0))
        init = find_initial_weights(out, variant, seed, name)
        results[label] = train(recipe, task, out=out / "tasks" / label, init=init, label=label)
    return results


def find_initial_weights(out: Path, variant: str, seed: int, name: str) -> str:
    """Returns the weights directory that a variant of a task starts from; empty for `scratch`."""
    if variant == "scratch":
        return ""
    return str(out / f"seed{seed}" / STARTS.get(name, "pretrain") / "last")


def make_vqa_recipe(num_labels: int, rate: LearningRate, *, steps: int, seed: int) -> Recipe:
    """Returns the VQA demo recipe with this label count, learning rate and length."""
    recipe = prepare_recipe(VQA.recipes["demo"], VQA, seed)
    return replace(
        recipe,
        data=replace(recipe.data, limit=num_labels),
        optim=replace(recipe.optim, lr=rate.lr, head_lr_scale=rate.head_scale),
        run=replace(recipe.run, steps=steps, save_every=0),
    )


def tune_learning_rate(out: Path, num_labels: int, variant: str) -> LearningRate:
    """Returns the best of `LEARNING_RATES` for a variant and label count at the usual steps.

    They are compared by training questions that no run of the comparison is trained on.
    """
    root = prepare_embedded_world(VQA)
    records = RecordDataset(locate_split(root, "vqa", "main", "train"), root)
    questions = [records[index] for index in range(*TUNING_QUESTIONS) if index < len(records)]
    accuracies = {}
    for rate in LEARNING_RATES:
        folder = out / "tune" / f"{num_labels}-{variant}-{rate}"
        recipe = make_vqa_recipe(num_labels, rate, steps=VQA_STEPS, seed=TUNING_SEED)
        init = find_initial_weights(out, variant, SEEDS[0], "vqa")
        train(recipe, VQA, out=folder, init=init, label=f"tune {folder.name}")
        task = loading.load_weights(folder / "last")
        scores = VQA.score(predict(task, questions, batch_size=100), questions)
        accuracies[rate] = scores["accuracy"]
        print(f"{folder.name}: {accuracies[rate]:.3f} on tuning questions", flush=True)
    return max(accuracies, key=lambda rate: accuracies[rate])
