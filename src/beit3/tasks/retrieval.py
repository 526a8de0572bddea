"""Image-text retrieval with a dual encoder (paper section 3.1).

The image goes through the backbone alone, on its own experts, and so does the text. The states of
the class token and of BOS are projected to unit features, which are close for an image and its
caption. Training compares every image with every text of the global batch.

Contrastive intermediate tuning (appendix) is the same on pretraining's pairs: recipes `*_itc`.

With `matching` the same network also reads an image and a text in one sequence and tells whether
they belong together, which re-ranks what the features found: recipes `*_matching`. Its negatives
are drawn by the features' own similarities, as in ALBEF (Li et al. 2021, arXiv:2107.07651, section
3.2) and VLMo (Bao et al. 2022, arXiv:2111.02358, section 3.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from beit3.data.batches import check_same_fields, trim_padding
from beit3.data.prepare.formats.captions import split_by_caption
from beit3.data.prepare.formats.detect import read_captioned_images
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.predictions import VECTOR, VECTORS
from beit3.data.stores.record_fields import (
    FILE,
    ID,
    PURPOSES,
    TEXT_OR_IDS,
    TEXTS_OR_IDS,
    FieldKind,
    RecordField,
)
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.images import open_image
from beit3.metrics.retrieval import compute_recall
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.ops.losses import INIT_LOGIT_SCALE, compute_similarities, contrastive_loss
from beit3.ops.negatives import draw_negatives
from beit3.ops.precision import promote_to_float32
from beit3.recipe import (
    DataConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    TaskConfig,
    check_numbers,
)
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_by_id,
    make_length_counter,
    make_record,
    make_record_rng,
)
from beit3.tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class RetrievalConfig(TaskConfig):
    """Settings of the random crops and flips of training."""

    crop: tuple[float, float] = (0.5, 1.0)
    """Fraction of the area that the random crop keeps."""
    flip: float = 0.5
    matching: bool = False
    """Whether there is a head that judges an image and a text in one sequence."""
    matching_negatives: int = 1
    """Wrong texts of each image, and wrong images of each text, that train this head."""
    matching_hardness: float = 1.0
    """Factor of the similarities by which they are drawn: 1 = as the contrastive loss takes them,
    0 = all alike."""
    matching_weight: float = 1.0
    """Weight of this head's loss beside the contrastive one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("task", self, matching_negatives=1, matching_hardness=0, matching_weight=0)


# Recipes ---------------------------------------------------------------------------------------


def _make_recipe(
    model: ModelConfig,
    image_size: int,
    *,
    lr: float,
    layer_decay: float,
    epochs: float,
    warmup_epochs: float,
    note: str,
    drop_path_rate: float = 0.2,
    batch: int = 3072,
    source: str = "main",
    matching: bool = False,
) -> Recipe:
    """The release's commands, and the giant's rows of the paper's appendix."""
    model = replace(model, image_size=image_size, drop_path_rate=drop_path_rate)
    return Recipe(
        task=RetrievalConfig(model=model, image=Preprocessing(image_size), matching=matching),
        data=DataConfig(batch={source: batch}, workers=8),
        optim=OptimConfig(
            lr=lr, weight_decay=0.05, warmup_epochs=warmup_epochs, layer_decay=layer_decay
        ),
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


def _make_itc_recipe(model: ModelConfig, note: str) -> Recipe:
    """Contrastive intermediate tuning (appendix): 5 epochs of pretraining's pairs, batch 16,384."""
    return _make_recipe(
        model,
        224,
        lr=3e-5,
        layer_decay=0.95,
        epochs=5,
        warmup_epochs=1,
        drop_path_rate=0.3,
        batch=16_384,
        source="pairs",
        note=note,
    )


def _make_small_recipe(
    task: RetrievalConfig,
    source: str,
    *,
    lr: float,
    steps: int,
    note: str,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> Recipe:
    return Recipe(
        task=task,
        data=DataConfig(batch={source: 64}),
        optim=OptimConfig(
            name=optimizer,
            lr=lr,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            warmup_steps=steps // 10,
            clip=3.0,
        ),
        run=RunConfig(steps=steps, log_every=10, save_every=max(1, steps // 3)),
        note=note,
    )


_DEMO_TASK = RetrievalConfig(
    model=TINY, image=Preprocessing(32), text_length=20, crop=(1.0, 1.0), flip=0.0
)
_LAPTOP_TASK = RetrievalConfig(model=SMALL, image=Preprocessing(112), text_length=32)

# Measured on the embedded world: with weight 1 the head still answered all pairs alike after 200
# steps, because the gradients of the projections were 15 times its own.
_SMALL_MATCHING: dict[str, Any] = {
    "matching": True,
    "matching_hardness": 0.5,
    "matching_weight": 5.0,
}

_RELEASED_ITC_NOTE = (
    "contrastive intermediate tuning with the giant's settings: the release does not tell its own"
)


class Retrieval(Task):
    """The backbone, a projection per modality, and the temperature."""

    Config = RetrievalConfig
    sources = ("main", "pairs")
    records_from: ClassVar[Mapping[str, str]] = {"pairs": "pretrain"}
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "text": RecordField(TEXT_OR_IDS, needed_for=("train",)),
        "captions": RecordField(
            TEXTS_OR_IDS, needed_for=("score",), refused_for=("train",), alternative="text"
        ),
        "image_id": RecordField(ID),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"image": VECTOR, "texts": VECTORS}
    headline = "mean_recall"
    compares_examples = True
    released_names: ClassVar[Mapping[str, str]] = {
        "image_projection": "vision_head",
        "text_projection": "language_head",
        "logit_scale": "logit_scale",
    }
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _make_small_recipe(
            _DEMO_TASK,
            "main",
            lr=2e-3,
            steps=200,
            note="the embedded world's captioned pictures",
            optimizer="muon",
        ),
        "demo_itc": _make_small_recipe(
            _DEMO_TASK,
            "pairs",
            lr=2e-3,
            steps=300,
            note="the contrastive stage on pretraining's pairs, from the weights of pretrain demo",
            optimizer="muon",
        ),
        "laptop": _make_small_recipe(
            _LAPTOP_TASK,
            "main",
            lr=3e-4,
            steps=200,
            note="captioned photographs on two CPU cores, from the weights of pretrain laptop",
        ),
        "laptop_itc": _make_small_recipe(
            _LAPTOP_TASK,
            "pairs",
            lr=5e-4,
            steps=400,
            note="the contrastive stage on pretraining's pairs, on two CPU cores",
        ),
        "demo_matching": _make_small_recipe(
            replace(_DEMO_TASK, **_SMALL_MATCHING),
            "main",
            lr=1e-3,
            steps=200,
            note="the same with the matching head, from the weights of pretrain demo_pairs",
        ),
        "laptop_matching": _make_small_recipe(
            replace(_LAPTOP_TASK, **_SMALL_MATCHING),
            "main",
            lr=5e-4,
            steps=200,
            note="laptop with the matching head, from the weights of pretrain laptop",
        ),
        "base_384_coco": _make_recipe(
            BASE,
            384,
            lr=2e-4,
            layer_decay=0.65,
            epochs=15,
            warmup_epochs=3,
            note="release, from itc weights: image R@1 61.4, text R@1 79.1",
        ),
        "large_384_coco": _make_recipe(
            LARGE,
            384,
            lr=5e-5,
            layer_decay=0.85,
            epochs=15,
            warmup_epochs=3,
            note="release, from itc weights: image R@1 63.4, text R@1 82.1",
        ),
        "giant_420_coco": _make_recipe(
            GIANT,
            420,
            lr=1e-5,
            layer_decay=0.95,
            epochs=15,
            warmup_epochs=3,
            drop_path_rate=0.3,
            note="paper: image R@1 67.2, text R@1 84.8",
        ),
        "base_384_flickr30k": _make_recipe(
            BASE,
            384,
            lr=1e-4,
            layer_decay=0.65,
            epochs=20,
            warmup_epochs=5,
            note="release, from itc weights: image R@1 86.2, text R@1 96.3",
        ),
        "large_384_flickr30k": _make_recipe(
            LARGE,
            384,
            lr=5e-5,
            layer_decay=0.85,
            epochs=20,
            warmup_epochs=5,
            note="release, from itc weights: image R@1 88.1, text R@1 97.2",
        ),
        "giant_420_flickr30k": _make_recipe(
            GIANT,
            420,
            lr=1e-5,
            layer_decay=0.95,
            epochs=20,
            warmup_epochs=5,
            drop_path_rate=0.3,
            note="paper: image R@1 90.3, text R@1 98.0",
        ),
        "base_384_coco_matching": _make_recipe(
            BASE,
            384,
            lr=2e-4,
            layer_decay=0.65,
            epochs=15,
            warmup_epochs=3,
            matching=True,
            note="ours: base_384_coco with the matching head, from itc weights",
        ),
        "base_224_itc": _make_itc_recipe(BASE, _RELEASED_ITC_NOTE),
        "large_224_itc": _make_itc_recipe(LARGE, _RELEASED_ITC_NOTE),
        "giant_224_itc": _make_itc_recipe(
            GIANT,
            "paper: contrastive intermediate tuning; zero-shot Flickr30k image R@1 81.5, "
            "text R@1 94.9",
        ),
    }

    backbone: BEiT3

    def __init__(self, config: RetrievalConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: RetrievalConfig = config
        dim = config.model.dim
        self.backbone = BEiT3(config.model)
        self.image_projection = nn.Linear(dim, dim, bias=False)
        self.text_projection = nn.Linear(dim, dim, bias=False)
        # Of one dimension, because FSDP2 shards no scalars.
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.has_matching_head = config.matching
        self.matching_head = nn.Linear(dim, 1) if config.matching else None

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """A text and an image meet in one sequence for the matching head alone."""
        fused = [(IMAGE, TEXT)] if self.config.matching else []
        return self.find_unused_in_backbone((IMAGE,), (TEXT,), *fused)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Starts the temperature at the release's value; it has no limit."""
        super().init_parameter(name, parameter, generator)
        if name == "logit_scale":
            parameter.fill_(INIT_LOGIT_SCALE)

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts Karpathy's, COCO's or Flickr8k's files, or a table of your own.

        Training has a record per caption, the other splits a record per image. `bad_share` is the
        largest fraction of records that may be unusable.
        """
        records = split_by_caption(read_captioned_images(raw))
        lengths = make_length_counter(root, RetrievalConfig.text_length)
        return write_splits(
            root, "retrieval", source, records, lengths=lengths, bad_share=bad_share
        )

    def record(self, image: Any = None, text: str | None = None) -> Record:
        """Makes a record of an image, a text or both; None or an empty string leaves one out."""
        return make_record(image=image, text=text)

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns what the record holds: `image` uint8 [3, S, S], `text` and `text_padding` [K, L].

        K is the number of captions. For the matching head `image_id` tells images apart.
        """
        config = self.config
        example: Example = {"id": str(record["id"])}
        if config.matching:
            example["image_id"] = _find_image_id(record)
        if "image" in record:
            image = open_image(record["image"])
            if train:
                image = crop_and_flip(
                    image,
                    rng or make_record_rng(record),
                    image_size=config.image.image_size,
                    crop=config.crop,
                    flip=config.flip,
                )
            example["image"] = config.image.preprocess(image)
        captions = record.get("captions") or []
        if not captions and "text" in record:
            captions = [record["text"]]
        if captions:
            texts, paddings = zip(
                *(self.tokenize_text(caption, config.text_length) for caption in captions),
                strict=True,
            )
            example["text"] = torch.stack(texts)
            example["text_padding"] = torch.stack(paddings)
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stacks images [B, 3, S, S] and concatenates all captions [T, L].

        `num_texts` lists how many of the captions belong to each record.
        """
        check_same_fields(examples)
        batch: Batch = {"id": [example["id"] for example in examples]}
        if "image_id" in examples[0]:
            batch["image_id"] = [example["image_id"] for example in examples]
        if "image" in examples[0]:
            batch["image"] = default_collate([example["image"] for example in examples])
        if "text" in examples[0]:
            for key in ("text", "text_padding"):
                batch[key] = torch.cat([example[key] for example in examples])
            batch["num_texts"] = [len(example["text"]) for example in examples]
        return trim_padding(batch)

    # Training ----------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns unit features of what is present, in float32 or more.

        `image_features` are [B, D], `text_features` [T, D].
        """
        outputs = {}
        if "image" in batch:
            encoded = self.backbone(image=self.normalize_images(batch), read="first")
            projected = self.image_projection(encoded.first("image"))
            outputs["image_features"] = F.normalize(promote_to_float32(projected), dim=-1)
        if "text" in batch:
            encoded = self.backbone(
                text=batch["text"], text_padding=batch.get("text_padding"), read="first"
            )
            projected = self.text_projection(encoded.first("text"))
            outputs["text_features"] = F.normalize(promote_to_float32(projected), dim=-1)
        return outputs

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """InfoNCE over the pairs of all processes (release; the temperature is not clamped)."""
        images, texts = features["image_features"], features["text_features"]
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images and {len(texts)} texts: training needs one caption a record"
            )
        scale = promote_to_float32(self.logit_scale).exp()
        loss, num_correct = contrastive_loss(images, texts, scale)
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": num_correct}}

    # Matching ----------------------------------------------------------------------------------

    def match(self, batch: Batch) -> Tensor:
        """Returns logits [B] that image i and text i of the batch belong together.

        Raises ValueError where the weights have no matching head.
        """
        if self.matching_head is None:
            raise ValueError(
                "these weights of retrieval have no matching head: train one with a recipe "
                "*_matching (--task.matching True)"
            )
        encoded = self.backbone(
            self.normalize_images(batch),
            batch["text"],
            text_padding=batch.get("text_padding"),
            read="first",
        )
        return promote_to_float32(self.matching_head(encoded.first("image"))[:, 0])

    def count_negatives(self, batch: Batch) -> int:
        """Returns how many wrong partners each image and each text of a micro-batch gets."""
        return min(self.config.matching_negatives, len(batch["image"]))

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the pairs of the contrastive loss, and those that the matching head judges."""
        counts = super().targets(batch)
        if self.config.matching:
            num_pairs = len(batch["image"])
            counts["matching"] = num_pairs * (1 + 2 * self.count_negatives(batch))
        return counts

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss in the total."""
        return {"matching": self.config.matching_weight}

    def compute_further_losses(
        self, batch: Batch, features: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Binary cross-entropy of the matching head on each pair and on hard negatives.

        Negatives come from this micro-batch alone, because the images and texts of others are not
        at hand under gradient caching and on other processes. So larger micro-batches hold harder
        ones. Other captions of the same image are no negatives.
        """
        if not self.config.matching:
            return {}
        images, texts, is_match = self.draw_pairs(batch, features)
        pairs = {"image": self.normalize_images(batch)[images], "text": batch["text"][texts]}
        if "text_padding" in batch:
            pairs["text_padding"] = batch["text_padding"][texts]
        logits = self.match(pairs)
        loss = F.binary_cross_entropy_with_logits(
            logits, is_match.to(logits.dtype), reduction="sum"
        )
        num_correct = ((logits > 0) == is_match).sum()
        return {"losses": {"matching": loss}, "metrics": {"matching/accuracy": num_correct}}

    @torch.no_grad()
    def draw_pairs(
        self, batch: Batch, features: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the indices of images [N] and texts [N] to judge, and whether they match [N].

        The B pairs of the batch come first, then wrong texts of its images, then wrong images of
        its texts.
        """
        images, texts = features["image_features"], features["text_features"]
        scale = self.config.matching_hardness * promote_to_float32(self.logit_scale).exp()
        similarities = compute_similarities(images, texts, scale)
        groups = {image_id: index for index, image_id in enumerate(batch["image_id"])}
        group = torch.tensor([groups[id] for id in batch["image_id"]], device=images.device)
        is_match = group[:, None] == group[None, :]
        count = self.count_negatives(batch)
        own = torch.arange(len(images), device=images.device)
        repeated = own.repeat_interleave(count)
        wrong_texts = draw_negatives(similarities, is_match, count).flatten()
        wrong_images = draw_negatives(similarities.T, is_match, count).flatten()
        image_indices = torch.cat((own, repeated, wrong_images))
        text_indices = torch.cat((own, wrong_texts, repeated))
        return image_indices, text_indices, is_match[image_indices, text_indices]

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns unit features as float32 arrays: `image` [D] and `texts` [K, D] where present."""
        outputs = self.outputs(batch)
        features = {name: values.detach().float().cpu() for name, values in outputs.items()}
        predictions: list[Prediction] = [{"id": id} for id in batch["id"]]
        if "image_features" in features:
            for prediction, image in zip(predictions, features["image_features"], strict=True):
                prediction["image"] = image.numpy()
        if "text_features" in features:
            texts_per_record = features["text_features"].split(batch["num_texts"])
            for prediction, texts in zip(predictions, texts_per_record, strict=True):
                prediction["texts"] = texts.numpy()
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns recall at 1, 5 and 10 both ways, over distinct images.

        Records of one `image_id` (without it, of one `image`) are one image.
        """
        image_indices: dict[str, int] = {}
        images: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        owners: list[int] = []  # index of the image that each text belongs to
        for prediction, record in join_by_id(predictions, records):
            if "image" not in prediction or "texts" not in prediction:
                raise ValueError(
                    f"record {record['id']} lacks an image or captions: recall needs both"
                )
            image_id = str(record["image_id"] if "image_id" in record else record["image"])
            if image_id not in image_indices:
                image_indices[image_id] = len(images)
                images.append(np.asarray(prediction["image"], dtype=np.float32))
            captions = np.asarray(prediction["texts"], dtype=np.float32)
            texts.append(captions)
            owners += [image_indices[image_id]] * len(captions)
        widths = {features.shape[-1] for features in (*images, *texts)}
        if len(widths) > 1:
            raise ValueError(
                f"image and texts have features of different widths {sorted(widths)}: "
                "predict all by the same weights"
            )
        return compute_recall(np.stack(images), np.concatenate(texts), np.array(owners))


def _find_image_id(record: Record) -> str:
    """Returns what tells the image of a record from those of others, for one batch."""
    for name in ("image_id", "image"):
        if isinstance(record.get(name), str | int):
            return str(record[name])
    return str(record["id"])
