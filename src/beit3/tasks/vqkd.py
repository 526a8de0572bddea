"""The visual tokenizer as a task: vector-quantised knowledge distillation (BEiT v2, section 3.1).

An encoder names each patch by a code, a decoder predicts a frozen teacher's feature of every patch
from the codes
alone. Pixels come in [0, 1]: the network itself maps them to [-1, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.stores.shard_writer import write_shards
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import make_two_views
from beit3.images import open_image
from beit3.ops.precision import promote_to_float32
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.seeding import make_generator
from beit3.task import Batch, Example, Prediction, Record, Task, join_by_id, make_record_rng
from beit3.tokenizer.teacher import BackboneTeacher, Teacher, load_teacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig
from beit3.tokenizer.vit import compute_patch_grid
from beit3.weights.loading import load_backbone


def unit(image_size: int) -> Preprocessing:
    """Pixels in [0, 1]: the network itself maps them to [-1, 1]."""
    return Preprocessing(image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class VQKDConfig(TaskConfig):
    """Defaults are BEiT v2's (its table on tokenizer training)."""

    model: VisualTokenizerConfig = VisualTokenizerConfig(
        224, 16, 768, 12, 12, 3072, 3, 32, 8192, 512
    )  # type: ignore[assignment]
    image: Preprocessing = unit(224)
    teacher: Literal["gradients", "clip", "dino", "beit3"] = "clip"
    teacher_weights: str = ""
    """Local weights of a CLIP, DINO or BEiT-3 teacher; only training reads them."""
    crop: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5


class VQKD(Task):
    """Encoder, codebook, decoder; the teacher is built when training first asks for it."""

    Config = VQKDConfig
    backbone: VisualTokenizer
    headline = "score"
    frozen = ("teacher",)
    updates_buffers = True
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": Recipe(
            task=VQKDConfig(
                teacher="gradients",
                model=VisualTokenizerConfig(32, 8, 96, 2, 4, 384, 1, 16, 64, 45, revive_after=20),
                image=unit(32),
                crop=(1.0, 1.0),
                flip=0.0,
            ),
            data=DataConfig(batch={"main": 64}),
            optim=OptimConfig(
                lr=1e-3, min_lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=20
            ),
            run=RunConfig(steps=400, log_every=10, save_every=100),
            note="the embedded world; teacher: colour and gradient statistics, no weights needed",
        ),
        "laptop": Recipe(
            task=VQKDConfig(
                teacher="gradients",
                model=VisualTokenizerConfig(
                    112, 16, 128, 3, 4, 512, 1, 16, 256, 45, revive_after=20
                ),
                image=unit(112),
                crop=(0.4, 1.0),
            ),
            data=DataConfig(batch={"main": 64}),
            optim=OptimConfig(
                lr=1e-3, min_lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=50
            ),
            run=RunConfig(steps=800, log_every=20, save_every=200),
            note="photographs on two CPU cores in about 5 minutes; teacher: colour and gradient statistics",
        ),
        "gpu_hour": Recipe(
            task=VQKDConfig(
                teacher="gradients",
                model=VisualTokenizerConfig(
                    224, 16, 384, 6, 6, 1536, 1, 32, 1024, 45, revive_after=100
                ),
                image=unit(224),
                crop=(0.2, 1.0),
            ),
            data=DataConfig(batch={"main": 512}, workers=14),
            optim=OptimConfig(
                lr=1e-3, min_lr=1e-5, betas=(0.9, 0.99), weight_decay=1e-4, warmup_steps=200
            ),
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
            note="BEiT v2's tokenizer: CLIP ViT-B/16 teacher, 8192 codes of 32, three decoder layers, ImageNet-1k",
        ),
    }

    def __init__(self, config: VQKDConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config)
        self.config: VQKDConfig = config
        self.backbone = VisualTokenizer(config.model)
        self.teacher: Teacher | None = None

    def init_weights(self, seed: int = 0) -> None:
        """BEiT's initial values; the codebook's directions are drawn too, until k-means replaces
        them."""
        super().init_weights(seed)
        self.backbone.quantizer.init_weights(make_generator(seed, "quantizer.codebook"))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        self.backbone.init_parameter(name.removeprefix("backbone."), parameter, generator)

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """A folder of images, with `train` and `val` below it or split by name; or tars of
        images."""
        if formats.lies_in_tars(raw, captions=False):
            return write_shards(root, "vqkd", source, raw, captions=False)
        return write_splits(root, "vqkd", source, formats.images(raw))

    def record(self, image: str) -> Record:
        return {"id": str(image), "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`token_image` uint8 [3, S, S]."""
        config = self.config
        view, _ = make_two_views(
            open_image(record["image"]),
            rng or make_record_rng(record),
            image_size=config.image.image_size,
            token_size=config.image.image_size,
            scale=config.crop if train else (1.0, 1.0),
            hflip=config.flip if train else 0.0,
            color_jitter=0.0,
        )
        return {"id": str(record["id"]), "token_image": view}

    # Training -------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """One reconstruction and one commitment per patch."""
        patches = len(self.normalize_images(batch)) * self.config.model.encoder.num_patches
        return {"reconstruction": patches, "commitment": patches}

    def normalize_images(self, batch: Batch) -> Tensor:
        """Bytes, or floats in [0, 1], which tokenizer and teachers take alike; `image` serves where
        there is no separate `token_image`."""
        return batch["token_image"] if "token_image" in batch else batch["image"]

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cosine distance to the teacher, and the commitment of the encoder to its codes."""
        images = self.normalize_images(batch)
        features, commitment, codes = self.backbone(images)
        distance = 1 - F.cosine_similarity(
            promote_to_float32(features), self.ask_teacher(images), dim=-1
        )
        count = codes.numel()
        statistics = {
            "codebook_use": self.backbone.quantizer.compute_usage(),
            "perplexity": self.backbone.quantizer.compute_perplexity(),
        }
        return {
            "losses": {"reconstruction": distance.sum(), "commitment": commitment * count},
            "metrics": {
                f"reconstruction/{name}": value * count for name, value in statistics.items()
            },
        }

    def ask_teacher(self, images: Tensor) -> Tensor:
        """The teacher's features [B, P, F]; it is read when first asked. ValueError where it does
        not fit the config."""
        if self.teacher is None:
            config = self.config
            if config.teacher == "beit3":
                teacher: Teacher = BackboneTeacher(
                    load_backbone(config.teacher_weights), patch_size=config.model.patch_size
                )
            else:
                teacher = load_teacher(
                    config.teacher,
                    path=config.teacher_weights or None,
                    patch_size=config.model.patch_size,
                )
            if teacher.dim != config.model.teacher_dim:
                raise ValueError(
                    f"task.model.teacher_dim is {config.model.teacher_dim}, the {config.teacher} "
                    f"teacher has {teacher.dim}"
                )
            self.teacher = teacher.to(images.device)
        return self.teacher.extract_features(images)

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`codes` [B, P] int64."""
        return {"codes": self.backbone.tokenize(self.normalize_images(batch))}

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """The codes of each image, and with a teacher at hand the distance to it."""
        codes = self.outputs(batch)["codes"]
        size = self.config.model.num_codes
        predictions = [
            {"id": key, "codes": row, "num_codes": size}
            for key, row in zip(batch["id"], codes.tolist(), strict=True)
        ]
        if self.teacher is not None or self.config.teacher == "gradients":
            features = self.ask_teacher(self.normalize_images(batch))
            grid = compute_patch_grid(self.normalize_images(batch), self.config.model.patch_size)
            distance = 1 - F.cosine_similarity(
                promote_to_float32(self.backbone.decode(codes, grid)), features, dim=-1
            ).mean(1)
            for prediction, value in zip(predictions, distance.tolist(), strict=True):
                prediction["distance"] = value
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Share of the codebook in use and perplexity of the codes; where a teacher was at hand,
        `score` = 1 - distance to it."""
        pairs = [prediction for prediction, _ in join_by_id(predictions, records)]
        num_codes = pairs[0]["num_codes"]
        counts = np.bincount(np.concatenate([p["codes"] for p in pairs]), minlength=num_codes)
        shares = counts[counts > 0] / counts.sum()
        scores = {
            "codebook_use": float((counts > 0).mean()),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
            "num_codes": float(num_codes),
        }
        if "distance" in pairs[0]:
            scores["distance"] = float(np.mean([p["distance"] for p in pairs]))
            scores["score"] = 1 - scores["distance"]
        return scores
