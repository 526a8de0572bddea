"""Image classification (paper section 3.2), with one of two heads.

`head="linear"`, as in the release: the mean of the patches' states, without a final norm, goes
through a norm and a linear layer.

`head="names"`, as in the paper: image-to-text retrieval in which the class names are the texts. It
has no output per class, so the same weights classify into any list of names.
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

from beit3.data.loader import RecordDataset
from beit3.data.prepare.formats.detect import read_classified_images
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.label_names import CLASSES_FILE, read_class_names, write_class_names
from beit3.data.stores.predictions import CANDIDATES
from beit3.data.stores.record_fields import (
    FILE,
    LABEL,
    PURPOSES,
    FieldKind,
    RecordField,
    is_whole_number,
)
from beit3.data.stores.split_files import locate_split
from beit3.data.views.augment import draw_erasing, erase_boxes, rand_augment_timm
from beit3.data.views.mixup import mix_batch
from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.images import open_image
from beit3.metrics.classification import compute_top_k_accuracy
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.ops.losses import INIT_LOGIT_SCALE, compute_similarities
from beit3.ops.precision import promote_to_float32
from beit3.ops.row_map import map_rows
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

NUM_CANDIDATES = 5
"""Classes that a prediction ranks."""
HEAD_INIT_SCALE = 1e-3
"""Factor of the initial values of the linear head (release)."""

RELEASED_PREPROCESSING = Preprocessing(224, *IMAGENET_MEAN_STD, resize="crop")

Prompts = tuple[tuple[str, ...], str]
"""Class names, and the prompt that they are put into."""


@dataclass(frozen=True)
class ImageNetConfig(TaskConfig):
    """`model.final_norm` is off with the linear head and on with names."""

    supports_names_head: ClassVar[bool] = True

    model: ModelConfig = replace(BASE, final_norm=False)
    image: Preprocessing = RELEASED_PREPROCESSING
    text_length: int = 32
    """Tokens of a class name with its prompt."""
    head: Literal["linear", "names"] = "linear"
    num_classes: int = 1000
    classes: tuple[str, ...] = ()
    """Class names in the order of the labels; empty = unknown, which suffices for a linear head."""
    prompt: str = "{}"
    """Text around a class name, which takes the place of {}."""
    names_per_pass: int = 512
    """Names that are encoded at once. With more names, each pass is recomputed for its gradient."""
    crop: tuple[float, float] = (0.08, 1.0)
    """Fraction of the area that the random crop of training keeps."""
    flip: float = 0.5
    auto_augment: bool = True
    erasing: float = 0.25
    """Probability that a box of a training image is filled with noise."""
    mixup: float = 0.8
    cutmix: float = 1.0
    """Parameters of the Beta distributions that blend images, or boxes of them; both 0 = off."""
    label_smoothing: float = 0.1

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def classifies_by_names(self) -> bool:
        return self.head == "names"

    @property
    def head_sizes(self) -> Mapping[str, int]:
        return {} if self.classifies_by_names else {"num_classes": self.num_classes}


# Recipes ------------------------------------------------------------------------------------------


_SMALL_OPTIM = OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=20, clip=3.0)


def _make_small_recipe(
    model: ModelConfig,
    image_size: int,
    head: Literal["linear", "names"],
    *,
    crop: float,
    steps: int,
    note: str,
    optim: OptimConfig = _SMALL_OPTIM,
) -> Recipe:
    return Recipe(
        task=ImageNetConfig(
            model=replace(model, image_size=image_size, final_norm=head == "names"),
            image=Preprocessing(image_size),
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
        optim=optim,
        run=RunConfig(steps=steps, log_every=10, save_every=100),
        note=note,
    )


def _make_linear_recipe(
    model: ModelConfig, *, lr: float, layer_decay: float, drop_path_rate: float, note: str
) -> Recipe:
    """Fine-tuning as in the release's commands: batch 1024, 50 epochs, 5 of them warmup."""
    model = replace(model, final_norm=False, drop_path_rate=drop_path_rate)
    return Recipe(
        task=ImageNetConfig(model=model),
        data=DataConfig(batch={"main": 1024}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup_epochs=5, layer_decay=layer_decay),
        run=RunConfig(epochs=50, micro_batch=64, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


def _make_giant_recipe(
    image_size: int,
    *,
    batch: int,
    epochs: float,
    optim: OptimConfig,
    note: str,
    eval_every: int = 2_000,
) -> Recipe:
    """The paper's giant by names (appendix): stochastic depth .4, label smoothing .1."""
    return Recipe(
        task=ImageNetConfig(
            model=replace(GIANT, image_size=image_size, drop_path_rate=0.4),
            image=replace(RELEASED_PREPROCESSING, image_size=image_size),
            head="names",
            mixup=0.0,
            cutmix=0.0,
        ),
        data=DataConfig(batch={"main": batch}, workers=8),
        optim=optim,
        run=RunConfig(
            epochs=epochs,
            micro_batch=16,
            checkpointing="full",
            log_every=50,
            eval_every=eval_every,
            save_every=1_000,
        ),
        note=note,
    )


class ImageNet(Task):
    """The backbone on images, with a linear head or with the encoder of class names."""

    Config = ImageNetConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "label": RecordField(LABEL, needed_for=("train", "score"), below="num_classes"),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"candidates": CANDIDATES}
    headline = "accuracy"
    released_names: ClassVar[Mapping[str, str]] = {
        "fc_norm": "fc_norm",
        "head": "head",
        "image_projection": "vision_head",
        "text_projection": "language_head",
        "logit_scale": "logit_scale",
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _make_small_recipe(
            TINY,
            32,
            "linear",
            crop=1.0,
            steps=200,
            note="the embedded world's ten kinds of objects, best from the weights of retrieval "
            "demo_itc",
            optim=replace(_SMALL_OPTIM, name="muon", lr=3e-3),
        ),
        "demo_names": _make_small_recipe(
            TINY, 32, "names", crop=1.0, steps=200, note="the same by their names"
        ),
        "laptop": _make_small_recipe(
            SMALL,
            112,
            "linear",
            crop=0.6,
            steps=400,
            note="folders of photographs on two CPU cores",
        ),
        "laptop_names": _make_small_recipe(
            SMALL, 112, "names", crop=0.6, steps=400, note="the same by the folders' names"
        ),
        "base_224": _make_linear_recipe(
            BASE,
            lr=7e-4,
            layer_decay=0.65,
            drop_path_rate=0.15,
            note="release: ImageNet-1k top-1 85.4",
        ),
        "large_224": _make_linear_recipe(
            LARGE,
            lr=2e-4,
            layer_decay=0.8,
            drop_path_rate=0.25,
            note="release: ImageNet-1k top-1 87.6",
        ),
        "giant_224_in21k": _make_giant_recipe(
            224,
            batch=16_384,
            epochs=50,
            optim=OptimConfig(
                lr=5e-5,
                betas=(0.9, 0.98),
                eps=1e-6,
                weight_decay=0.05,
                warmup_epochs=5,
                layer_decay=0.85,
            ),
            eval_every=-1,
            note="paper: the ImageNet-21k stage, by names; all images train, none are scored",
        ),
        "giant_336": _make_giant_recipe(
            336,
            batch=2_048,
            epochs=15,
            optim=OptimConfig(lr=3e-5, weight_decay=0.05, warmup_epochs=3, layer_decay=0.95),
            note="paper, from giant_224_in21k: ImageNet-1k top-1 89.6, by names",
        ),
    }

    backbone: BEiT3

    def __init__(self, config: ImageNetConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: ImageNetConfig = config
        if config.classes and len(config.classes) != config.num_classes:
            raise ValueError(
                f"{len(config.classes)} class names for {config.num_classes} classes: "
                "give the list of these weights"
            )
        if config.model.final_norm != config.classifies_by_names:
            raise ValueError(
                f"task.model.final_norm must be {config.classifies_by_names} with "
                f"task.head {config.head}"
            )
        self.backbone = BEiT3(config.model)
        dim = config.model.dim
        if config.head == "linear":
            self.fc_norm = nn.LayerNorm(dim, eps=config.model.norm_eps)
            self.head = nn.Linear(dim, config.num_classes)
        else:
            self.image_projection = nn.Linear(dim, dim, bias=False)
            self.text_projection = nn.Linear(dim, dim, bias=False)
            # Of one dimension, because FSDP2 shards no scalars.
            self.logit_scale = nn.Parameter(torch.zeros(1))
        self._cached_features: dict[Prompts, Tensor] = {}
        self._cached_prompts: dict[Prompts, tuple[Tensor, Tensor]] = {}

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """With a linear head no text is read; nothing is ever fused."""
        if self.config.head == "linear":
            return self.find_unused_in_backbone((IMAGE,))
        return self.find_unused_in_backbone((IMAGE,), (TEXT,))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Makes the linear head a thousand times smaller, starts the temperature as the release."""
        super().init_parameter(name, parameter, generator)
        if name.startswith("head."):
            parameter.mul_(HEAD_INIT_SCALE)
        if name == "logit_scale":
            parameter.fill_(INIT_LOGIT_SCALE)

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path,
        root: Path,
        source: str,
        *,
        bad_share: float = BAD_SHARE,
        all_train: int = 0,
    ) -> Mapping[str, Any]:
        """Converts folders of one class each, or a table of images and class names, to records.

        The class names are written beside the records.

        Args:
            raw: Directory of the images.
            root: Directory of records.
            source: Name of the source, main.
            bad_share: The largest fraction of images that may be unusable.
            all_train: 1 = every image is for training, val's too, as in the ImageNet-21k stage,
                which is not scored. 0 = the splits as they are, or 5 % held out.
        """
        names, records = read_classified_images(raw)
        if all_train:
            records = (("train" if split == "val" else split, record) for split, record in records)
        report = write_splits(
            root, "imagenet", source, records, bad_share=bad_share, class_names=names
        )
        write_class_names(root / "imagenet" / source / CLASSES_FILE, names)
        return {**report, "classes": len(names), **describe_doubtful_names(names)}

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Takes the class names from the records.

        Upstream's index files have no names; a linear head then counts the labels.
        """
        assert isinstance(config, ImageNetConfig)
        records_path = locate_split(root, "imagenet", "main", "train")
        names_path = records_path.with_name(CLASSES_FILE)
        if config.head == "linear" and not names_path.exists():
            records = RecordDataset(records_path, root)
            # Labels of another kind are named when all fields are checked.
            values: dict[str, Any] = {repr(r.get("label")): r.get("label") for r in records}
            labels: list[int] = [value for value in values.values() if is_whole_number(value)]
            if not labels:
                raise ValueError(
                    f"{records_path} holds no labels: run beit3 prepare imagenet again"
                )
            return replace(config, classes=(), num_classes=max(labels) + 1)
        names = read_class_names(names_path)
        return replace(config, classes=names, num_classes=len(names))

    def record(self, image: Any) -> Record:
        """Makes a record of an image."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns `image` uint8 [3, S, S], and the label as `target` where the record has one.

        For training also `erased`, a box and its noise, or None.
        """
        config, rng = self.config, rng or make_record_rng(record)
        image = open_image(record["image"])
        if train:
            image = self.augment(image, rng)
        example: Example = {"id": str(record["id"]), "image": config.image.preprocess(image)}
        if train and config.erasing:
            example["erased"] = draw_erasing(example["image"], rng, rate=config.erasing)
        if "label" in record:
            label = int(record["label"])
            if not 0 <= label < config.num_classes:
                raise ValueError(
                    f"label {label} is none of the {config.num_classes} classes: "
                    "give records of the same classes"
                )
            example["target"] = torch.tensor(label)
        return example

    def augment(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Crops, flips and changes uint8 [3, H, W] as far as the config says."""
        config = self.config
        image = crop_and_flip(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return rand_augment_timm(image, rng) if config.auto_augment else image

    def normalize_images(self, batch: Batch) -> Tensor:
        """Normalizes as every task does, and fills the boxes that training erases with noise."""
        pixels = super().normalize_images(batch)
        return erase_boxes(pixels, batch["erased"]) if "erased" in batch else pixels

    # Training -------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `logits` [B, C].

        The batch may hold the class names' features as `class_features` [C, D].
        """
        images = self.normalize_images(batch)
        if self.config.head == "linear":
            patch_states = self.backbone(image=images).of("image")[:, 1:]
            return {"logits": self.head(self.fc_norm(patch_states.mean(1)))}
        projected = self.image_projection(self.backbone(image=images, read="first").first("image"))
        features = F.normalize(promote_to_float32(projected), dim=-1)
        scale = promote_to_float32(self.logit_scale).exp()
        class_features = batch.get("class_features")
        if class_features is None:
            class_features = self.encode_class_names()
        return {"logits": compute_similarities(features, class_features, scale)}

    def compute_shared_features(self) -> dict[str, Tensor]:
        """Encodes the class names once for all micro-batches of a step."""
        if not self.config.classifies_by_names:
            return {}
        return {"class_features": self.encode_class_names()}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cross-entropy of the label.

        Training smooths the label, and mixes images and labels where the config says so.
        """
        config = self.config
        images = self.normalize_images(batch)
        target = F.one_hot(batch["target"], config.num_classes)
        target = target.to(promote_to_float32(images).dtype)
        smoothing = config.label_smoothing if self.training else 0.0
        if self.training and (config.mixup or config.cutmix):
            images, target = mix_batch(
                images, target, None, mixup=config.mixup, cutmix=config.cutmix, smoothing=smoothing
            )
            smoothing = 0.0  # mixing has smoothed the target
        inputs = {"image": images, "class_features": batch.get("class_features")}
        logits = promote_to_float32(self.outputs(inputs)["logits"])
        loss = F.cross_entropy(
            logits, target.to(logits.dtype), reduction="sum", label_smoothing=smoothing
        )
        num_correct = (logits.argmax(1) == target.argmax(1)).sum()
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": num_correct}}

    # Class names ----------------------------------------------------------------------------------

    def encode_class_names(self) -> Tensor:
        """Returns unit features [C, D] of the class names.

        Processes share the work. An evaluation keeps the features until the weights change.
        """
        prompts: Prompts = (self.config.classes, self.config.prompt)
        use_cache = not self.training and not torch.is_grad_enabled()
        if use_cache and prompts in self._cached_features:
            return self._cached_features[prompts]
        text, padding = (part.to(self.logit_scale.device) for part in self.tokenize_class_names())
        features = map_rows(self.encode_texts, text, padding, batch_size=self.config.names_per_pass)
        if use_cache:
            self._cached_features = {prompts: features}
        return features

    def tokenize_class_names(self) -> tuple[Tensor, Tensor]:
        """Returns `text` and `text_padding` [C, L] of the prompts, as long as the longest."""
        names, prompt = self.config.classes, self.config.prompt
        if not names:
            raise ValueError(
                "classification by names needs the class names: give classes=FILE, one name per "
                "line"
            )
        if (names, prompt) not in self._cached_prompts:  # ImageNet-21k's take seconds
            length = self.config.text_length
            tokenized = [self.tokenize_text(prompt.replace("{}", name), length) for name in names]
            text, padding = (torch.stack(part) for part in zip(*tokenized, strict=True))
            max_length = int((~padding).sum(1).max())
            prompts = text[:, :max_length], padding[:, :max_length]
            self._cached_prompts = {(names, prompt): prompts}
        return self._cached_prompts[names, prompt]

    def encode_texts(self, text: Tensor, padding: Tensor) -> Tensor:
        """Returns unit features [n, D] of texts [n, L]."""
        encoded = self.backbone(text=text, text_padding=padding, read="first")
        projected = self.text_projection(encoded.first("text"))
        return F.normalize(promote_to_float32(projected), dim=-1)

    # Kept features are of no use once the weights change: in training, by loading, by a move.

    def train(self, mode: bool = True) -> "ImageNet":
        self._cached_features = {}
        return super().train(mode)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self._cached_features = {}
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> "ImageNet":
        self._cached_features = {}
        return super()._apply(*arguments, **options)

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the likeliest `label`, its probability `score`, and the first `candidates`.

        Each comes with its `name` where class names are known.
        """
        names = self.config.classes
        probabilities = self.outputs(batch)["logits"].float().softmax(1)
        top = probabilities.topk(min(NUM_CANDIDATES, self.config.num_classes), dim=1)
        predictions = []
        for id, labels, scores in zip(
            batch["id"], top.indices.tolist(), top.values.tolist(), strict=True
        ):
            candidates = []
            for label, score in zip(labels, scores, strict=True):
                name = {"name": names[label]} if names else {}
                candidates.append({"label": label, **name, "score": score})
            predictions.append({"id": id, **candidates[0], "candidates": candidates})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns top-1 `accuracy`, `top5`, and `most_frequent`.

        `most_frequent` is what always giving the most common class would score.
        """
        pairs = join_labels(predictions, records)
        labels = [int(record["label"]) for _, record in pairs]
        ranked_labels = [
            [candidate["label"] for candidate in prediction["candidates"]]
            for prediction, _ in pairs
        ]
        return {
            "accuracy": compute_top_k_accuracy(ranked_labels, labels, 1),
            "top5": compute_top_k_accuracy(ranked_labels, labels, 5),
            "most_frequent": max(Counter(labels).values()) / len(labels),
        }


def describe_doubtful_names(names: Sequence[str]) -> dict[str, str]:
    """Returns a remark for the report where names say little, or belong to several classes."""
    synsets = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    remarks = []
    if synsets:
        remarks.append(
            f"{len(synsets)} are WordNet's numbers, such as {synsets[0]}: "
            "put LOC_synset_mapping.txt beside the folders"
        )
    if repeated:
        remarks.append(f"{len(repeated)} stand for several classes, such as {repeated[0]}")
    return {"names": "; ".join(remarks)} if remarks else {}
