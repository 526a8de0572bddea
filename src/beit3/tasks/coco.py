"""Object detection and instance segmentation on COCO (paper sections 3.3 and table 7), and boxes
alone on Objects365.

The image side of BEiT-3 with window attention, ViTDet's pyramid, a cascade of three box heads and a
mask head; its weights
were never released. Widths, schedule and batch of the giant are the paper's (appendix, tables 15
and 16); what the paper
leaves out is ViTDet's and EVA's (docs/dense.md says which). A record: an image and its objects,
each a box [x, y, w, h] in
pixels, a label, and polygons or an RLE.
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

from beit3.data.prepare.formats.instances import instances
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.split_files import locate_split
from beit3.data.views.jitter import (
    ObjectAnnotations,
    VisibleObjects,
    large_scale_jitter,
    pad_to_square,
)
from beit3.data.views.preprocessing import (
    IMAGENET_MEAN_STD,
    VL_MEAN_STD,
    Preprocessing,
    clear_padding,
)
from beit3.detection.cascade import Target
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.inference import Detections, ImageView, detect_objects, flip_view
from beit3.files import write_text
from beit3.images import open_image
from beit3.metrics.detection import COCO_METRICS, IouKind, compute_coco_ap
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_by_id,
    make_record_rng,
    read_server_id,
)
from beit3.tokenizer.text import TextTokenizer

CATEGORIES_FILE = "categories.json"
"""Beside the records: [{"id", "name"}] in the order of the labels."""


@dataclass(frozen=True)
class CocoConfig(TaskConfig):
    """All that inference needs."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(1024, *IMAGENET_MEAN_STD, resize="fit")
    """`image_size` is the side of the square that pictures are fitted into, at training and at
    evaluation."""
    detector: DetectorConfig = DetectorConfig()
    categories: tuple[str, ...] = ()
    """Names of the labels; empty = taken from the records."""
    category_ids: tuple[int, ...] = ()
    """What the data set calls them; its evaluation server asks for these."""
    num_classes: int = 80
    window: int = 16
    """Patches a side that most blocks attend within; 0 = all see the whole picture."""
    num_global: int = 4
    """Blocks that see the whole picture nevertheless, evenly spaced."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: pictures are fitted into the square times a factor between these."""
    flip: float = 0.5
    test_sizes: tuple[int, ...] = ()
    """Sides of further squares whose detections are merged with those of `image` at evaluation."""
    test_flip: bool = False
    """Whether each is seen mirrored too."""
    resize_patch: bool = False
    """Whether to start from weights of another patch size, their kernel resampled."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.categories

    @property
    def base_depth(self) -> int:
        return max(2, self.num_global)


def _vitdet(model: ModelConfig, rate: float, layer_decay: float, note: str) -> Recipe:
    """ViTDet's settings (its release): batch 64, two drops, no clipping."""
    return Recipe(
        task=CocoConfig(model=replace(model, drop_path_rate=rate, final_norm=False)),
        data=DataConfig(batch={"main": 64}, workers=8),
        optim=OptimConfig(
            lr=1e-4,
            min_lr=0.0,
            weight_decay=0.1,
            warmup_steps=250,
            schedule="steps",
            layer_decay=layer_decay,
        ),
        run=RunConfig(
            epochs=100,
            micro_batch=1,
            checkpointing="full",
            log_every=50,
            eval_every=10_000,
            save_every=2_000,
        ),
        note=note,
    )


def _giant(size: int, lr: float, epochs: float, detector: DetectorConfig, note: str) -> Recipe:
    """The paper's giant (tables 15 and 16), whose patches of 14 pixels become 16."""
    model = replace(GIANT, patch_size=16, drop_path_rate=0.6, final_norm=False)
    return Recipe(
        task=CocoConfig(
            model=model,
            image=Preprocessing(size, *IMAGENET_MEAN_STD, resize="fit"),
            detector=detector,
            resize_patch=True,
        ),
        data=DataConfig(batch={"main": 64}, workers=8),
        optim=OptimConfig(
            lr=lr, min_lr=0.0, weight_decay=0.1, warmup_steps=250, schedule="steps", layer_decay=0.9
        ),
        run=RunConfig(
            epochs=epochs,
            micro_batch=1,
            checkpointing="full",
            log_every=50,
            eval_every=10_000,
            save_every=2_000,
        ),
        note=note,
    )


def _on_processor(
    model: ModelConfig, size: int, detector: DetectorConfig, batch: int, steps: int, note: str
) -> Recipe:
    return Recipe(
        task=CocoConfig(
            model=replace(model, final_norm=False),
            image=Preprocessing(size, *VL_MEAN_STD, resize="fit"),
            detector=detector,
            num_classes=1,
            window=0,
            scale=(0.7, 1.3),
        ),
        data=DataConfig(batch={"main": batch}),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=30, clip=3.0, layer_decay=0.8),
        run=RunConfig(steps=steps, log_every=10, save_every=100),
        note=note,
    )


_DEMO = DetectorConfig(
    pyramid_dim=48,
    anchor_sizes=(8, 16, 24, 32, 48),
    rpn_convs=1,
    rpn_samples=64,
    rpn_top_train=200,
    rpn_top_test=100,
    rpn_proposals=50,
    roi_samples=32,
    box_convs=1,
    box_dim=128,
    mask_convs=2,
    min_score=0.01,
    detections_per_image=20,
)
_LAPTOP = replace(
    _DEMO,
    pyramid_dim=96,
    anchor_sizes=(16, 32, 64, 128, 256),
    rpn_samples=128,
    rpn_top_train=500,
    rpn_top_test=300,
    rpn_proposals=150,
    pooled_cells=5.0,
    roi_samples=64,
    box_convs=2,
    box_dim=256,
    detections_per_image=100,
)


class Coco(Task):
    """A windowed trunk and the detector above it."""

    Config = CocoConfig
    headline = "box_ap"
    names_file = CATEGORIES_FILE
    unused_parameters: ClassVar[Mapping[str, str]] = {
        f"backbone.{name}": reason for name, reason in ImageTrunk.unused_parameters.items()
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _on_processor(
            TINY, 64, _DEMO, 16, 400, "the embedded world's shapes, in minutes on two CPU cores"
        ),
        "laptop": _on_processor(SMALL, 320, _LAPTOP, 4, 400, "photographs on two CPU cores"),
        "base_1024": _vitdet(
            BASE,
            0.1,
            0.7,
            "ViTDet's settings for the released base; of MAE's: box AP 54.0, mask AP 46.7",
        ),
        "large_1024": _vitdet(LARGE, 0.4, 0.8, "the same for large; of MAE's: 57.6, 50.0"),
        "giant_1024_objects365": _giant(
            1024, 1e-4, 15, DetectorConfig(masks=False), "paper: the Objects365 stage, boxes alone"
        ),
        "giant_1280": _giant(
            1280,
            5e-5,
            20,
            DetectorConfig(),
            "paper, from giant_1024_objects365: test-dev box AP 63.7, mask AP 54.8",
        ),
    }

    backbone: ImageTrunk

    def __init__(self, config: CocoConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: CocoConfig = config
        if config.image.resize != "fit":
            raise ValueError(
                f"task.image.resize {config.image.resize}: detection fits whole pictures into a "
                "square, give fit"
            )
        if config.categories and len(config.categories) != config.num_classes:
            raise ValueError(
                f"{len(config.categories)} categories for {config.num_classes} classes: give the "
                "list of these weights"
            )
        for size in self.sizes:
            if size % config.model.patch_size:
                raise ValueError(
                    f"a square of {size} px is no multiple of the {config.model.patch_size} px "
                    "patch: give one that is"
                )
        self.backbone = ImageTrunk(config.model, window=config.window, num_global=config.num_global)
        self.detector = Detector(
            config.model.dim,
            patch_size=config.model.patch_size,
            num_classes=config.num_classes,
            config=config.detector,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the squares that evaluation sees, each once, the usual one first."""
        return tuple(dict.fromkeys((self.config.image.image_size, *self.config.test_sizes)))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The detector's own initial values, the trunk's as everywhere."""
        if name.startswith("detector."):
            self.detector.init_parameter(name.removeprefix("detector."), parameter, generator)
        else:
            super().init_parameter(name, parameter, generator)

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """COCO's instances_*.json or Objects365's files -> records, and the categories beside them.

        bad_share: images that may be missing or unreadable; Objects365 is seldom whole.
        """
        repaired: Counter[str] = Counter()
        categories, rows = instances(raw, repaired=repaired)
        report = write_splits(root, "coco", source, rows, bad_share=bad_share)
        write_text(
            root / "coco" / source / CATEGORIES_FILE,
            json.dumps(categories, indent=1, ensure_ascii=False) + "\n",
        )
        return (
            dict(report)
            | {"categories": len(categories)}
            | {f"repaired: {what}": count for what, count in sorted(repaired.items())}
        )

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Take the categories from beside the records."""
        assert isinstance(config, CocoConfig)
        file = locate_split(root, "coco", "main", "train").with_name(CATEGORIES_FILE)
        if not file.is_file():
            raise ValueError(f"no categories at {file}: run beit3 prepare coco again")
        categories = json.loads(file.read_text(encoding="utf-8"))
        names, ids = (tuple(category[key] for category in categories) for key in ("name", "id"))
        return replace(config, categories=names, category_ids=ids, num_classes=len(categories))

    def record(self, image: Any) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S], of which `size` [2] (height, width) is picture and the rest
        padding; `original` [2], its own size.

        For training what is seen of its objects: `boxes` [n, 4], `labels` [n], and `masks` uint8
        [n, *size] where they are learnt.
        Crowd regions teach nothing, nor do objects without an outline where outlines are learnt.
        Without: a view, `image@S` and
        `size@S`, for each further test size.
        """
        image, config = open_image(record["image"]), self.config
        side = config.image.image_size
        example: Example = {"id": str(record["id"]), "original": torch.tensor(image.shape[1:])}
        if train:
            objects = self.objects(record)
            view, seen = large_scale_jitter(
                image,
                objects,
                rng or make_record_rng(record),
                size=side,
                scale=config.scale,
                flip=config.flip,
            )
            return example | _padded(view, side) | _seen(seen)
        for size in self.sizes:
            view = replace(config.image, image_size=size).preprocess(image)
            example |= {
                f"{name}{_at(size, side)}": value for name, value in _padded(view, size).items()
            }
        return example

    def objects(self, record: Record) -> ObjectAnnotations:
        """What a record's picture teaches; ValueError where it says nothing of objects, or of masks
        that are to be learnt."""
        if "objects" not in record:
            raise ValueError(
                f"record {record['id']} says nothing of objects: train on a split that has them"
            )
        known = [each for each in record["objects"] if not each["crowd"]]
        if self.config.detector.masks and known:
            known = [each for each in known if each.get("segmentation")]
            if not known:
                raise ValueError(
                    f"record {record['id']} has boxes without outlines: learn boxes alone, "
                    "--task.detector.masks False"
                )
        boxes = torch.tensor([each["box"] for each in known], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([int(each["label"]) for each in known], dtype=torch.int64)
        if (
            len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.config.num_classes
        ):
            raise ValueError(
                f"one of the labels {labels.tolist()[:20]} is none of the "
                f"{self.config.num_classes} categories: prepare again"
            )
        boxes[:, 2:] += boxes[:, :2]
        outlines = [each["segmentation"] for each in known] if self.config.detector.masks else None
        return ObjectAnnotations(boxes, labels, outlines)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Objects of all images one after the other, `counts` [B] of each; masks [N, H, W] with H,
        W the largest size here."""
        ragged = ("boxes", "labels", "masks")
        batch = super().collate(
            [
                {key: value for key, value in example.items() if key not in ragged}
                for example in examples
            ]
        )
        if "boxes" not in examples[0]:
            return batch
        batch |= {key: torch.cat([example[key] for example in examples]) for key in ragged[:2]}
        batch["counts"] = torch.tensor([len(example["labels"]) for example in examples])
        if "masks" in examples[0]:
            height, width = batch["size"].amax(0).tolist()
            batch["masks"] = torch.zeros(len(batch["labels"]), height, width, dtype=torch.uint8)
            for room, example in zip(
                batch["masks"].split(batch["counts"].tolist()), examples, strict=True
            ):
                room[:, : example["masks"].shape[1], : example["masks"].shape[2]] = example["masks"]
        return batch

    def normalize_images(self, batch: Batch, at: str = "") -> Tensor:
        """Those of every task, with zeros, the mean color, in the padding; `at`: of a further test
        size, "@1280"."""
        return clear_padding(
            super().normalize_images({"image": batch[f"image{at}"]}), batch[f"size{at}"]
        )

    # Training -------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Every loss is a mean over images."""
        stages = len(self.config.detector.stage_ious)
        names = [
            "rpn_objectness",
            "rpn_box",
            *(f"box{stage}_{part}" for stage in range(stages) for part in ("class", "box")),
        ]
        return dict.fromkeys(names + ["mask"] * self.config.detector.masks, len(batch["image"]))

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """The proposals', each stage's and the masks' losses, all of weight 1."""
        counts = batch["counts"].tolist()
        masks = batch["masks"].split(counts) if self.config.detector.masks else [None] * len(counts)
        targets = [
            Target(*each)
            for each in zip(
                batch["boxes"].split(counts), batch["labels"].split(counts), masks, strict=True
            )
        ]
        return {
            "losses": self.detector.losses(
                self.backbone(self.normalize_images(batch)), batch["size"], targets
            ),
            "metrics": {},
        }

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`boxes` [R, 4] and `scores` [R, C] of all images before any NMS, one after the other,
        `counts` [B] of each."""
        found = self.detector.detect(
            self.detector.pyramid(self.backbone(self.normalize_images(batch))), batch["size"]
        )
        return {
            "boxes": torch.cat([each.boxes for each in found]),
            "scores": torch.cat([each.scores for each in found]),
            "counts": torch.tensor([len(each.boxes) for each in found]),
        }

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """`objects`, best first: `box` [x, y, w, h] in the picture's own pixels, `label`, `name`,
        `score`, and `mask`, an RLE."""
        views = []
        for size in self.sizes:
            at = _at(size, self.config.image.image_size)
            view = ImageView(self.normalize_images(batch, at), batch[f"size{at}"])
            views += [view, flip_view(view)] if self.config.test_flip else [view]
        found = detect_objects(
            self.backbone, self.detector, views, batch["original"], self.config.detector
        )
        return [
            {"id": key, "height": height, "width": width, "objects": self.named(each)}
            for key, (height, width), each in zip(
                batch["id"], batch["original"].tolist(), found, strict=True
            )
        ]

    def named(self, found: Detections) -> list[dict[str, Any]]:
        """One picture's detections as JSON."""
        config, boxes = self.config, found.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        rows = []
        for place, (box, label, score) in enumerate(
            zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        ):
            row = {"box": box, "label": label, "score": score}
            row |= {"name": config.categories[label]} if config.categories else {}
            row |= {"category": config.category_ids[label]} if config.category_ids else {}
            rows.append(row | ({"mask": found.masks[place]} if found.masks is not None else {}))
        return rows

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """COCO's twelve figures of boxes, `box_ap` and so on, and of masks where both sides have
        them."""
        join_by_id(predictions, records)
        if any("objects" not in row for row in records):
            raise ValueError(
                "some of these records hold no objects to compare with: score a split that has them"
            )
        outlined = all("mask" in each for row in predictions for each in row["objects"])
        outlined = outlined and all(
            each.get("segmentation") for row in records for each in row["objects"]
        )
        kinds: tuple[IouKind, ...] = ("box", "mask") if outlined else ("box",)
        figures = {kind: compute_coco_ap(predictions, records, kind=kind) for kind in kinds}
        return {f"{kind}_{name}": figures[kind][name] for kind in kinds for name in COCO_METRICS}

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """COCO's result list."""
        rows = []
        for prediction, record in join_by_id(predictions, records):
            for each in prediction["objects"]:
                if "category" not in each:
                    raise ValueError(
                        "these weights know no category ids: fine-tune them on records of `beit3 "
                        "prepare coco`"
                    )
                row = {
                    "image_id": read_server_id(record),
                    "category_id": each["category"],
                    "bbox": each["box"],
                    "score": each["score"],
                }
                rows.append(row | ({"segmentation": each["mask"]} if "mask" in each else {}))
        return rows


def _at(size: int, usual: int) -> str:
    """What the keys of a view end in: nothing for the usual one."""
    return "" if size == usual else f"@{size}"


def _padded(view: Tensor, side: int) -> Example:
    """A view uint8 [3, h, w] in its square."""
    return {"image": pad_to_square(view, side), "size": torch.tensor(view.shape[1:])}


def _seen(seen: VisibleObjects) -> Example:
    """What a view shows, as tensors."""
    return {"boxes": seen.boxes, "labels": seen.labels} | (
        {} if seen.masks is None else {"masks": seen.masks}
    )
