"""Visual reasoning: is a statement true of two images (paper section 3.1, NLVR2)?

Each image is encoded with the statement as one fused sequence. The states of the class token and of
BOS from both pairs, four vectors in all, go through a two-layer head. NLVR1's canvas is read as two
images, cut out by the record's `boxes`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.prepare.formats.detect import read_statements
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.predictions import STRING
from beit3.data.stores.record_fields import (
    FILE,
    ID,
    PURPOSES,
    TEXT_OR_IDS,
    TRUTH,
    TWO_BOXES,
    FieldKind,
    RecordField,
)
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.images import open_image
from beit3.metrics.classification import compute_accuracy, compute_consistency
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.model.heads import TwoPairHead
from beit3.ops.precision import promote_to_float32
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_labels,
    make_length_counter,
    make_record_rng,
)
from beit3.tokenizer.text import TextTokenizer

ANSWERS = ("false", "true")
HEAD_INIT_SCALE = 1e-3
"""Factor of the initial values of the head's two linear layers (release)."""


@dataclass(frozen=True)
class NLVR2Config(TaskConfig):
    """Settings of the random crops and flips of training."""

    crop: tuple[float, float] = (0.5, 1.0)
    """Fraction of the area that the random crop keeps."""
    flip: float = 0.5
    """Probability of a flip, drawn for each of the two images. Turn it off where statements speak
    of left and right and there are few of them."""


# Recipes ---------------------------------------------------------------------------------------

_DEMO = Recipe(
    task=NLVR2Config(
        model=TINY, image=Preprocessing(32), text_length=28, crop=(1.0, 1.0), flip=0.0
    ),
    data=DataConfig(batch={"main": 32}),
    optim=OptimConfig(
        name="muon", lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, clip=3.0
    ),
    run=RunConfig(steps=600, log_every=10, save_every=100),
    note="the embedded world's statements on two pictures",
)

_LAPTOP = Recipe(
    task=NLVR2Config(
        model=SMALL, image=Preprocessing(112), text_length=32, crop=(0.9, 1.0), flip=0.0
    ),
    data=DataConfig(batch={"main": 32}),
    optim=OptimConfig(lr=3e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=50, clip=3.0),
    run=RunConfig(steps=400, log_every=20, save_every=200),
    note="statements on two CPU cores, from the weights of pretrain laptop",
)


def _make_recipe(
    model: ModelConfig,
    *,
    lr: float,
    layer_decay: float,
    note: str,
    drop_path_rate: float = 0.2,
    weight_decay: float = 0.2,
) -> Recipe:
    """Fine-tuning as in the release's commands: batch 256, 20 epochs, 5 of them warmup.

    The paper's giant differs in its rates (appendix).
    """
    return Recipe(
        task=NLVR2Config(
            model=replace(model, drop_path_rate=drop_path_rate), image=Preprocessing(224)
        ),
        data=DataConfig(batch={"main": 256}, workers=8),
        optim=OptimConfig(
            lr=lr, weight_decay=weight_decay, warmup_epochs=5, layer_decay=layer_decay
        ),
        run=RunConfig(epochs=20, micro_batch=16, log_every=50, eval_every=1_000, save_every=500),
        note=note,
    )


class NLVR2(Task):
    """The backbone, applied to two pairs, and a head that answers false or true."""

    Config = NLVR2Config
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "image2": RecordField(FILE, needed_for=PURPOSES),
        "text": RecordField(TEXT_OR_IDS, needed_for=PURPOSES),
        "label": RecordField(TRUTH, needed_for=("train", "score")),
        "group": RecordField(ID),
        "boxes": RecordField(TWO_BOXES),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"answer": STRING}
    headline = "accuracy"
    released_names: ClassVar[Mapping[str, str]] = {"head": "head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _DEMO,
        "laptop": _LAPTOP,
        "base_224": _make_recipe(
            BASE, lr=7e-4, layer_decay=0.65, note="release: dev 83.6, test-P 84.4"
        ),
        "base_224_indomain": _make_recipe(
            BASE,
            lr=5e-4,
            layer_decay=0.65,
            note="release, from the in-domain weights: dev 84.6, test-P 85.3",
        ),
        "large_224": _make_recipe(
            LARGE, lr=3e-4, layer_decay=0.85, note="release: dev 88.5, test-P 89.4"
        ),
        "large_224_indomain": _make_recipe(
            LARGE,
            lr=1e-4,
            layer_decay=0.85,
            note="release, from the in-domain weights: dev 89.2, test-P 90.0",
        ),
        "giant_224": _make_recipe(
            GIANT,
            lr=1e-3,
            layer_decay=0.8,
            drop_path_rate=0.4,
            weight_decay=0.05,
            note="paper: dev 91.5, test-P 92.6",
        ),
    }

    def __init__(self, config: NLVR2Config, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: NLVR2Config = config
        self.backbone = BEiT3(config.model)
        self.head = TwoPairHead(config.model.dim, config.model.norm_eps)

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Both modalities are read."""
        return self.find_unused_in_backbone((IMAGE, TEXT))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Makes the head's linear layers a thousand times smaller than usual.

        A fresh head then does not shake the backbone.
        """
        super().init_parameter(name, parameter, generator)
        if name.startswith("head.dense"):
            parameter.mul_(HEAD_INIT_SCALE)

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts NLVR2's or NLVR1's files, or a table of your own, to records.

        `bad_share` is the largest fraction of records that may be unusable.
        """
        lengths = make_length_counter(root, NLVR2Config.text_length)
        return write_splits(
            root, "nlvr2", source, read_statements(raw), lengths=lengths, bad_share=bad_share
        )

    def record(self, image: Any, image2: Any, statement: str) -> Record:
        """Makes a record of two images and a statement about them."""
        return {"id": "0", "image": image, "image2": image2, "text": statement}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns `image` uint8 [2, 3, S, S], `text` and `text_padding` [L], and `target`.

        `target` is 1 for true and 0 for false; it is absent where the record has no label.
        """
        config, rng = self.config, rng or make_record_rng(record)
        images = [open_image(record[key]) for key in ("image", "image2")]
        if record.get("boxes"):
            images = [
                crop_box(image, box) for image, box in zip(images, record["boxes"], strict=True)
            ]
        if train:
            size = config.image.image_size
            images = [
                crop_and_flip(image, rng, image_size=size, crop=config.crop, flip=config.flip)
                for image in images
            ]
        text, padding = self.tokenize_text(record["text"], config.text_length)
        example: Example = {
            "id": str(record["id"]),
            "image": torch.stack([config.image.preprocess(image) for image in images]),
            "text": text,
            "text_padding": padding,
        }
        if "label" in record:
            if record["label"] not in (0, 1):
                raise ValueError(f"label {record['label']!r} is neither 0 (false) nor 1 (true)")
            example["target"] = torch.tensor(int(record["label"]))
        return example

    # Training ----------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `logits` [B, 2] of false and true, from `image` [B, 2, 3, H, W]."""
        # Both images of a statement are encoded in one batch: all first images, then all second.
        images = self.normalize_images(batch).transpose(0, 1).flatten(0, 1)  # [2B, 3, H, W]
        text = batch["text"].repeat(2, 1)
        padding = batch["text_padding"].repeat(2, 1) if "text_padding" in batch else None
        encoded = self.backbone(images, text, text_padding=padding, read="first")
        pair_states = torch.cat((encoded.first("image"), encoded.first("text")), 1)  # [2B, 2D]
        first_pairs, second_pairs = pair_states.unflatten(0, (2, -1)).unbind()
        return {"logits": self.head(torch.cat((first_pairs, second_pairs), 1))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cross-entropy of the label."""
        logits = promote_to_float32(self.outputs(batch)["logits"])
        num_correct = (logits.argmax(1) == batch["target"]).sum()
        return {
            "losses": {"loss": F.cross_entropy(logits, batch["target"], reduction="sum")},
            "metrics": {"loss/accuracy": num_correct},
        }

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the `answer`, false or true, its probability `score`, and both `candidates`."""
        probabilities = self.outputs(batch)["logits"].float().softmax(1).tolist()
        predictions = []
        for id, scores in zip(batch["id"], probabilities, strict=True):
            candidates = [
                {"answer": answer, "score": score}
                for answer, score in zip(ANSWERS, scores, strict=True)
            ]
            candidates.sort(key=lambda candidate: -candidate["score"])
            predictions.append({"id": id, **candidates[0], "candidates": candidates})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns `accuracy`, `consistency` and `most_frequent`.

        `consistency` is the fraction of statements that are judged right on all their images,
        `most_frequent` what always giving the more common answer would score.
        """
        pairs = join_labels(predictions, records)
        labels = [int(record["label"]) for _, record in pairs]
        statement_ids = [str(record.get("group", record["id"])) for _, record in pairs]
        is_correct = [
            prediction["answer"] == ANSWERS[label]
            for (prediction, _), label in zip(pairs, labels, strict=True)
        ]
        return {
            "accuracy": compute_accuracy(is_correct),
            "consistency": compute_consistency(is_correct, statement_ids),
            "most_frequent": max(Counter(labels).values()) / len(labels),
        }


def crop_box(image: Tensor, box: Sequence[int]) -> Tensor:
    """Cuts the pixels left, top, right, bottom out of uint8 [3, H, W].

    Raises ValueError for a box that does not lie in the image.
    """
    left, top, right, bottom = map(int, box)
    height, width = image.shape[-2:]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"box {list(box)} does not lie in an image of {width} x {height} pixels: mend `boxes`"
        )
    return image[:, top:bottom, left:right]
