"""Image classification (paper section 3.2), in two forms.

`head="linear"`, the release's: the mean of the patches' states, without a final norm, through a
norm and a linear layer.
`head="names"`, the paper's: image-to-text retrieval, in which the class names are the texts; it
needs no head of its own,
so the same weights classify into any list of names.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.data.loader import RecordDataset
from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.stores.split_files import locate_split
from beit3.data.views.augment import auto_augment, draw_erasing, erase_boxes
from beit3.data.views.mixup import mix_batch
from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.files import write_text
from beit3.images import open_image
from beit3.metrics.classification import compute_top_k_accuracy
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.ops.collectives import all_gather_with_gradient, rank, world_size
from beit3.ops.losses import INIT_LOGIT_SCALE, compute_similarities
from beit3.ops.precision import promote_to_float32
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_labels,
    make_record_rng,
)
from beit3.tokenizer.text import TextTokenizer

Names = tuple[tuple[str, ...], str]
"""Class names and the prompt around them."""

CANDIDATES = 5
HEAD_INIT_SCALE = 1e-3
"""Factor of the initial values of the linear head (release)."""

PIXELS = Preprocessing(224, *IMAGENET_MEAN_STD, resize="crop")


@dataclass(frozen=True)
class ImageNetConfig(TaskConfig):
    """`model.final_norm` is off with the linear head, on with names."""

    model: ModelConfig = replace(BASE, final_norm=False)
    image: Preprocessing = PIXELS
    text_length: int = 32
    """Tokens of a class name with its prompt."""
    head: Literal["linear", "names"] = "linear"
    num_classes: int = 1000
    classes: tuple[str, ...] = ()
    """Class names in the order of the labels; empty = unknown, which a linear head can do
    without."""
    prompt: str = "{}"
    """What is said of a name, which takes the place of {}."""
    names_per_pass: int = 512
    """Names that are encoded at once; beyond it a pass is recomputed for its gradient instead of
    kept."""
    crop: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    auto_augment: bool = True
    erasing: float = 0.25
    """Chance that a box of a training picture is filled with noise."""
    mixup: float = 0.8
    cutmix: float = 1.0
    """Parameters of the Beta distributions that blend pictures or boxes of them; both 0 = no
    mixing."""
    label_smoothing: float = 0.1

    supports_names_head: ClassVar[bool] = True

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def classifies_by_names(self) -> bool:
        return self.head == "names"


def _finetuning(
    model: ModelConfig, lr: float, layer_decay: float, drop: float, note: str
) -> Recipe:
    """The release's commands: batch 1024, 50 epochs, 5 of warmup."""
    return Recipe(
        task=ImageNetConfig(model=replace(model, final_norm=False, drop_path_rate=drop)),
        data=DataConfig(batch={"main": 1024}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup_epochs=5, layer_decay=layer_decay),
        run=RunConfig(epochs=50, micro_batch=64, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


def _by_names(size: int, batch: int, optim: OptimConfig, epochs: float, note: str) -> Recipe:
    """The paper's giant (appendix): stochastic depth .4, label smoothing .1."""
    model = replace(GIANT, image_size=size, drop_path_rate=0.4)
    return Recipe(
        task=ImageNetConfig(
            model=model, image=replace(PIXELS, image_size=size), head="names", mixup=0.0, cutmix=0.0
        ),
        data=DataConfig(batch={"main": batch}, workers=8),
        optim=optim,
        run=RunConfig(
            epochs=epochs,
            micro_batch=16,
            checkpointing="full",
            log_every=50,
            eval_every=2_000,
            save_every=1_000,
        ),
        note=note,
    )


def _small(
    model: ModelConfig,
    size: int,
    head: Literal["linear", "names"],
    steps: int,
    note: str,
    *,
    crop: float,
) -> Recipe:
    return Recipe(
        task=ImageNetConfig(
            model=replace(model, image_size=size, final_norm=head == "names"),
            image=Preprocessing(size),
            text_length=12,
            head=head,
            num_classes=1,
            crop=(crop, 1.0),
            flip=0.5 if crop < 1 else 0.0,
            auto_augment=False,
            erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
        ),
        data=DataConfig(batch={"main": 64}),
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=20, clip=3.0),
        run=RunConfig(steps=steps, log_every=10, save_every=100),
        note=note,
    )


class ImageNet(Task):
    """Backbone on images, and a linear head or the encoder of class names."""

    Config = ImageNetConfig
    headline = "accuracy"
    released_names: ClassVar[Mapping[str, str]] = {
        "fc_norm": "fc_norm",
        "head": "head",
        "image_projection": "vision_head",
        "text_projection": "language_head",
        "logit_scale": "logit_scale",
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _small(
            TINY, 32, "linear", 200, "the embedded world's ten kinds of objects", crop=1.0
        ),
        "demo_names": _small(TINY, 32, "names", 200, "the same by their names", crop=1.0),
        "laptop": _small(
            SMALL, 112, "linear", 400, "folders of photographs on two CPU cores", crop=0.6
        ),
        "laptop_names": _small(
            SMALL, 112, "names", 400, "the same by the folders' names", crop=0.6
        ),
        "base_224": _finetuning(BASE, 7e-4, 0.65, 0.15, "release: ImageNet-1k top-1 85.4"),
        "large_224": _finetuning(LARGE, 2e-4, 0.8, 0.25, "release: ImageNet-1k top-1 87.6"),
        "giant_224_in21k": _by_names(
            224,
            16_384,
            OptimConfig(
                lr=5e-5,
                betas=(0.9, 0.98),
                eps=1e-6,
                weight_decay=0.05,
                warmup_epochs=5,
                layer_decay=0.85,
            ),
            50,
            "paper: the ImageNet-21k stage, by names",
        ),
        "giant_336": _by_names(
            336,
            2_048,
            OptimConfig(lr=3e-5, weight_decay=0.05, warmup_epochs=3, layer_decay=0.95),
            15,
            "paper, from giant_224_in21k: ImageNet-1k top-1 89.6, by names",
        ),
    }

    backbone: BEiT3

    def __init__(self, config: ImageNetConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: ImageNetConfig = config
        if config.classes and len(config.classes) != config.num_classes:
            raise ValueError(
                f"{len(config.classes)} class names for {config.num_classes} classes: give the "
                "list of these weights"
            )
        if config.model.final_norm != (config.head == "names"):
            raise ValueError(
                f"task.model.final_norm must be {config.head == 'names'} with task.head "
                f"{config.head}"
            )
        self.backbone = BEiT3(config.model)
        dim = config.model.dim
        if config.head == "linear":
            self.fc_norm = nn.LayerNorm(dim, eps=config.model.norm_eps)
            self.head = nn.Linear(dim, config.num_classes)
        else:
            self.image_projection = nn.Linear(dim, dim, bias=False)
            self.text_projection = nn.Linear(dim, dim, bias=False)
            self.logit_scale = nn.Parameter(torch.empty(1))
        self._features: dict[Names, Tensor] = {}
        self._texts: dict[Names, tuple[Tensor, Tensor]] = {}

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """With a linear head no text is read; nothing is ever fused."""
        if self.config.head == "linear":
            return self.find_unused_in_backbone((IMAGE,))
        return self.find_unused_in_backbone((IMAGE,), (TEXT,))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The linear head starts a thousand times smaller, the temperature at the release's."""
        super().init_parameter(name, parameter, generator)
        if name.startswith("head."):
            parameter.mul_(HEAD_INIT_SCALE)
        if name == "logit_scale":
            parameter.fill_(INIT_LOGIT_SCALE)

    def train(self, mode: bool = True) -> "ImageNet":
        """The names' features are kept as long as the weights stand still: until training, loading,
        or a move."""
        self._features = {}
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> "ImageNet":
        self._features = {}
        return super()._apply(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self._features = {}
        return super().load_state_dict(*arguments, **options)

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Folders of one class each, or a table of images and class names -> records with labels,
        and the names beside them."""
        names, rows = formats.classes(raw)
        report = write_splits(root, "imagenet", source, rows)
        write_text(
            root / "imagenet" / source / "classes.txt", "".join(f"{name}\n" for name in names)
        )
        return dict(report) | {"classes": len(names)} | doubtful(names)

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Take the class names from the records; a linear head without them counts the labels, as
        upstream's index files need."""
        assert isinstance(config, ImageNetConfig)
        records = locate_split(root, "imagenet", "main", "train")
        file = records.with_name("classes.txt")
        if config.head == "linear" and not file.exists():
            largest = max(
                (
                    int(record["label"])
                    for record in RecordDataset(records, root)
                    if "label" in record
                ),
                default=None,
            )
            if largest is None:
                raise ValueError(f"{records} holds no labels: run beit3 prepare imagenet again")
            return replace(config, classes=(), num_classes=largest + 1)
        classes = read_classes(file)
        return replace(config, classes=classes, num_classes=len(classes))

    def record(self, image: Any) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S], of training `erased`, and `target`, the label, where the record
        holds one."""
        rng = rng or make_record_rng(record)
        image, config = open_image(record["image"]), self.config
        example: Example = {
            "id": str(record["id"]),
            "image": config.image.preprocess(self.view(image, rng) if train else image),
        }
        if train and config.erasing:
            example["erased"] = draw_erasing(example["image"], rng, rate=config.erasing)
        if "label" not in record:
            return example
        label = int(record["label"])
        if not 0 <= label < self.config.num_classes:
            raise ValueError(
                f"label {label} is none of the {self.config.num_classes} classes: give records of "
                "the same classes"
            )
        return example | {"target": torch.tensor(label)}

    def view(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The training view, uint8 [3, H, W]: crop, flip, RandAugment as far as the config asks for
        them."""
        config = self.config
        image = crop_and_flip(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return auto_augment(image, rng) if config.auto_augment else image

    def normalize_images(self, batch: Batch) -> Tensor:
        """Those of every task, with noise in the boxes that training erases."""
        pixels = super().normalize_images(batch)
        return erase_boxes(pixels, batch["erased"]) if "erased" in batch else pixels

    # Training -------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` [B, C]."""
        if self.config.head == "linear":
            return {
                "logits": self.head(
                    self.fc_norm(
                        self.backbone(image=self.normalize_images(batch)).of("image")[:, 1:].mean(1)
                    )
                )
            }
        states = self.backbone(image=self.normalize_images(batch), read="first").first("image")
        image = F.normalize(promote_to_float32(self.image_projection(states)), dim=-1)
        return {
            "logits": compute_similarities(
                image, self.name_features(), promote_to_float32(self.logit_scale).exp()
            )
        }

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cross-entropy of the label, in training smoothed, and mixed where the config says so."""
        config, label = self.config, batch["target"]
        images, smoothing = (
            self.normalize_images(batch),
            config.label_smoothing if self.training else 0.0,
        )
        target = F.one_hot(label, config.num_classes).to(promote_to_float32(images).dtype)
        if self.training and (config.mixup or config.cutmix):
            images, target = mix_batch(
                images, target, None, mixup=config.mixup, cutmix=config.cutmix, smoothing=smoothing
            )
            smoothing = 0.0
        logits = promote_to_float32(self.outputs({"image": images})["logits"])
        loss = F.cross_entropy(
            logits, target.to(logits.dtype), reduction="sum", label_smoothing=smoothing
        )
        return {
            "losses": {"loss": loss},
            "metrics": {"loss/accuracy": (logits.argmax(1) == target.argmax(1)).sum()},
        }

    # Names ----------------------------------------------------------------------------------------

    @property
    def names(self) -> Names:
        """What the class names are encoded from."""
        return self.config.classes, self.config.prompt

    def name_features(self) -> Tensor:
        """Unit features [C, D] of the class names. Processes share the work; an evaluation keeps
        them."""
        kept = not self.training and not torch.is_grad_enabled()
        if kept and self.names in self._features:
            return self._features[self.names]
        text, padding = (part.to(self.logit_scale.device) for part in self.name_tensors())
        count, world = len(text), world_size()
        share = -(-count // world)
        mine = [
            min(rank() * share + place, count - 1) for place in range(share)
        ]  # the last name fills up uneven shares
        features = [
            self.encode_names(text[rows], padding[rows], share > self.config.names_per_pass)
            for rows in self.passes(mine)
        ]
        everyone = all_gather_with_gradient(torch.cat(features))[:count]
        if kept:
            self._features = {self.names: everyone}
        return everyone

    def passes(self, rows: list[int]) -> list[list[int]]:
        """Rows in pieces of `names_per_pass`."""
        size = self.config.names_per_pass
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def name_tensors(self) -> tuple[Tensor, Tensor]:
        """`text` and `text_padding` [C, L] of the prompts, as long as the longest."""
        if not self.config.classes:
            raise ValueError(
                "classification by names needs the class names: give classes=FILE, one name per "
                "line"
            )
        if self.names not in self._texts:  # seconds for ImageNet-21k's
            texts = [
                self.tokenize_text(self.config.prompt.replace("{}", name), self.config.text_length)
                for name in self.config.classes
            ]
            text, padding = (torch.stack(part) for part in zip(*texts, strict=True))
            longest = int((~padding).sum(1).max())
            self._texts = {self.names: (text[:, :longest], padding[:, :longest])}
        return self._texts[self.names]

    def encode_names(self, text: Tensor, padding: Tensor, recompute: bool) -> Tensor:
        """Unit features of one pass."""

        def encode(text: Tensor, padding: Tensor) -> Tensor:
            states = self.backbone(text=text, text_padding=padding, read="first").first("text")
            return F.normalize(promote_to_float32(self.text_projection(states)), dim=-1)

        return (
            checkpoint(encode, text, padding, use_reentrant=False)
            if recompute and torch.is_grad_enabled()
            else encode(text, padding)
        )

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """The likeliest `label`, its `name` where names are known, its probability, and the first
        `CANDIDATES` of all."""
        config = self.config
        scores, labels = (
            self.outputs(batch)["logits"]
            .float()
            .softmax(1)
            .topk(min(CANDIDATES, config.num_classes), dim=1)
        )
        predictions = []
        for key, chosen, probabilities in zip(
            batch["id"], labels.tolist(), scores.tolist(), strict=True
        ):
            ranked = [
                {"label": label}
                | ({"name": config.classes[label]} if config.classes else {})
                | {"score": p}
                for label, p in zip(chosen, probabilities, strict=True)
            ]
            predictions.append({"id": key} | ranked[0] | {"candidates": ranked})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Top-1 and top-5 accuracy, and beside them the share of the commonest class."""
        pairs = join_labels(predictions, records)
        truth = [int(record["label"]) for _, record in pairs]
        ranked = [
            [candidate["label"] for candidate in prediction["candidates"]]
            for prediction, _ in pairs
        ]
        return {
            "accuracy": compute_top_k_accuracy(ranked, truth, 1),
            "top5": compute_top_k_accuracy(ranked, truth, 5),
            "most_frequent": max(Counter(truth).values()) / len(truth),
        }


def doubtful(names: Sequence[str]) -> dict[str, str]:
    """A line for the report where names say little, or are of several classes."""
    bare = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    said = (
        [
            f"{len(bare)} are WordNet's numbers, such as {bare[0]}: put LOC_synset_mapping.txt "
            "beside the folders"
        ]
        if bare
        else []
    )
    said += [f"{len(doubled)} stand for several classes, such as {doubled[0]}"] if doubled else []
    return {"names": "; ".join(said)} if said else {}


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one per line in the order of the labels."""
    if not path.exists():
        raise ValueError(
            f"no class names at {path}: run beit3 prepare imagenet, or give one name per line"
        )
    return tuple(
        line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    )
