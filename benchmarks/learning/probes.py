"""What a network knows without fine-tuning: masked attribute words, and linear classifiers."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.data.views.preprocessing import Preprocessing
from beit3.demo.probes import measure_single_attributes
from beit3.images import open_image
from beit3.model.beit3 import BEiT3
from beit3.model.config import ModelConfig
from beit3.tasks.pretrain import Pretrain
from beit3.weights.loading import load_backbone, load_weights

PENALTY = 1e-3
"""Of the linear probe's squared weights."""
CHUNK = 100
"""Images that are computed at once."""


@dataclass(frozen=True)
class Probe:
    """Images whose classes a linear classifier reads off the mean state of the patches."""

    image: Preprocessing
    kinds: tuple[str, ...]
    """What the parts of a class's name tell: (color, shape) of `blue_circle`."""
    records: str = ""
    """Folder of the records below the study's root."""


OBJECTS = Probe(Preprocessing(32), ("color", "shape"))
"""The world's scenes of one object."""


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


def probe_run(folder: Path, probe: Probe, root: Path) -> dict[str, float]:
    """Returns `probe_backbone` of a run's last weights."""
    return probe_backbone(load_backbone(str(folder / "last")), probe, root)


def probe_initial(model: ModelConfig, seed: int, probe: Probe, root: Path) -> dict[str, float]:
    """Returns `probe_backbone` of initial values."""
    backbone = BEiT3(model)
    backbone.init_weights(seed)
    return probe_backbone(backbone, probe, root)


def probe_backbone(backbone: BEiT3, probe: Probe, root: Path) -> dict[str, float]:
    """Returns the held-out accuracy of a linear classifier of each kind."""
    backbone.eval()
    (train_states, train_labels), (states, labels) = (
        compute_states(backbone, probe, root / probe.records, split) for split in ("train", "val")
    )
    mean, deviation = train_states.mean(0), train_states.std(0) + 1e-6
    scores = {}
    for kind in probe.kinds:
        classifier = fit_classifier((train_states - mean) / deviation, train_labels[kind])
        predicted = classifier((states - mean) / deviation).argmax(1)
        scores[f"{kind} probe"] = float((predicted == labels[kind]).float().mean())
    return scores


@torch.no_grad()
def compute_states(
    backbone: BEiT3, probe: Probe, root: Path, split: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean patch states [N, D] of the images of a split, and their labels [N] by
    kind."""
    records = list(RecordDataset(locate_split(root, "imagenet", "main", split), root))
    states = []
    for start in range(0, len(records), CHUNK):
        images = [open_image(record["image"]) for record in records[start : start + CHUNK]]
        batch = torch.stack([probe.image.preprocess(image) for image in images])
        states.append(backbone(probe.image.normalize(batch)).of("image")[:, 1:].mean(1))
    # The folder of an image is its class: blue_circle.
    names = [Path(record["image"]).parent.name.split("_") for record in records]
    labels = {}
    for index, kind in enumerate(probe.kinds):
        values = sorted({name[index] for name in names})
        labels[kind] = torch.tensor([values.index(name[index]) for name in names])
    return torch.cat(states), labels


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
