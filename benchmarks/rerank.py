"""Mean recall of a search alone and re-ranked by the fused pass, over three seeds.

    python benchmarks/rerank.py --data ../shared/data --json benchmarks/rerank.json

For each dataset weights are pretrained on its pairs (masked tokens alone; or --init gives them).
From them retrieval is trained alike with and without the matching head. A search of
the test split by the features is then re-ranked in both directions: by the likelihood of the
pretrained weights, which needs no further training, and by the matching head of the very weights
that searched. The factor of the fused score is chosen on the world's val split with the first seed.
A stopped command goes on when it is started again; --only selects datasets.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe import save_results
from real import VOCABULARY, set_root

from beit3.data.loader import RecordDataset
from beit3.demo.tables import format_spread
from beit3.files import write_text
from beit3.images import open_image
from beit3.search.rerank import MaskedReranker, Reranker, make_reranker, standardize
from beit3.task import load_task
from beit3.tasks.retrieval import Retrieval
from beit3.tokenizer.text import TextTokenizer, read_texts
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import iterate_batches
from beit3.training.loop import train
from beit3.weights.loading import load_weights
from beit3.weights.store import is_weights

WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of the standardized fused score that are compared on val."""
KS = (1, 5, 10)
METHODS = ("likelihood", "matching")


@dataclass(frozen=True)
class Dataset:
    """One dataset and the lengths of its runs."""

    label: str
    recipe: str
    """Of `retrieval`; `<recipe>_matching` has the head."""
    pretrain_recipe: str
    pretrain_steps: int
    steps: int
    """Of retrieval with the head and without it."""
    num_images: int
    """The first images of each split are searched, with all their captions."""
    factors: Mapping[str, float]
    """Of each method; empty = chosen on val with the first seed."""


DATASETS = {
    "world": Dataset("embedded world", "demo", "demo_pairs", 1400, 200, 250, {}),
    "flickr": Dataset(
        "Flickr8k", "laptop", "laptop", 400, 100, 75, {"likelihood": 1.0, "matching": 1.0}
    ),
}


# Training -----------------------------------------------------------------------------------------


def prepare(name: str, data: Path, out: Path) -> Path:
    """Returns the root of a dataset's records, which is made on first use."""
    if name == "world":
        prepare_embedded_world(load_task("pretrain"))
        return prepare_embedded_world(load_task("retrieval"))
    root = out / "flickr-records"
    raw = data / "flickr8k_mini"
    if not (root / "pretrain").exists():
        load_task("pretrain").prepare(raw, root, "pairs")
    if not (root / "text.model").exists():
        files = [str(path) for path in sorted((data / "text_corpus").rglob("*.txt"))]
        texts = read_texts([*files, str(root / "pretrain" / "pairs" / "train.jsonl")])
        TextTokenizer.train(texts, vocab_size=VOCABULARY).save(root / "text.model")
    if not (root / "retrieval").exists():
        load_task("retrieval").prepare(raw, root, "main")
    return root


def pretrain(name: str, root: Path, out: Path) -> Path:
    """Returns weights that predict masked tokens of the dataset's pairs."""
    weights = out / f"{name}-pairs" / "last"
    if not is_weights(weights):
        task, dataset = load_task("pretrain"), DATASETS[name]
        recipe = set_root(task.recipes[dataset.pretrain_recipe], root)
        recipe = replace(
            recipe,
            data=replace(recipe.data, batch={"pairs": recipe.data.batch["pairs"]}),
            run=replace(recipe.run, steps=dataset.pretrain_steps, eval_every=-1, save_every=100),
        )
        train(recipe, task, out=weights.parent)
    return weights


def tune(name: str, root: Path, out: Path, init: Path, seed: int, *, matching: bool) -> Path:
    """Returns weights of retrieval by the recipe of the matching head, with it or without it."""
    dataset = DATASETS[name]
    weights = out / f"{name}-{'matching' if matching else 'plain'}-{seed}" / "last"
    if not is_weights(weights):
        task = load_task("retrieval")
        recipe = set_root(task.recipes[f"{dataset.recipe}_matching"], root)
        run = replace(recipe.run, seed=seed, steps=dataset.steps, eval_every=-1, save_every=50)
        recipe = replace(recipe, task=replace(recipe.task, matching=matching), run=run)
        train(recipe, task, out=weights.parent, init=str(init))
    return weights


# Searching ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A split searched by its features in both directions.

    I images, T texts; `image_candidates` [T, k] are the best images of each text, and
    `text_candidates` [I, k] the best texts of each image.
    """

    similarity: np.ndarray
    owner: np.ndarray
    """Index of the image that each text belongs to, [T]."""
    images: list[torch.Tensor]
    texts: list[str]
    text_candidates: np.ndarray
    image_candidates: np.ndarray


def search(weights: Path, root: Path, split: str, num_images: int, k: int) -> Search:
    """Encodes the records of a split and searches each by each."""
    task = load_weights(weights).eval()
    assert isinstance(task, Retrieval)
    records = list(RecordDataset(root / f"retrieval/main/{split}.jsonl", root))[:num_images]
    with torch.inference_mode():
        predictions = [
            prediction
            for batch in iterate_batches(task, records, 32)
            for prediction in task.predict(batch)
        ]
    features = np.stack([prediction["image"] for prediction in predictions])
    text_features = np.concatenate([prediction["texts"] for prediction in predictions])
    similarity = (features.astype(np.float64) @ text_features.T.astype(np.float64)).astype("f4")
    counts = [len(prediction["texts"]) for prediction in predictions]
    return Search(
        similarity,
        np.repeat(np.arange(len(records)), counts),
        [task.config.image.preprocess(open_image(record["image"])) for record in records],
        [caption for record in records for caption in record["captions"]],
        np.argsort(-similarity, 1, kind="stable")[:, :k],
        np.argsort(-similarity.T, 1, kind="stable")[:, :k],
    )


def score_candidates(found: Search, reranker: Reranker) -> tuple[np.ndarray, float]:
    """Returns the fused scores [I, T], NaN for pairs that no search found, and pairs/s."""
    is_candidate = np.zeros(found.similarity.shape, bool)
    np.put_along_axis(is_candidate, found.text_candidates, True, 1)
    np.put_along_axis(is_candidate.T, found.image_candidates, True, 1)
    images, texts = np.nonzero(is_candidate)
    started = time.perf_counter()
    scores = reranker.score(
        [found.texts[text] for text in texts], [found.images[image] for image in images]
    )
    fused = np.full(found.similarity.shape, np.nan, np.float32)
    fused[images, texts] = scores
    return fused, len(images) / (time.perf_counter() - started)


def measure_recall(found: Search, fused: np.ndarray, weight: float) -> dict[str, float]:
    """Returns the recalls of the search with its candidates sorted anew.

    A tie keeps the order of the search, whose own ties go to the lower index.
    """
    text_order = sort_candidates(found.similarity, fused, found.text_candidates, weight)
    image_order = sort_candidates(found.similarity.T, fused.T, found.image_candidates, weight)
    is_own_text = found.owner[text_order] == np.arange(len(text_order))[:, None]
    is_own_image = image_order == found.owner[:, None]
    scores = {f"text_recall@{k}": float(is_own_text[:, :k].any(1).mean()) for k in KS}
    scores |= {f"image_recall@{k}": float(is_own_image[:, :k].any(1).mean()) for k in KS}
    return scores | {"mean_recall": float(np.mean(list(scores.values())))}


def sort_candidates(
    similarity: np.ndarray, fused: np.ndarray, candidates: np.ndarray, weight: float
) -> np.ndarray:
    """Returns the candidates [Q, k] of each query, sorted by both scores."""
    sorted_candidates = np.empty_like(candidates)
    for query, found in enumerate(candidates):
        scores = standardize(similarity[query, found])
        if weight:
            scores = scores + weight * standardize(fused[query, found])
        sorted_candidates[query] = found[np.argsort(-scores, kind="stable")]
    return sorted_candidates


# One dataset --------------------------------------------------------------------------------------


def make_rerankers(pretrained: Path, matching: Path, num_groups: int) -> dict[str, Reranker]:
    """Returns the reranker of each method."""
    return {
        "likelihood": MaskedReranker(load_weights(pretrained), num_groups=num_groups),
        "matching": make_reranker(load_weights(matching)),
    }


def measure_seed(
    weights: Mapping[str, Path], root: Path, dataset: Dataset, factors: Mapping[str, Any], args: Any
) -> dict[str, Any]:
    """Returns the recalls of one seed on the test split, by what ranked.

    Where `factors` is empty they are chosen on the val split first and stored with the result.
    """
    result: dict[str, Any] = {"factors": dict(factors)}
    rerankers = make_rerankers(weights["pretrained"], weights["matching"], args.groups)
    for split in ("test",) if factors else ("val", "test"):
        found = search(weights["matching"], root, split, dataset.num_images, args.k)
        nothing = np.zeros_like(found.similarity)
        scores: dict[str, Any] = {"search": measure_recall(found, nothing, 0)}
        for method, reranker in rerankers.items():
            fused, rate = score_candidates(found, reranker)
            by_factor = {factor: measure_recall(found, fused, factor) for factor in WEIGHTS}
            if split == "val":
                result["factors"][method] = max(
                    WEIGHTS, key=lambda factor: by_factor[factor]["mean_recall"]
                )
            scores[method] = by_factor[result["factors"][method]]
            scores[f"{method} alone"] = measure_recall(found, fused, 1e6)
            scores[f"{method} pairs/s"] = round(rate, 1)
            scores[f"{method} by factor"] = {
                str(factor): recalls["mean_recall"] for factor, recalls in by_factor.items()
            }
        result[split] = scores
    plain = search(weights["plain"], root, "test", dataset.num_images, args.k)
    nothing = np.zeros_like(plain.similarity)
    result["test"]["search without the head"] = measure_recall(plain, nothing, 0)
    return result


def measure(name: str, args: Any) -> list[dict[str, Any]]:
    """Returns the results of every seed; those that are stored are not measured again."""
    dataset, root = DATASETS[name], prepare(name, args.data, args.out)
    pretrained = Path(args.init) if args.init else pretrain(name, root, args.out)
    results: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        file = args.out / f"{name}-{seed}.json"
        if not file.exists():
            weights = {
                "pretrained": pretrained,
                "matching": tune(name, root, args.out, pretrained, seed, matching=True),
                "plain": tune(name, root, args.out, pretrained, seed, matching=False),
            }
            factors = results[0]["factors"] if results else dataset.factors
            result = measure_seed(weights, root, dataset, factors, args)
            write_text(file, json.dumps(result, indent=1) + "\n")
        results.append(json.loads(file.read_text()))
    return results


def make_table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns the Markdown table: mean recall over the seeds, and what re-ranking adds per seed."""
    lines = [
        "| dataset, seeds | what ranks | mean recall | more than the same search |",
        "|---|---|---|---|",
    ]
    columns = ("search without the head", "search", *METHODS)
    for name, seeds in results.items():
        for column in columns:
            recalls = [seed["test"][column]["mean_recall"] for seed in seeds]
            gains = [seed["test"][column]["mean_recall"] - find_search(seed) for seed in seeds]
            gain = format_spread(gains, "+.1%") if column in METHODS else ""
            label = f"search + {column}" if column in METHODS else column
            lines.append(
                f"| {DATASETS[name].label}, {len(seeds)} | {label} | {format_spread(recalls)} "
                f"| {gain} |"
            )
    return "\n".join(lines)


def find_search(seed: Mapping[str, Any]) -> float:
    """Returns the mean recall of the search that was re-ranked."""
    return seed["test"]["search"]["mean_recall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/rerank"))
    parser.add_argument("--init", default="", help="weights of pretrain, for --only one dataset")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--only", nargs="*", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--k", type=int, default=16, help="candidates that are sorted anew")
    parser.add_argument("--groups", type=int, default=2, help="groups of masked tokens")
    args = parser.parse_args()
    results = {name: measure(name, args) for name in args.only}
    table = make_table(results)
    print(table)
    if args.json:
        save_results(args.json, table, results)


if __name__ == "__main__":
    main()
