"""Image-text retrieval with two encoders (paper section 3.1): an image and its caption get features that are close.

Both sides go through the backbone alone, the image on its experts and the text on its own; the class token's and the
begin mark's states are projected to unit features. Training compares every image with every text of the global batch.
Contrastive intermediate tuning (appendix) is the same on pretraining's pairs: recipes `*_itc`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.views.transforms import Preprocessing, training_view
from beit3.images import open_image
from beit3.metrics.retrieval import recall
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY, ModelConfig
from beit3.ops.losses import LOGIT_SCALE, contrastive
from beit3.ops.precision import at_least_float32
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    check_same_fields,
    experts_left_out,
    join_by_id,
    make_length_counter,
    make_record_rng,
    trim_padding,
)
from beit3.tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class RetrievalConfig(TaskConfig):
    """Pairs of an image and a caption."""

    crop: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5


def _recipe(
    model: ModelConfig,
    size: int,
    *,
    lr: float,
    layer_decay: float,
    epochs: float,
    warmup: float,
    note: str,
    drop: float = 0.2,
    batch: int = 3072,
    source: str = "main",
) -> Recipe:
    """The release's commands, and the giant's rows of the paper's appendix."""
    return Recipe(
        task=RetrievalConfig(
            model=replace(model, image_size=size, drop_path_rate=drop), image=Preprocessing(size)
        ),
        data=DataConfig(batch={source: batch}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup_epochs=warmup, layer_decay=layer_decay),
        run=RunConfig(
            epochs=epochs,
            micro_batch=32,
            checkpointing="full",
            log_every=20,
            eval_every=500,
            save_every=250,
        ),
        note=note,
    )


def _itc(model: ModelConfig, note: str) -> Recipe:
    """Appendix, contrastive intermediate tuning: 5 epochs over pretraining's pairs, one of warmup, 16,384 a step."""
    return _recipe(
        model,
        224,
        lr=3e-5,
        layer_decay=0.95,
        epochs=5,
        warmup=1,
        drop=0.3,
        batch=16_384,
        source="pairs",
        note=note,
    )


def _small(
    task: RetrievalConfig, source: str, batch: int, lr: float, steps: int, note: str
) -> Recipe:
    return Recipe(
        task=task,
        data=DataConfig(batch={source: batch}),
        optim=OptimConfig(
            lr=lr, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=steps // 10, clip=3.0
        ),
        run=RunConfig(steps=steps, log_every=10, save_every=max(1, steps // 3)),
        note=note,
    )


DEMO = RetrievalConfig(
    model=TINY, image=Preprocessing(32), text_length=20, crop=(1.0, 1.0), flip=0.0
)
LAPTOP = RetrievalConfig(model=SMALL, image=Preprocessing(112), text_length=32)


class Retrieval(Task):
    """Backbone, a projection per modality, and the temperature."""

    Config = RetrievalConfig
    sources = ("main", "pairs")
    records_from: ClassVar[Mapping[str, str]] = {"pairs": "pretrain"}
    headline = "mean_recall"
    compares_examples = True
    official_names: ClassVar[Mapping[str, str]] = {
        "image_projection": "vision_head",
        "text_projection": "language_head",
        "logit_scale": "logit_scale",
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _small(DEMO, "main", 64, 5e-4, 200, "the embedded world's captioned pictures"),
        "laptop": _small(
            LAPTOP,
            "main",
            64,
            3e-4,
            200,
            "captioned photographs on two CPU cores, from the weights of pretrain laptop",
        ),
        "laptop_itc": _small(
            LAPTOP,
            "pairs",
            64,
            5e-4,
            400,
            "the contrastive stage on pretraining's pairs, on two CPU cores",
        ),
        "base_384_coco": _recipe(
            BASE,
            384,
            lr=2e-4,
            layer_decay=0.65,
            epochs=15,
            warmup=3,
            note="release, from itc weights: image R@1 61.4, text R@1 79.1",
        ),
        "large_384_coco": _recipe(
            LARGE,
            384,
            lr=5e-5,
            layer_decay=0.85,
            epochs=15,
            warmup=3,
            note="release, from itc weights: image R@1 63.4, text R@1 82.1",
        ),
        "giant_420_coco": _recipe(
            GIANT,
            420,
            lr=1e-5,
            layer_decay=0.95,
            epochs=15,
            warmup=3,
            drop=0.3,
            note="paper: image R@1 67.2, text R@1 84.8",
        ),
        "base_384_flickr30k": _recipe(
            BASE,
            384,
            lr=1e-4,
            layer_decay=0.65,
            epochs=20,
            warmup=5,
            note="release, from itc weights: image R@1 86.2, text R@1 96.3",
        ),
        "large_384_flickr30k": _recipe(
            LARGE,
            384,
            lr=5e-5,
            layer_decay=0.85,
            epochs=20,
            warmup=5,
            note="release, from itc weights: image R@1 88.1, text R@1 97.2",
        ),
        "giant_420_flickr30k": _recipe(
            GIANT,
            420,
            lr=1e-5,
            layer_decay=0.95,
            epochs=20,
            warmup=5,
            drop=0.3,
            note="paper: image R@1 90.3, text R@1 98.0",
        ),
        "base_224_itc": _itc(
            BASE,
            "contrastive intermediate tuning with the giant's settings: the release does not tell its own",
        ),
        "large_224_itc": _itc(
            LARGE,
            "contrastive intermediate tuning with the giant's settings: the release does not tell its own",
        ),
        "giant_224_itc": _itc(
            GIANT,
            "paper: contrastive intermediate tuning; zero-shot Flickr30k image R@1 81.5, text R@1 94.9",
        ),
    }

    backbone: BEiT3

    def __init__(self, config: RetrievalConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: RetrievalConfig = config
        self.backbone = BEiT3(config.model)
        self.image_projection = nn.Linear(config.model.dim, config.model.dim, bias=False)
        self.text_projection = nn.Linear(config.model.dim, config.model.dim, bias=False)
        self.logit_scale = nn.Parameter(
            torch.empty(1)
        )  # one dimension, because FSDP2 shards no scalars

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """A text and an image never meet in one sequence."""
        return experts_left_out(self.backbone, "fusion")

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The temperature starts at the release's, and has no limit."""
        super().init_parameter(name, parameter, generator)
        if name == "logit_scale":
            parameter.fill_(LOGIT_SCALE)

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Karpathy's, COCO's or Flickr8k's files, or a table of one's own -> a record per training caption, else per image."""
        rows = formats.one_per_caption(formats.captioned(raw))
        return write_splits(
            root,
            "retrieval",
            source,
            rows,
            lengths=make_length_counter(root, RetrievalConfig.text_length),
        )

    def record(self, image: Any = None, text: str | None = None) -> Record:
        """Raw inputs -> record: an image, a text or both; None or an empty string leaves one out."""
        given = {"image": image, "text": text}
        return {"id": "0"} | {
            name: value for name, value in given.items() if value not in (None, "")
        }

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S], and `text` and `text_padding` [K, L] of its K captions, of whatever the record holds."""
        example: Example = {"id": str(record["id"])}
        if "image" in record:
            image = open_image(record["image"])
            if train:
                size, crop, flip = self.config.image.image_size, self.config.crop, self.config.flip
                image = training_view(
                    image, rng or make_record_rng(record), image_size=size, crop=crop, flip=flip
                )
            example["image"] = self.config.image.preprocess(image)
        captions = record.get("captions") or ([record["text"]] if "text" in record else [])
        if captions:
            texts = [self.tokenize_text(caption, self.config.text_length) for caption in captions]
            example["text"], example["text_padding"] = (
                torch.stack(part) for part in zip(*texts, strict=True)
            )
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Images stacked [B, 3, S, S]; all captions one after the other [T, L], `num_texts` of each record."""
        check_same_fields(examples)
        batch: Batch = {"id": [example["id"] for example in examples]}
        if "image" in examples[0]:
            batch["image"] = default_collate([example["image"] for example in examples])
        if "text" in examples[0]:
            batch |= {
                name: torch.cat([example[name] for example in examples])
                for name in ("text", "text_padding")
            }
            batch["num_texts"] = [len(example["text"]) for example in examples]
        return trim_padding(batch)

    # Training --------------------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Unit features `image_features` [B, D] and `text_features` [T, D] of whatever is present."""
        outputs = {}
        if "image" in batch:
            states = self.backbone(image=self.normalize_images(batch), read="first").first("image")
            outputs["image_features"] = F.normalize(
                at_least_float32(self.image_projection(states)), dim=-1
            )
        if "text" in batch:
            states = self.backbone(
                text=batch["text"], text_padding=batch.get("text_padding"), read="first"
            ).first("text")
            outputs["text_features"] = F.normalize(
                at_least_float32(self.text_projection(states)), dim=-1
            )
        return outputs

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """InfoNCE over the pairs of all processes (release; unclamped temperature)."""
        images, texts = features["image_features"], features["text_features"]
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images and {len(texts)} texts: training needs one caption a record"
            )
        loss, right = contrastive(images, texts, at_least_float32(self.logit_scale).exp())
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": right}}

    # Inference -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Unit features as arrays: `image` [D] and `texts` [K, D] of whatever is present."""
        outputs = {
            name: values.detach().float().cpu() for name, values in self.outputs(batch).items()
        }
        predictions: list[Prediction] = [{"id": key} for key in batch["id"]]
        for name, each in zip(("image", "texts"), ("image_features", "text_features"), strict=True):
            if each in outputs:
                counts = [1] * len(predictions) if name == "image" else batch["num_texts"]
                for prediction, rows in zip(predictions, outputs[each].split(counts), strict=True):
                    prediction[name] = (rows[0] if name == "image" else rows).numpy()
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways, over distinct images: records of one `image_id` are one image."""
        pairs = join_by_id(predictions, records)
        place: dict[str, int] = {}
        images: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        owner: list[int] = []
        for prediction, record in pairs:
            if "image" not in prediction or "texts" not in prediction:
                raise ValueError(
                    f"record {record['id']} lacks an image or captions: recall needs both"
                )
            key = str(record["image_id"] if "image_id" in record else record["image"])
            if key not in place:
                place[key] = len(images)
                images.append(np.asarray(prediction["image"], dtype=np.float32))
            rows = np.asarray(prediction["texts"], dtype=np.float32)
            texts.append(rows)
            owner += [place[key]] * len(rows)
        return recall(np.stack(images), np.concatenate(texts), np.array(owner))
