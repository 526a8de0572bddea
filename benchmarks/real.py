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

from beit3.demo.comparison import markdown, row, side_by_side, spread
from beit3.demo.tour import with_tokenizer
from beit3.files import write_text
from beit3.recipe import Recipe
from beit3.task import load_task
from beit3.tokenizer.text import TextTokenizer, read_texts
from beit3.training.loop import train
from beit3.weights.store import is_weights

VOCABULARY = 8000


@dataclass(frozen=True)
class Row:
    """One data set of one task."""

    what: str
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
"""Where the recipe's own number is not the one that is compared."""


def pretrained(data: Path, out: Path, init: str) -> Path:
    """Weights of `pretrain laptop`: those given, those there, or made now from photographs,
    captions and books."""
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
    train(at(vqkd.recipes["laptop"], root), vqkd, out=out / "codes")
    train(
        with_tokenizer(at(pretrain.recipes["laptop"], root), out / "codes" / "last"),
        pretrain,
        out=out / "laptop",
    )
    return weights


def contrastive(data: Path, out: Path, weights: Path) -> Path:
    """The contrastive stage on the pretraining pairs, from the pretrained weights."""
    retrieval, root = load_task("retrieval"), out / "pairs"
    if not (root / "pretrain" / "pairs").exists():
        load_task("pretrain").prepare(data / "flickr8k_mini", root, "pairs")
    shutil.copyfile(weights / "text.model", root / "text.model")
    train(
        at(retrieval.recipes["laptop_itc"], root), retrieval, out=out / "contrastive", init=weights
    )
    return out / "contrastive" / "last"


def at(recipe: Recipe, root: Path) -> Recipe:
    """The recipe on the records of `root`."""
    return replace(recipe, data=replace(recipe.data, root=str(root)))


def prepare(data: Path, out: Path, name: str, weights: Path) -> None:
    """The records of a row, and the tokenizer of the weights beside them."""
    this, root = ROWS[name], out / "records" / name
    if not (root / this.task).exists():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / "text.model", root / "text.model")
        load_task(this.task).prepare(data / this.raw, root, "main")


def tune(out: Path, name: str, side: str, seed: int, init: str) -> dict[str, float]:
    """One run of a row."""
    this = ROWS[name]
    kind = load_task(this.task)
    recipe = at(kind.recipes[this.recipe], out / "records" / name)
    run = replace(recipe.run, seed=seed, steps=STEPS.get(name, recipe.run.steps))
    label = f"{name}-{side}-{seed}"
    return train(replace(recipe, run=run), kind, out=out / "runs" / label, init=init, label=label)


def rows(results: dict[str, dict[str, list[dict]]]) -> Iterator[dict[str, str]]:
    """What the table says: each side over its seeds, and the guess that needs no learning."""
    for name, sides in results.items():
        this = ROWS[name]
        form = ".3f" if this.score == "cider" else ".1%"
        for side in reversed(this.sides):
            reference = ""
            if side == "scratch" and "most_frequent" in sides[side][0]:
                reference = f"{sides[side][0]['most_frequent']:.1%} for the most frequent"
            what = {"contrastive": "pretrained, then the contrastive stage"}.get(side, side)
            measured = spread([run[this.score] for run in sides[side]], form)
            yield row(f"{this.what}, {sides[side][0]['step']} steps, {what}", measured, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--init", default="", help="weights of pretrain laptop, made before")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    weights = pretrained(args.data, args.out, args.init)
    starts = {"scratch": "", "pretrained": str(weights)}
    for name in args.only:
        prepare(args.data, args.out, name, weights)
    if "retrieval" in args.only:
        starts["contrastive"] = str(contrastive(args.data, args.out, weights))
    jobs = [
        (name, side, seed)
        for name in args.only
        for seed in ROWS[name].seeds
        for side in ROWS[name].sides
    ]
    scores = side_by_side([(tune, (args.out, *job, starts[job[1]])) for job in jobs])
    results: dict[str, dict[str, list[dict]]] = {}
    for (name, side, _), score in zip(jobs, scores, strict=True):
        results.setdefault(name, {}).setdefault(side, []).append(score)
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        write_text(args.json, json.dumps(before | results, indent=1) + "\n")
    print(markdown(list(rows(results))))


if __name__ == "__main__":
    main()
