"""Object detection and instance segmentation on COCO (paper section 3.2 and table 7), and detection
on Objects365.

The image side of BEiT-3 with window attention, ViTDet's pyramid, a cascade of three box heads and a
mask head. These weights were never released. Width, schedule and batch size of the giant are the
paper's (appendix, tables 15 and 16); what the paper does not state is taken from ViTDet and EVA
(docs/dense.md lists it). A record has an image and its objects: a box [x, y, w, h] in pixels, a
label, and polygons or an RLE.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.prepare.formats.detect import read_instances
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.predictions import DETECTIONS
from beit3.data.stores.record_fields import FILE, OBJECTS, PURPOSES, FieldKind, Purpose, RecordField
from beit3.data.stores.split_files import locate_split
from beit3.data.views.jitter import large_scale_jitter, pad_to_square
from beit3.data.views.preprocessing import (
    IMAGENET_MEAN_STD,
    VL_MEAN_STD,
    Preprocessing,
    clear_padding,
)
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.inference import ImageView, detect_objects, flip_view
from beit3.detection.records import (
    collate_objects,
    format_coco_results,
    format_detections,
    has_objects,
    read_objects,
    split_targets,
)
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
"""File beside the records: [{"id", "name"}] in the order of the labels."""


@dataclass(frozen=True)
class CocoConfig(TaskConfig):
    """Settings of detection. Sizes are in pixels."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(1024, *IMAGENET_MEAN_STD, resize="fit")
    """`image_size` is the side of the square into which images are fitted, in training and at
    evaluation."""
    detector: DetectorConfig = DetectorConfig()
    categories: tuple[str, ...] = ()
    """Names of the labels; empty = taken from the records."""
    category_ids: tuple[int, ...] = ()
    """The dataset's own ids of the labels, which its evaluation server expects."""
    num_classes: int = 80
    window: int = 16
    """Side, in patches, of the windows within which most blocks attend; 0 = global attention."""
    num_global: int = 4
    """Number of evenly spaced blocks with global attention if there are windows."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of the factor by which large-scale jitter scales images that fit the square."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    test_sizes: tuple[int, ...] = ()
    """Sides of additional squares for multi-scale evaluation; their detections are merged."""
    test_flip: bool = False
    """Whether evaluation adds a flipped view of each size."""
    resize_patch: bool = False
    """Whether to start from weights of another patch size and resample their patch kernel."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.categories

    @property
    def base_depth(self) -> int:
        return max(2, self.num_global)


# Recipes ------------------------------------------------------------------------------------------


def _make_full_size_recipe(
    task: CocoConfig, *, lr: float, layer_decay: float, epochs: float, note: str
) -> Recipe:
    """Returns a recipe with ViTDet's settings (its release): batch 64, two drops of the learning
    rate, no gradient clipping."""
    return Recipe(
        task=task,
        data=DataConfig(batch={"main": 64}, workers=8),
        optim=OptimConfig(
            lr=lr,
            min_lr=0.0,
            weight_decay=0.1,
            warmup_steps=250,
            schedule="steps",
            layer_decay=layer_decay,
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


def _make_vitdet_recipe(
    model: ModelConfig, *, drop_path_rate: float, layer_decay: float, note: str
) -> Recipe:
    model = replace(model, drop_path_rate=drop_path_rate, final_norm=False)
    return _make_full_size_recipe(
        CocoConfig(model=model), lr=1e-4, layer_decay=layer_decay, epochs=100, note=note
    )


def _make_giant_recipe(
    size: int, *, lr: float, epochs: float, detector: DetectorConfig, note: str
) -> Recipe:
    """Returns a recipe for the paper's giant (tables 15 and 16) with patches of 16 instead of 14
    pixels."""
    task = CocoConfig(
        model=replace(GIANT, patch_size=16, drop_path_rate=0.6, final_norm=False),
        image=Preprocessing(size, *IMAGENET_MEAN_STD, resize="fit"),
        detector=detector,
        resize_patch=True,
    )
    return _make_full_size_recipe(task, lr=lr, layer_decay=0.9, epochs=epochs, note=note)


def _make_cpu_recipe(
    model: ModelConfig, size: int, *, detector: DetectorConfig, batch: int, note: str
) -> Recipe:
    """Returns a recipe for training on a CPU."""
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
        run=RunConfig(steps=400, log_every=10, save_every=100),
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


# Task ---------------------------------------------------------------------------------------------


class Coco(Task):
    """Detects objects with a windowed trunk and a detector."""

    Config = CocoConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        # Images without objects belong to a val split, and are left out of training.
        "objects": RecordField(
            OBJECTS, needed_for=("train", "score"), may_be_empty_for=("train", "score")
        ),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"objects": DETECTIONS}
    headline = "box_ap"
    names_file = CATEGORIES_FILE
    left_out_reason = "they have no objects"
    unused_parameters: ClassVar[Mapping[str, str]] = {
        f"backbone.{name}": reason for name, reason in ImageTrunk.unused_parameters.items()
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _make_cpu_recipe(
            TINY,
            64,
            detector=_DEMO,
            batch=16,
            note="the embedded world's shapes, in minutes on two CPU cores",
        ),
        "laptop": _make_cpu_recipe(
            SMALL, 320, detector=_LAPTOP, batch=4, note="photographs on two CPU cores"
        ),
        "base_1024": _make_vitdet_recipe(
            BASE,
            drop_path_rate=0.1,
            layer_decay=0.7,
            note="ViTDet's settings for the released base; of MAE's: box AP 54.0, mask AP 46.7",
        ),
        "large_1024": _make_vitdet_recipe(
            LARGE,
            drop_path_rate=0.4,
            layer_decay=0.8,
            note="the same for large; of MAE's: 57.6, 50.0",
        ),
        "giant_1024_objects365": _make_giant_recipe(
            1024,
            lr=1e-4,
            epochs=15,
            detector=DetectorConfig(masks=False),
            note="paper: the Objects365 stage, boxes alone",
        ),
        "giant_1280": _make_giant_recipe(
            1280,
            lr=5e-5,
            epochs=20,
            detector=DetectorConfig(),
            note="paper, from giant_1024_objects365: test-dev box AP 63.7, mask AP 54.8",
        ),
    }

    backbone: ImageTrunk

    def __init__(self, config: CocoConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: CocoConfig = config
        self._check_config()
        self.backbone = ImageTrunk(config.model, window=config.window, num_global=config.num_global)
        self.detector = Detector(
            config.model.dim,
            patch_size=config.model.patch_size,
            num_classes=config.num_classes,
            config=config.detector,
        )

    def _check_config(self) -> None:
        config = self.config
        if config.image.resize != "fit":
            raise ValueError(
                f"task.image.resize {config.image.resize}: detection fits entire images into a "
                "square, give fit"
            )
        if config.categories and len(config.categories) != config.num_classes:
            raise ValueError(
                f"{len(config.categories)} categories for {config.num_classes} classes: give the "
                "list of these weights"
            )
        patch_size = config.model.patch_size
        for size in self.sizes:
            if size % patch_size:
                raise ValueError(
                    f"image size {size} px is no multiple of the {patch_size} px patch: give one "
                    "that is"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the squares of evaluation without duplicates, that of training first."""
        return tuple(dict.fromkeys((self.config.image.image_size, *self.config.test_sizes)))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initializes the detector by its own rules, everything else as in every task."""
        if name.startswith("detector."):
            self.detector.init_parameter(name.removeprefix("detector."), parameter, generator)
        else:
            super().init_parameter(name, parameter, generator)

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts the files of COCO, Objects365, LVIS, Roboflow, Label Studio or Pascal VOC to
        records and a list of categories.

        `bad_share` is the largest fraction of images that may be missing or unreadable; copies of
        Objects365 are seldom complete.
        """
        repairs: Counter[str] = Counter()
        categories, rows = read_instances(raw, repaired=repairs)
        num_empty = 0

        def count_empty() -> Iterator[tuple[str, Record]]:
            nonlocal num_empty
            for split, record in rows:
                num_empty += split == "train" and "fault" not in record and not has_objects(record)
                yield split, record

        report = dict(write_splits(root, "coco", source, count_empty(), bad_share=bad_share))
        write_text(
            root / "coco" / source / CATEGORIES_FILE,
            json.dumps(categories, indent=1, ensure_ascii=False) + "\n",
        )
        report["categories"] = len(categories)
        if num_empty:
            report["left out of training, without objects"] = num_empty
        report |= {f"repaired: {kind}": count for kind, count in sorted(repairs.items())}
        return report

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Sets the categories to those beside the records."""
        assert isinstance(config, CocoConfig)
        file = locate_split(root, "coco", "main", "train").with_name(CATEGORIES_FILE)
        if not file.is_file():
            raise ValueError(f"no categories at {file}: run beit3 prepare coco again")
        categories = json.loads(file.read_text(encoding="utf-8"))
        names, ids = (tuple(category[key] for category in categories) for key in ("name", "id"))
        return replace(config, categories=names, category_ids=ids, num_classes=len(categories))

    @staticmethod
    def find_record_fault(record: Record, purpose: Purpose, config: TaskConfig | None) -> str:
        """Finds objects of a category that the network does not have."""
        if purpose == "predict" or not isinstance(config, CocoConfig):
            return ""
        for item in record["objects"]:
            if item["label"] >= config.num_classes:
                return (
                    f"field objects has label {item['label']}, not below the {config.num_classes} "
                    "categories"
                )
        return ""

    @staticmethod
    def trains_on(record: Record) -> bool:
        """Returns whether a record has objects, as detectron2's training requires by default."""
        return has_objects(record)

    def record(self, image: Any) -> Record:
        """Returns a record of an image that `open_image` reads."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns an image in a square, and for training its objects.

        `image` is uint8 [3, S, S], padded at the bottom and on the right; `size` [2] is the height
        and width without padding, `original` [2] those of the image itself. Training adds the
        visible objects: `boxes` [n, 4], `labels` [n] and, with masks, `masks` uint8 [n, *size].
        Evaluation adds `image@S` and `size@S` for each further test size S.
        """
        image, config = open_image(record["image"]), self.config
        train_size = config.image.image_size
        example: Example = {"id": str(record["id"]), "original": torch.tensor(image.shape[1:])}
        if train:
            annotations = read_objects(
                record, num_classes=config.num_classes, masks=config.detector.masks
            )
            crop, visible = large_scale_jitter(
                image,
                annotations,
                rng or make_record_rng(record),
                size=train_size,
                scale=config.scale,
                flip=config.flip,
            )
            example |= _pad_image(crop, train_size)
            example |= {"boxes": visible.boxes, "labels": visible.labels}
            return example if visible.masks is None else example | {"masks": visible.masks}
        for size in self.sizes:
            resized = replace(config.image, image_size=size).preprocess(image)
            suffix = self._get_key_suffix(size)
            for name, value in _pad_image(resized, size).items():
                example[f"{name}{suffix}"] = value
        return example

    def _get_key_suffix(self, size: int) -> str:
        """Returns what an example's keys end in for a test size: "" for that of training."""
        return "" if size == self.config.image.image_size else f"@{size}"

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stacks the images and concatenates the objects, as `collate_objects` documents."""
        object_keys = ("boxes", "labels", "masks")
        batch = super().collate(
            [
                {key: value for key, value in example.items() if key not in object_keys}
                for example in examples
            ]
        )
        return batch | collate_objects(examples) if "boxes" in examples[0] else batch

    def normalize_images(self, batch: Batch, suffix: str = "") -> Tensor:
        """Normalizes the images and sets their padding to zero, which is the mean color.

        `suffix` selects a further test size, as "@1280".
        """
        pixels = super().normalize_images({"image": batch[f"image{suffix}"]})
        return clear_padding(pixels, batch[f"size{suffix}"])

    # Training -------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Returns the number of images for every loss, because each is a mean over images."""
        names = ["rpn_objectness", "rpn_box"]
        for stage in range(len(self.config.detector.stage_ious)):
            names += [f"box{stage}_class", f"box{stage}_box"]
        if self.config.detector.masks:
            names.append("mask")
        return dict.fromkeys(names, len(batch["image"]))

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Returns the losses of the proposals, of each stage and of the masks, all of weight 1."""
        features = self.backbone(self.normalize_images(batch))
        targets = split_targets(batch, masks=self.config.detector.masks)
        losses = self.detector.compute_losses(features, batch["size"], targets)
        return {"losses": losses, "metrics": {}}

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the boxes of all images before NMS.

        They are concatenated: `boxes` [R, 4], `scores` [R, C], and `counts` [B] per image.
        """
        maps = self.detector.pyramid(self.backbone(self.normalize_images(batch)))
        predictions = self.detector.predict_boxes(maps, batch["size"])
        return {
            "boxes": torch.cat([predicted.boxes for predicted in predictions]),
            "scores": torch.cat([predicted.scores for predicted in predictions]),
            "counts": torch.tensor([len(predicted.boxes) for predicted in predictions]),
        }

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the detected objects of each image, best first, as `format_detections` has them.

        Boxes and masks are in the pixels of the image itself.
        """
        config = self.config
        views = []
        for size in self.sizes:
            suffix = self._get_key_suffix(size)
            view = ImageView(self.normalize_images(batch, suffix), batch[f"size{suffix}"])
            views += [view, flip_view(view)] if config.test_flip else [view]
        detections = detect_objects(
            self.backbone, self.detector, views, batch["original"], config.detector
        )
        predictions = []
        sizes = batch["original"].tolist()
        for key, (height, width), detected in zip(batch["id"], sizes, detections, strict=True):
            objects = format_detections(
                detected, categories=config.categories, category_ids=config.category_ids
            )
            predictions.append({"id": key, "height": height, "width": width, "objects": objects})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns COCO's twelve scores of boxes, `box_ap` and so on, and of masks.

        Masks are scored if all predicted and annotated objects have them.
        """
        join_by_id(predictions, records)
        if any("objects" not in record for record in records):
            raise ValueError(
                "some of these records hold no objects to compare with: score a split that has them"
            )
        predicted = [item for prediction in predictions for item in prediction["objects"]]
        annotated = [item for record in records for item in record["objects"]]
        kinds: list[IouKind] = ["box"]
        if all("mask" in item for item in predicted) and all(
            item.get("segmentation") for item in annotated
        ):
            kinds.append("mask")
        scores: dict[str, float] = {}
        for kind in kinds:
            metrics = compute_coco_ap(predictions, records, kind=kind)
            scores |= {f"{kind}_{name}": metrics[name] for name in COCO_METRICS}
        return scores

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """Returns the predictions in COCO's results format."""
        results = []
        for prediction, record in join_by_id(predictions, records):
            if prediction["objects"]:
                results += format_coco_results(prediction, read_server_id(record))
        return results


def _pad_image(image: Tensor, size: int) -> Example:
    """Returns an image uint8 [3, h, w] padded to a square, and its `size` [2] without padding."""
    return {"image": pad_to_square(image, size), "size": torch.tensor(image.shape[1:])}
