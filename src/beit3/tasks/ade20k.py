"""Semantic segmentation on ADE20K, and on folders like CamVid's and Cityscapes' (paper section 3.2
and table 8).

The network is the image side of BEiT-3 with ViT-Adapter around its blocks, and a Mask2Former head.
None of it was released. Learning rate, layer decay, steps and crop of the giant are the paper's
(appendix, tables 15 and 16), the rest is ViT-Adapter's (docs/dense.md says which). A record has an
image, its label map, and under `labels` the meaning of the map's numbers.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.prepare.formats.detect import read_label_maps
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.label_names import read_class_names
from beit3.data.stores.predictions import STRING
from beit3.data.stores.record_fields import (
    FILE,
    LABEL_MAP_DESCRIPTION,
    PURPOSES,
    FieldKind,
    RecordField,
)
from beit3.data.stores.split_files import locate_split
from beit3.data.views.label_maps import IGNORE_INDEX, open_label_map, open_labeled_image
from beit3.data.views.preprocessing import (
    IMAGENET_MEAN_STD,
    VL_MEAN_STD,
    Preprocessing,
    clear_padding,
)
from beit3.data.views.segmentation import SegmentationAugmentation, pad_image_and_labels
from beit3.files import write_text
from beit3.images import open_image
from beit3.metrics.segmentation import ConfusionMatrix, compute_confusion, summarize_confusion
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.ops.collectives import all_gather_objects
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.segmentation.adapter import AdapterConfig, ViTAdapter
from beit3.segmentation.config import LARGE_HEAD, SMALL_HEAD, HeadConfig
from beit3.segmentation.head import MaskHead
from beit3.segmentation.inference import InferenceConfig, count_passes, segment_image
from beit3.segmentation.records import decode_label_map, encode_label_map, get_label_map_options
from beit3.task import Batch, Example, Prediction, Record, Task, join_by_id, make_record_rng
from beit3.tokenizer.text import TextTokenizer

CLASSES_FILE = "classes.json"
"""File beside the records: the names of the labels in their order."""

FIRST_LAYER_PARTS = (
    "head.classes.",
    "mask_embedder.",
    "level_embed",
    "queries_embedder.",
    "queries_features.",
)
"""Parts of the head that ViT-Adapter's release, and EVA's after it, train at the learning rate of
the first layer."""


@dataclass(frozen=True)
class Ade20kConfig(TaskConfig):
    """Settings of segmentation. Sizes are in pixels."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(896, *IMAGENET_MEAN_STD)
    """Mean and deviation of the colors. Sizes are those of `train_view` and `views`."""
    adapter: AdapterConfig = AdapterConfig()
    head: HeadConfig = SMALL_HEAD
    classes: tuple[str, ...] = ()
    """Names of the labels; empty = taken from the records."""
    num_classes: int = 150
    train_view: SegmentationAugmentation = SegmentationAugmentation()
    """Augmentation of training."""
    views: InferenceConfig = InferenceConfig()
    """Windows, scales and flips of evaluation."""
    resize_patch: bool = False
    """Whether to start from weights of another patch size and resample their patch kernel."""
    published_decay: bool = False
    """Whether queries and predictors learn at the first layer's rate, as in ViT-Adapter's release,
    which does so by accident."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def head_sizes(self) -> Mapping[str, int]:
        return {"num_classes": self.num_classes}

    @property
    def base_depth(self) -> int:
        return max(2, self.adapter.num_interactions)


# Recipes ------------------------------------------------------------------------------------------


def _make_full_size_recipe(
    model: ModelConfig,
    crop: int,
    *,
    head: HeadConfig,
    lr: float,
    layer_decay: float,
    drop_path_rate: float,
    steps: int,
    note: str,
    resize_patch: bool = False,
) -> Recipe:
    """Returns a recipe with ViT-Adapter's settings: batch 16, linear decay after 1,500 steps, no
    gradient clipping. All activations that can be are recomputed."""
    return Recipe(
        task=Ade20kConfig(
            model=replace(model, drop_path_rate=drop_path_rate),
            adapter=AdapterConfig(drop_path_rate=drop_path_rate, recompute=True),
            head=replace(head, checkpointing=True),
            train_view=SegmentationAugmentation(crop, crop, 4 * crop),
            views=InferenceConfig(crop, crop * 4 // 7, crop, 4 * crop),
            resize_patch=resize_patch,
        ),
        data=DataConfig(batch={"main": 16}, workers=8),
        optim=OptimConfig(
            lr=lr,
            min_lr=0.0,
            weight_decay=0.05,
            warmup_steps=1_500,
            schedule="linear",
            layer_decay=layer_decay,
        ),
        run=RunConfig(
            steps=steps,
            micro_batch=1,
            checkpointing="full",
            log_every=50,
            eval_every=8_000,
            save_every=2_000,
        ),
        note=note,
    )


def _make_cpu_recipe(
    model: ModelConfig, crop: int, *, head: HeadConfig, batch: int, steps: int, note: str
) -> Recipe:
    """Returns a recipe for training on a CPU."""
    return Recipe(
        task=Ade20kConfig(
            model=model,
            image=Preprocessing(crop, *VL_MEAN_STD),
            adapter=AdapterConfig(inplanes=16),
            head=head,
            num_classes=1,
            train_view=SegmentationAugmentation(
                crop, crop, 4 * crop, scale=(0.75, 1.5), largest_share=1.0, distort=False
            ),
            views=InferenceConfig(crop, crop * 3 // 4, crop, 4 * crop, windows=4),
        ),
        data=DataConfig(batch={"main": batch}),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=20, clip=3.0),
        run=RunConfig(steps=steps, log_every=10, save_every=100),
        note=note,
    )


_DEMO_HEAD = HeadConfig(
    hidden_dim=64,
    num_heads=4,
    encoder_layers=2,
    encoder_ffn=128,
    decoder_layers=3,
    decoder_ffn=128,
    num_queries=10,
    num_points=256,
    class_weight=4.0,
)
_LAPTOP_HEAD = HeadConfig(
    hidden_dim=128,
    num_heads=4,
    encoder_layers=2,
    encoder_ffn=256,
    decoder_layers=3,
    decoder_ffn=256,
    num_queries=30,
    num_points=2048,
)


# Task ---------------------------------------------------------------------------------------------


class Ade20k(Task):
    """Predicts the class of every pixel with a trunk, its adapter and a head of masks."""

    Config = Ade20kConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "label_map": RecordField(FILE, needed_for=("train", "score")),
        "labels": RecordField(LABEL_MAP_DESCRIPTION, needed_for=("train", "score")),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"map": STRING}
    headline = "miou"
    names_file = CLASSES_FILE
    unused_parameters: ClassVar[Mapping[str, str]] = {
        f"backbone.{name}": reason for name, reason in ImageTrunk.unused_parameters.items()
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _make_cpu_recipe(
            TINY,
            64,
            head=_DEMO_HEAD,
            batch=8,
            steps=1_400,
            note="the embedded world's shapes, in minutes on two CPU cores",
        ),
        "laptop": _make_cpu_recipe(
            SMALL,
            256,
            head=_LAPTOP_HEAD,
            batch=4,
            steps=400,
            note="photographs on two CPU cores",
        ),
        "base_512": _make_full_size_recipe(
            BASE,
            512,
            head=SMALL_HEAD,
            lr=6e-5,
            layer_decay=0.9,
            drop_path_rate=0.2,
            steps=160_000,
            note="ours, from released weights",
        ),
        "large_512": _make_full_size_recipe(
            LARGE,
            512,
            head=SMALL_HEAD,
            lr=2e-5,
            layer_decay=0.9,
            drop_path_rate=0.3,
            steps=160_000,
            note="ours, the same of large",
        ),
        "large_896": _make_full_size_recipe(
            LARGE,
            896,
            head=LARGE_HEAD,
            lr=2e-5,
            layer_decay=0.9,
            drop_path_rate=0.3,
            steps=80_000,
            note="ViT-Adapter's; of BEiT v2-L: mIoU 60.5 at several scales",
        ),
        "giant_896": _make_full_size_recipe(
            replace(GIANT, patch_size=16),
            896,
            head=LARGE_HEAD,
            lr=1e-5,
            layer_decay=0.95,
            drop_path_rate=0.5,
            steps=80_000,
            note="paper: mIoU 62.0, at several scales 62.8",
            resize_patch=True,
        ),
    }

    backbone: ImageTrunk

    def __init__(self, config: Ade20kConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: Ade20kConfig = config
        if config.classes and len(config.classes) != config.num_classes:
            raise ValueError(
                f"{len(config.classes)} class names for {config.num_classes} classes: give the "
                "list of these weights"
            )
        self.backbone = ImageTrunk(config.model)
        self.adapter = ViTAdapter(config.model, config.adapter)
        self.head = MaskHead(config.model.dim, config.num_classes, config.head)

    def init_weights(self, seed: int = 0) -> None:
        """Initializes the parameters as every task does, and resets the adapter's statistics."""
        super().init_weights(seed)
        self.adapter.reset_buffers()

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initializes adapter and head by their own rules, the trunk as every task does."""
        child, _, rest = name.partition(".")
        if child == "adapter":
            self.adapter.init_parameter(rest, parameter, generator)
        elif child == "head":
            self.head.init_parameter(rest, parameter, generator)
        else:
            super().init_parameter(name, parameter, generator)

    def layer_of(self, name: str) -> tuple[int, int]:
        """Returns the depths of a parameter and of the head, as `published_decay` has them."""
        depth, head_depth = super().layer_of(name)
        in_first_layer = name.startswith("head.") and any(
            part in name for part in FIRST_LAYER_PARTS
        )
        if self.config.published_decay and in_first_layer:
            depth = 0
        return depth, head_depth

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts folders of images and label maps to records and a list of class names.

        `bad_share` is the largest fraction of images that may be unusable.
        """
        counts: Counter[str] = Counter()
        names, options, rows = read_label_maps(raw, counts=counts)
        labels = {"num_classes": len(names)} | options
        records = ((split, record | {"labels": labels}) for split, record in rows)
        report = write_splits(root, "ade20k", source, records, bad_share=bad_share)
        write_text(
            root / "ade20k" / source / CLASSES_FILE,
            json.dumps(names, indent=1, ensure_ascii=False) + "\n",
        )
        meaning_of_0 = "unlabeled" if options["reduce_zero"] else f"class {names[0]}"
        if "lookup" not in options:
            report["pixels of 0"] = meaning_of_0
        if len(names) == 1:
            report["one class"] = "every pixel will be given it: number the background as well"
        return {**report, "classes": len(names), **counts}

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Sets the classes to those beside the records."""
        assert isinstance(config, Ade20kConfig)
        path = locate_split(root, "ade20k", "main", "train").with_name(CLASSES_FILE)
        if not path.is_file():
            raise ValueError(f"no class names at {path}: run beit3 prepare ade20k again")
        classes = read_class_names(path)
        return replace(config, classes=classes, num_classes=len(classes))

    def record(self, image: Any) -> Record:
        """Makes a record of an image."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns for evaluation the entire `image` uint8 [3, H, W].

        For training returns an augmented crop in a square, padded at the bottom and on the right:
        `image` uint8 [3, S, S], `size` [2], its height and width without padding, and `label_map`
        uint8 or int32 [S, S], which is 255 where the loss leaves a pixel out.
        """
        id = str(record["id"])
        if not train:
            if "labels" in record:
                self._get_label_map_options(record)
            return {"id": id, "image": open_image(record["image"])}
        if "label_map" not in record:
            raise ValueError(f"record {id} has no label map: train on a split that has them")
        options = self._get_label_map_options(record)
        image, labels = open_labeled_image(record["image"], record["label_map"], **options)
        augment = self.config.train_view
        image, labels = augment(image, labels, rng or make_record_rng(record))
        size = torch.tensor(labels.shape)
        image, labels = pad_image_and_labels(image, labels, augment.crop)
        return {"id": id, "image": image, "size": size, "label_map": labels}

    def _get_label_map_options(self, record: Record) -> dict[str, Any]:
        """Returns the options of a record's label map; ValueError where its classes are others."""
        options = get_label_map_options(record)
        if options["num_classes"] != self.config.num_classes:
            raise ValueError(
                f"{options['num_classes']} classes in the records, {self.config.num_classes} in "
                "the weights: give records of the same classes"
            )
        return options

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stacks examples of training; lists those of evaluation, each image of its own size."""
        if "label_map" in examples[0]:
            return super().collate(examples)
        return {key: [example[key] for example in examples] for key in examples[0]}

    def normalize_images(self, batch: Batch) -> Tensor:
        """Normalizes the images and sets their padding to zero, which is the mean color."""
        pixels = super().normalize_images(batch)
        return clear_padding(pixels, batch["size"]) if "size" in batch else pixels

    # Training -------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the masks, for `mask` and `dice`, and the weighted queries, for `class`."""
        return self.head.count_targets(batch["label_map"], ignore=IGNORE_INDEX)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the head. The total is the published sum over the head's layers."""
        return self.head.loss_weights

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Returns the head's losses `mask`, `dice` and `class`, each a mean over its layers."""
        predicted = self.head(self.adapter(self.normalize_images(batch), self.backbone))
        losses = self.head.compute_losses(predicted, batch["label_map"], ignore=IGNORE_INDEX)
        return {"losses": losses, "metrics": {}}

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `scores` [B, C, h, w] of images of one size, a quarter of a patch apart."""
        return {"scores": self.compute_scores(self.normalize_images(batch))}

    def compute_scores(self, pixels: Tensor) -> Tensor:
        """Returns class scores [B, C, h, w] of normalized pixels [B, 3, H, W].

        The adapter pads the pixels; the scores of this padding are cut off.
        """
        height, width = pixels.shape[2:]
        scores = self.head.compute_scores(self.head(self.adapter(pixels, self.backbone)))
        padded_height, padded_width = self.adapter.compute_padded_size(height, width)
        num_rows = -(-scores.shape[2] * height // padded_height)
        num_columns = -(-scores.shape[3] * width // padded_width)
        return scores[:, :, :num_rows, :num_columns]

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the labels of all pixels as `map`, a PNG in base64, and its size in pixels.

        Sharded weights are gathered for every pass through the network, by all processes. So each
        process makes as many passes as the one with the most windows.
        """
        views, device = self.config.views, next(self.backbone.parameters()).device
        num_passes = 0
        for image in batch["image"]:
            num_passes += count_passes(image.shape[1], image.shape[2], views)
        # Before the first pass, because all processes must communicate in the same order.
        max_passes = max(all_gather_objects(num_passes))
        predictions = []
        for id, image in zip(batch["id"], batch["image"], strict=True):
            labels = segment_image(
                image.to(device), self.compute_scores, views, normalize=self._normalize_image
            )
            height, width = labels.shape
            label_map = encode_label_map(labels)
            predictions.append({"id": id, "height": height, "width": width, "map": label_map})
        self._run_empty_passes(max_passes - num_passes)
        return predictions

    def _normalize_image(self, image: Tensor) -> Tensor:
        """Normalizes an image uint8 [3, H, W]."""
        return super().normalize_images({"image": image})

    def _run_empty_passes(self, count: int) -> None:
        """Runs the network on an empty window as often as other processes have more windows."""
        weights, crop = next(self.backbone.parameters()), self.config.views.crop
        empty_window = torch.zeros(1, 3, crop, crop, device=weights.device, dtype=weights.dtype)
        for _ in range(count):
            self.compute_scores(empty_window)

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns `miou`, `aacc` and `macc` over all pixels of the split."""
        return summarize_confusion(sum_confusion(predictions, records))


def sum_confusion(predictions: Sequence[Prediction], records: Sequence[Record]) -> ConfusionMatrix:
    """Returns the confusion matrix [C, C] of a split, at the size of the label maps."""
    total: ConfusionMatrix | None = None
    for prediction, record in join_by_id(predictions, records):
        if "label_map" not in record:
            raise ValueError(
                "some of these records hold no label map to compare with: score a split that has "
                "them"
            )
        options = get_label_map_options(record)
        confusion = compute_confusion(
            decode_label_map(prediction),
            open_label_map(record["label_map"], **options).numpy(),
            num_classes=options["num_classes"],
            ignore=IGNORE_INDEX,
            name=str(record["id"]),
        )
        total = confusion if total is None else total + confusion
    assert total is not None, "a split has records"
    return total
