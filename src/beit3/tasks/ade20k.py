"""Semantic segmentation on ADE20K and folders like CamVid's and Cityscapes' (paper section 3.3 and
table 8).

The image side of BEiT-3, ViT-Adapter around its blocks, a Mask2Former head; none of it was
released. Rate, decay, steps and
crop of the giant are the paper's (appendix, tables 15 and 16), the rest is ViT-Adapter's
(docs/dense.md says which). A record:
an image, its label map, and under `labels` what the map's numbers mean.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3.data.prepare.formats.scenes import scenes
from beit3.data.prepare.splits import write_splits
from beit3.data.stores.split_files import locate_split
from beit3.data.views.label_maps import (
    IGNORE_INDEX,
    open_label_map,
    open_labeled_image,
    read_pixel_values,
)
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
from beit3.task import Batch, Example, Prediction, Record, Task, join_by_id, make_record_rng
from beit3.tokenizer.text import TextTokenizer

CLASSES_FILE = "classes.json"
"""Beside the records: the names of the labels, in their order."""

QUIRK = ("head.classes.", "mask_embedder.", "level_embed", "queries_embedder.", "queries_features.")
"""Parts of the head that ViT-Adapter's release, and EVA's after it, train at the rate of the first
layer."""


@dataclass(frozen=True)
class Ade20kConfig(TaskConfig):
    """All that inference needs."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(896, *IMAGENET_MEAN_STD)
    """Mean and deviation of the colors; sizes are those of the views."""
    adapter: AdapterConfig = AdapterConfig()
    head: HeadConfig = SMALL_HEAD
    classes: tuple[str, ...] = ()
    """Names of the labels; empty = taken from the records."""
    num_classes: int = 150
    train_view: SegmentationAugmentation = SegmentationAugmentation()
    views: InferenceConfig = InferenceConfig()
    """What evaluation sees: windows, scales, mirrored or not."""
    resize_patch: bool = False
    """Whether to start from weights of another patch size, their kernel resampled."""
    published_decay: bool = False
    """Whether queries and predictors learn at the first layer's rate, as in ViT-Adapter's release,
    which meant otherwise."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def head_sizes(self) -> Mapping[str, int]:
        return {"num_classes": self.num_classes}

    @property
    def base_depth(self) -> int:
        return max(2, self.adapter.num_interactions)


def _recipe(
    model: ModelConfig,
    rate: float,
    crop: int,
    head: HeadConfig,
    optim: OptimConfig,
    steps: int,
    note: str,
    **fields: Any,
) -> Recipe:
    """ViT-Adapter's settings: batch 16, linear decay after 1,500 steps, no clipping; everything
    that can be is recomputed."""
    return Recipe(
        task=Ade20kConfig(
            model=replace(model, drop_path_rate=rate),
            adapter=AdapterConfig(drop_path_rate=rate, recompute=True),
            head=replace(head, checkpointing=True),
            train_view=SegmentationAugmentation(crop, crop, 4 * crop),
            views=InferenceConfig(crop, crop * 4 // 7, crop, 4 * crop),
            **fields,
        ),
        data=DataConfig(batch={"main": 16}, workers=8),
        optim=replace(optim, min_lr=0.0, weight_decay=0.05, warmup_steps=1_500, schedule="linear"),
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


def _on_processor(
    model: ModelConfig, crop: int, head: HeadConfig, batch: int, steps: int, note: str
) -> Recipe:
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


_DEMO = HeadConfig(64, 4, 2, 128, 3, 128, num_queries=10, num_points=256, class_weight=4.0)
_LAPTOP = HeadConfig(128, 4, 2, 256, 3, 256, num_queries=30, num_points=2048)


class Ade20k(Task):
    """A trunk, its adapter and the head."""

    Config = Ade20kConfig
    headline = "miou"
    names_file = CLASSES_FILE
    unused_parameters: ClassVar[Mapping[str, str]] = {
        f"backbone.{name}": reason for name, reason in ImageTrunk.unused_parameters.items()
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _on_processor(
            TINY, 64, _DEMO, 8, 1_400, "the embedded world's shapes, in minutes on two CPU cores"
        ),
        "laptop": _on_processor(SMALL, 256, _LAPTOP, 4, 400, "photographs on two CPU cores"),
        "base_512": _recipe(
            BASE,
            0.2,
            512,
            SMALL_HEAD,
            OptimConfig(lr=6e-5, layer_decay=0.9),
            160_000,
            "ours, from released weights",
        ),
        "large_512": _recipe(
            LARGE,
            0.3,
            512,
            SMALL_HEAD,
            OptimConfig(lr=2e-5, layer_decay=0.9),
            160_000,
            "ours, the same of large",
        ),
        "large_896": _recipe(
            LARGE,
            0.3,
            896,
            LARGE_HEAD,
            OptimConfig(lr=2e-5, layer_decay=0.9),
            80_000,
            "ViT-Adapter's; of BEiT v2-L: mIoU 60.5 at several scales",
        ),
        "giant_896": _recipe(
            replace(GIANT, patch_size=16),
            0.5,
            896,
            LARGE_HEAD,
            OptimConfig(lr=1e-5, layer_decay=0.95),
            80_000,
            "paper: mIoU 62.0, at several scales 62.8",
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
        """Parameters as everywhere, and statistics of no image yet."""
        super().init_weights(seed)
        self.adapter.reset_buffers()

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The adapter's and the head's own initial values, the trunk's as everywhere."""
        part, _, rest = name.partition(".")
        if part in ("adapter", "head"):
            getattr(self, part).init_parameter(rest, parameter, generator)
        else:
            super().init_parameter(name, parameter, generator)

    def layer_of(self, name: str) -> tuple[int, int]:
        """As everywhere, but for what `published_decay` asks for."""
        layer, head = super().layer_of(name)
        return (
            0
            if self.config.published_decay
            and name.startswith("head.")
            and any(part in name for part in QUIRK)
            else layer
        ), head

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Folders of images and label maps -> records, and the names of the classes beside them."""
        names, options, rows = scenes(raw)
        labels = {"num_classes": len(names)} | options
        report = write_splits(
            root, "ade20k", source, ((split, record | {"labels": labels}) for split, record in rows)
        )
        write_text(
            root / "ade20k" / source / CLASSES_FILE,
            json.dumps(names, indent=1, ensure_ascii=False) + "\n",
        )
        return dict(report) | {"classes": len(names)}

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Take the classes from beside the records."""
        assert isinstance(config, Ade20kConfig)
        file = locate_split(root, "ade20k", "main", "train").with_name(CLASSES_FILE)
        if not file.is_file():
            raise ValueError(f"no class names at {file}: run beit3 prepare ade20k again")
        classes = tuple(json.loads(file.read_text(encoding="utf-8")))
        return replace(config, classes=classes, num_classes=len(classes))

    def record(self, image: Any) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """For evaluation `image` uint8 [3, H, W], whole. For training a view in a square: `image`
        uint8 [3, S, S], of which
        `size` [2] (height, width) is picture, and `label_map` uint8 or int32 [S, S], 255 for pixels
        that count nowhere.
        """
        if not train:
            if "labels" in record:
                self.meaning(record)
            return {"id": str(record["id"]), "image": open_image(record["image"])}
        if "label_map" not in record:
            raise ValueError(
                f"record {record['id']} has no label map: train on a split that has them"
            )
        image, labels = open_labeled_image(
            record["image"], record["label_map"], **self.meaning(record)
        )
        view = self.config.train_view
        image, labels = view(image, labels, rng or make_record_rng(record))
        size = torch.tensor(labels.shape)
        image, labels = pad_image_and_labels(image, labels, view.crop)
        return {"id": str(record["id"]), "image": image, "size": size, "label_map": labels}

    def meaning(self, record: Record) -> dict[str, Any]:
        """What the numbers of a record's label map mean, as `open_label_map` takes it; ValueError
        for other classes than ours."""
        options = label_map_options(record)
        if options["num_classes"] != self.config.num_classes:
            known = self.config.num_classes
            raise ValueError(
                f"{options['num_classes']} classes in the records, {known} here: give records of "
                "the same classes"
            )
        return options

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Of evaluation a list of pictures, each of its own size."""
        if "label_map" in examples[0]:
            return super().collate(examples)
        return {key: [example[key] for example in examples] for key in examples[0]}

    def normalize_images(self, batch: Batch) -> Tensor:
        """Those of every task, with zeros, the mean color, in the padding."""
        return (
            clear_padding(super().normalize_images(batch), batch["size"])
            if "size" in batch
            else super().normalize_images(batch)
        )

    # Training -------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Masks for `mask` and `dice`, weighted queries for `class`."""
        return self.head.counts(batch["label_map"], ignore=IGNORE_INDEX)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Those of the head: the total is the published sum over its layers."""
        return self.head.loss_weights

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The head's three losses, each a mean over its layers."""
        predicted = self.head(self.adapter(self.normalize_images(batch), self.backbone))
        return {
            "losses": self.head.losses(predicted, batch["label_map"], ignore=IGNORE_INDEX),
            "metrics": {},
        }

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`scores` [B, C, h, w] of pictures of one size, a quarter of a patch apart."""
        return {"scores": self.scores(self.normalize_images(batch))}

    def scores(self, pixels: Tensor) -> Tensor:
        """Scores of the classes, of the part of the maps that is picture."""
        height, width = pixels.shape[2:]
        scores = self.head.scores(self.head(self.adapter(pixels, self.backbone)))
        sides = zip(
            scores.shape[2:], (height, width), self.adapter.padded_size(height, width), strict=True
        )
        rows, columns = (-(-count * part // whole) for count, part, whole in sides)
        return scores[:, :, :rows, :columns]

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """`map`: the labels of all pixels, a PNG in base64, at the picture's own size."""
        weights, views = next(self.backbone.parameters()), self.config.views
        mine = sum(count_passes(image.shape[1], image.shape[2], views) for image in batch["image"])
        most = max(
            all_gather_objects(mine)
        )  # asked before the first pass: all processes must call the same things in turn
        plain, found = super().normalize_images, []
        for key, image in zip(batch["id"], batch["image"], strict=True):
            labels = segment_image(
                image.to(weights.device),
                self.scores,
                views,
                normalize=lambda image: plain({"image": image}),
            )
            found.append(
                {
                    "id": key,
                    "height": labels.shape[0],
                    "width": labels.shape[1],
                    "map": encode_label_map(labels),
                }
            )
        blank = torch.zeros(
            1, 3, views.crop, views.crop, device=weights.device, dtype=weights.dtype
        )
        for _ in range(
            most - mine
        ):  # sharded weights are gathered for every pass, by all processes
            self.scores(blank)
        return found

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """`miou`, `aacc` and `macc` over all pixels of the split."""
        return summarize_confusion(sum_confusion(predictions, records))


def sum_confusion(predictions: Sequence[Prediction], records: Sequence[Record]) -> ConfusionMatrix:
    """The confusion matrix of a split, [C, C], at the size of the label maps."""
    total: ConfusionMatrix | None = None
    for prediction, record in join_by_id(predictions, records):
        if "label_map" not in record:
            raise ValueError(
                "some of these records hold no label map to compare with: score a split that has "
                "them"
            )
        options = label_map_options(record)
        truth = open_label_map(record["label_map"], **options).numpy()
        found = compute_confusion(
            decode_label_map(prediction),
            truth,
            num_classes=options["num_classes"],
            ignore=IGNORE_INDEX,
            name=str(record["id"]),
        )
        total = found if total is None else total + found
    assert total is not None, "a split has records"
    return total


def label_map_options(record: Record) -> dict[str, Any]:
    """What the numbers of a record's label map mean, as `open_label_map` takes it."""
    labels = record["labels"]
    return {
        "num_classes": labels["num_classes"],
        "reduce_zero": labels.get("reduce_zero", False),
        "unlabeled": tuple({labels.get("ignore", IGNORE_INDEX)} - {IGNORE_INDEX}),
        "lookup": tuple(labels.get("lookup", ())),
    }


def encode_label_map(labels: Tensor) -> str:
    """Labels [H, W] as a PNG in base64, of 8 bits where they fit, else of 16."""
    values = labels.cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8 if values.max(initial=0) <= 255 else np.uint16)).save(
        file, "PNG"
    )
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_label_map(prediction: Prediction) -> np.ndarray:
    """The labels [H, W] of a prediction; ValueError naming it where its map is none."""
    try:
        return read_pixel_values(
            io.BytesIO(base64.b64decode(str(prediction["map"]), validate=True))
        )
    except ValueError:
        raise ValueError(
            f"the map of prediction {prediction['id']} is no PNG of labels in base64: predict again"
        ) from None
