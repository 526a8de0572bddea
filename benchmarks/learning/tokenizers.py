"""How much of what its teacher knows a visual tokenizer keeps: classes of images and of patches.

    python -m benchmarks.learning.tokenizers --data ../shared/data \
        --weights learned=runs/codes/last frozen=runs/frozen_codes/last \
        --json benchmarks/learning/tokenizers.json

Classifiers, images and labels are those of teachers.py, which measures the teachers themselves. Of
a tokenizer three things are read: the states of its encoder, its codes (one-hot, so the mean over
an image says how often each code occurs), and what its decoder makes of the codes. About two
minutes of one core a tokenizer.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.visual import VisualTokenizer
from beit3.weights.loading import load_frozen
from benchmarks.learning.teachers import CHUNK, DATASETS, make_table, score_features
from benchmarks.probe import save_results


def load_tokenizer(path: str) -> VisualTokenizer:
    """Loads the visual tokenizer of a run or a file."""
    task, _ = load_frozen(path, "vqkd")
    assert isinstance(task.backbone, VisualTokenizer)
    return task.backbone


@torch.no_grad()
def compute_features(tokenizer: VisualTokenizer, images: Tensor) -> dict[str, Tensor]:
    """Returns the features [N, P, F] of all images by what is read, in half precision."""
    chunks: dict[str, list[Tensor]] = {"encoder": [], "codes": [], "decoded codes": []}
    for batch in images.split(CHUNK):
        codes = tokenizer.tokenize(batch)
        features = {
            "encoder": tokenizer.compute_states(batch),
            "codes": F.one_hot(codes, tokenizer.config.num_codes),
            "decoded codes": tokenizer.decode(codes),
        }
        for name, values in features.items():
            chunks[name].append(values.half())
    return {name: torch.cat(parts) for name, parts in chunks.items()}


def measure(weights: dict[str, str], data: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Returns what is read of which tokenizer -> dataset -> accuracy by classifier."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for dataset, read in DATASETS.items():
        train, test = read(data, "train"), read(data, "test")
        for name, path in weights.items():
            tokenizer = load_tokenizer(path)
            train_features = compute_features(tokenizer, train.images)
            test_features = compute_features(tokenizer, test.images)
            for what, features in train_features.items():
                results.setdefault(f"{name}: {what}", {})[dataset] = score_features(
                    (features, train.labels), (test_features[what], test.labels)
                )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=WEIGHTS")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = dict(item.split("=", 1) for item in arguments.weights)
    results = measure(weights, arguments.data)
    table = make_table(results)
    print(table)
    if arguments.json:
        save_results(arguments.json, table, results)


if __name__ == "__main__":
    main()
