"""Every vision-language task on small real datasets, from `pretrain laptop` and from scratch.

    python benchmarks/real.py --data ../shared/data --out runs/real --json benchmarks/real.json

Both sides are fine-tuned alike. The pretrained weights are made again if `runs/real/laptop` (or
--init) does not hold them, in about 45 minutes on two cores; then each run takes minutes, as many
at a time as there are cores. A stopped command continues when it is started again; `--only` selects
rows. Retrieval also starts from the contrastive stage, whose steps on the pretraining pairs are
additional.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from beit3.demo.parallel import run_in_parallel
from beit3.demo.tables import format_markdown, format_spread, make_row
from beit3.demo.tour import set_visual_tokenizer
from beit3.files import write_text
from beit3.recipe import Recipe
from beit3.task import load_task
from beit3.tokenizer.text import TextTokenizer, read_texts
from beit3.training.loop import train
from beit3.weights.store import is_weights

VOCABULARY = 8000


@dataclass(frozen=True)
class Row:
    """One dataset of one task."""

    label: str
    task: str
    raw: str
    """Folder below --data."""
    recipe: str = "laptop"
    score: str = "accuracy"
    seeds: tuple[int, ...] = (0,)
    sides: tuple[str, ...] = ("scratch", "pretrained")


ROWS = {
    "retrieval": Row(
        "Flickr8k retrieval, mean recall",
        "retrieval",
        "flickr8k_mini",
        score="mean_recall",
        seeds=(0, 1, 2),
        sides=("scratch", "pretrained", "contrastive"),
    ),
    "captioning": Row("Flickr8k captions, CIDEr", "captioning", "flickr8k_mini", score="cider"),
    "daquar": Row("DAQUAR answers", "vqa", "daquar_train", seeds=(0, 1, 2)),
    "nlvr1": Row("NLVR1 statements", "nlvr2", "nlvr1_dev"),
    "cifar10": Row("CIFAR-10 by names", "imagenet", "cifar10_mini", recipe="laptop_names"),
}
STEPS = {"daquar": 600}
"""Row -> number of steps where it is not the recipe's."""


def make_pretrained_weights(data: Path, out: Path, init: str) -> Path:
    """Returns weights of `pretrain laptop`: `init`, stored ones, or newly trained ones."""
    if init:
        return Path(init)
    weights, root = out / "laptop" / "last", out / "data"
    if is_weights(weights):
        return weights
    vqkd, pretrain = load_task("vqkd"), load_task("pretrain")
    pretrain.prepare(data / "flickr8k_mini", root, "pairs")
    pretrain.prepare(data / "imagenet_sample_1k", root, "images")
    vqkd.prepare(data / "imagenet_sample_1k", root, "main")
    if not (root / "text.model").exists():
        files = [str(path) for path in sorted((data / "text_corpus").rglob("*.txt"))]
        texts = read_texts([*files, str(root / "pretrain" / "pairs" / "train.jsonl")])
        TextTokenizer.train(texts, vocab_size=VOCABULARY).save(root / "text.model")
    pretrain.prepare(data / "text_corpus", root, "texts")
    train(set_root(vqkd.recipes["laptop"], root), vqkd, out=out / "codes")
    train(
        set_visual_tokenizer(set_root(pretrain.recipes["laptop"], root), out / "codes" / "last"),
        pretrain,
        out=out / "laptop",
    )
    return weights


def train_contrastive(data: Path, out: Path, weights: Path) -> Path:
    """Trains the contrastive stage on the pretraining pairs from the pretrained weights."""
    retrieval, root = load_task("retrieval"), out / "pairs"
    if not (root / "pretrain" / "pairs").exists():
        load_task("pretrain").prepare(data / "flickr8k_mini", root, "pairs")
    shutil.copyfile(weights / "text.model", root / "text.model")
    train(
        set_root(retrieval.recipes["laptop_itc"], root),
        retrieval,
        out=out / "contrastive",
        init=weights,
    )
    return out / "contrastive" / "last"


def set_root(recipe: Recipe, root: Path) -> Recipe:
    """Returns the recipe with the records of `root`."""
    return replace(recipe, data=replace(recipe.data, root=str(root)))


def prepare(data: Path, out: Path, name: str, weights: Path) -> None:
    """Writes the records of a row, with the tokenizer of the weights."""
    row, root = ROWS[name], out / "records" / name
    if not (root / row.task).exists():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / "text.model", root / "text.model")
        load_task(row.task).prepare(data / row.raw, root, "main")


def tune(out: Path, name: str, side: str, seed: int, init: str) -> dict[str, float]:
    """Fine-tunes one run of a row and returns its scores."""
    row = ROWS[name]
    task_class = load_task(row.task)
    recipe = set_root(task_class.recipes[row.recipe], out / "records" / name)
    run = replace(recipe.run, seed=seed, steps=STEPS.get(name, recipe.run.steps))
    label = f"{name}-{side}-{seed}"
    return train(
        replace(recipe, run=run), task_class, out=out / "runs" / label, init=init, label=label
    )


def make_rows(results: dict[str, dict[str, list[dict]]]) -> Iterator[dict[str, str]]:
    """Yields the rows of the table: each side over its seeds, beside a guess."""
    for name, sides in results.items():
        row = ROWS[name]
        form = ".3f" if row.score == "cider" else ".1%"
        for side in reversed(row.sides):
            reference = ""
            if side == "scratch" and "most_frequent" in sides[side][0]:
                reference = f"{sides[side][0]['most_frequent']:.1%} for the most frequent"
            start = {"contrastive": "pretrained, then the contrastive stage"}.get(side, side)
            measured = format_spread([run[row.score] for run in sides[side]], form)
            yield make_row(
                f"{row.label}, {sides[side][0]['step']} steps, {start}", measured, reference
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--init", default="", help="weights of pretrain laptop")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    weights = make_pretrained_weights(args.data, args.out, args.init)
    starts = {"scratch": "", "pretrained": str(weights)}
    for name in args.only:
        prepare(args.data, args.out, name, weights)
    if "retrieval" in args.only:
        starts["contrastive"] = str(train_contrastive(args.data, args.out, weights))
    jobs = [
        (name, side, seed)
        for name in args.only
        for seed in ROWS[name].seeds
        for side in ROWS[name].sides
    ]
    scores = run_in_parallel([(tune, (args.out, *job, starts[job[1]])) for job in jobs])
    results: dict[str, dict[str, list[dict]]] = {}
    for (name, side, _), score in zip(jobs, scores, strict=True):
        results.setdefault(name, {}).setdefault(side, []).append(score)
    if args.json:
        stored = json.loads(args.json.read_text()) if args.json.exists() else {}
        write_text(args.json, json.dumps(stored | results, indent=1) + "\n")
    print(format_markdown(list(make_rows(results))))


if __name__ == "__main__":
    main()
