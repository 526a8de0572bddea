"""Visual reasoning: is a statement true of two images (paper section 3.1, NLVR2)?

Each image is encoded with the statement as one fused sequence. The class token's and the begin mark's states of both
pairs, four vectors in all, go through a two-layer head. NLVR1's canvas is read as two images, cut by the record.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.views.transforms import Preprocessing, training_view
from beit3.images import open_image
from beit3.metrics.classification import accuracy, consistency
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY, ModelConfig
from beit3.ops.precision import at_least_float32
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
    pairs_leave_out,
)
from beit3.tokenizer.text import TextTokenizer

ANSWERS = ("false", "true")
SMALL_START = 1e-3
"""Factor of the initial values of the head's two linear layers (release)."""


@dataclass(frozen=True)
class NLVR2Config(TaskConfig):
    """Two images and a statement."""

    crop: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    """Chance of a mirrored image, drawn for each of the two; off where statements say left and right of few things."""


class Head(nn.Module):
    """Norm, linear, norm, GELU, linear on the four states: [B, 4D] -> [B, 2]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(4 * dim, eps=eps)
        self.dense1 = nn.Linear(4 * dim, 2 * dim)
        self.norm2 = nn.LayerNorm(2 * dim, eps=eps)
        self.dense2 = nn.Linear(2 * dim, 2)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(states)))))


def _finetuning(
    model: ModelConfig,
    lr: float,
    layer_decay: float,
    note: str,
    *,
    drop: float = 0.2,
    decay: float = 0.2,
) -> Recipe:
    """The release's commands: batch 256, 20 epochs, 5 of warmup; the paper's giant differs in rates (appendix)."""
    return Recipe(
        task=NLVR2Config(model=replace(model, drop_path_rate=drop), image=Preprocessing(224)),
        data=DataConfig(batch={"main": 256}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=decay, warmup_epochs=5, layer_decay=layer_decay),
        run=RunConfig(epochs=20, micro_batch=16, log_every=50, eval_every=1_000, save_every=500),
        note=note,
    )


class NLVR2(Task):
    """Backbone on two pairs, and a head that says false or true."""

    Config = NLVR2Config
    headline = "accuracy"
    official_names: ClassVar[Mapping[str, str]] = {"head": "head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": Recipe(
            task=NLVR2Config(
                model=TINY, image=Preprocessing(32), text_length=28, crop=(1.0, 1.0), flip=0.0
            ),
            data=DataConfig(batch={"main": 32}),
            optim=OptimConfig(
                lr=5e-4, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, clip=3.0
            ),
            run=RunConfig(steps=200, log_every=10, save_every=100),
            note="the embedded world's statements on two pictures",
        ),
        "laptop": Recipe(
            task=NLVR2Config(
                model=SMALL, image=Preprocessing(112), text_length=32, crop=(0.9, 1.0), flip=0.0
            ),
            data=DataConfig(batch={"main": 32}),
            optim=OptimConfig(
                lr=3e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=50, clip=3.0
            ),
            run=RunConfig(steps=400, log_every=20, save_every=200),
            note="statements on two CPU cores, from the weights of pretrain laptop",
        ),
        "base_224": _finetuning(BASE, 7e-4, 0.65, "release: dev 83.6, test-P 84.4"),
        "base_224_indomain": _finetuning(
            BASE, 5e-4, 0.65, "release, from the in-domain weights: dev 84.6, test-P 85.3"
        ),
        "large_224": _finetuning(LARGE, 3e-4, 0.85, "release: dev 88.5, test-P 89.4"),
        "large_224_indomain": _finetuning(
            LARGE, 1e-4, 0.85, "release, from the in-domain weights: dev 89.2, test-P 90.0"
        ),
        "giant_224": _finetuning(
            GIANT, 1e-3, 0.8, "paper: dev 91.5, test-P 92.6", drop=0.4, decay=0.05
        ),
    }

    def __init__(self, config: NLVR2Config, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: NLVR2Config = config
        self.backbone = BEiT3(config.model)
        self.head = Head(config.model.dim, config.model.norm_eps)

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Both modalities are read."""
        return pairs_leave_out(self.config.model)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The head's linear layers start a thousand times smaller, so that a fresh head does not shake the backbone."""
        super().init_parameter(name, parameter, generator)
        if name.startswith("head.dense"):
            parameter.mul_(SMALL_START)

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """NLVR2's or NLVR1's files, or a table of one's own -> records."""
        return write_splits(
            root,
            "nlvr2",
            source,
            formats.statements(raw),
            lengths=make_length_counter(root, NLVR2Config.text_length),
        )

    def record(self, image: Any, image2: Any, statement: str) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image, "image2": image2, "text": statement}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [2, 3, S, S], `text` and `text_padding` [L], and `target`, 1 for true, where the record holds a label."""
        rng = rng or make_record_rng(record)
        images = [open_image(record[key]) for key in ("image", "image2")]
        images = [
            cut(image, box)
            for image, box in zip(images, record.get("boxes") or (None, None), strict=True)
        ]
        if train:
            size, crop, flip = self.config.image.image_size, self.config.crop, self.config.flip
            images = [
                training_view(image, rng, image_size=size, crop=crop, flip=flip) for image in images
            ]
        text, padding = self.tokenize_text(record["text"], self.config.text_length)
        pair = torch.stack([self.config.image.preprocess(image) for image in images])
        example = {"id": str(record["id"]), "image": pair, "text": text, "text_padding": padding}
        if "label" in record and record["label"] not in (0, 1):
            raise ValueError(f"label {record['label']!r} is neither 0 (false) nor 1 (true)")
        return (
            example | {"target": torch.tensor(int(record["label"]))}
            if "label" in record
            else example
        )

    # Training --------------------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` [B, 2], false and true, from `image` [B, 2, 3, H, W]."""
        pairs = (
            self.normalize_images(batch).transpose(0, 1).flatten(0, 1)
        )  # [2B, 3, H, W]: all first images, then all second ones
        text, padding = batch["text"], batch.get("text_padding")
        padding = None if padding is None else padding.repeat(2, 1)
        encoded = self.backbone(pairs, text.repeat(2, 1), text_padding=padding, read="first")
        states = torch.cat((encoded.first("image"), encoded.first("text")), 1)  # [2B, 2D]
        return {"logits": self.head(torch.cat(states.chunk(2), 1))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Cross-entropy of the label."""
        logits = at_least_float32(self.outputs(batch)["logits"])
        right = (logits.argmax(1) == batch["target"]).sum()
        return {
            "losses": {"loss": F.cross_entropy(logits, batch["target"], reduction="sum")},
            "metrics": {"loss/accuracy": right},
        }

    # Inference -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """`answer` false or true, and its probability; both as candidates."""
        predictions = []
        for key, probabilities in zip(
            batch["id"], self.outputs(batch)["logits"].float().softmax(1).tolist(), strict=True
        ):
            ranked = sorted(
                ({"answer": a, "score": p} for a, p in zip(ANSWERS, probabilities, strict=True)),
                key=lambda c: -c["score"],
            )
            predictions.append({"id": key} | ranked[0] | {"candidates": ranked})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Accuracy; consistency, the share of statements that are judged right on all their images; the commonest answer's share."""
        pairs = join_labels(predictions, records)
        right = [
            prediction["answer"] == ANSWERS[int(record["label"])] for prediction, record in pairs
        ]
        return {
            "accuracy": accuracy(right),
            "consistency": consistency(
                right, [str(record.get("group", record["id"])) for _, record in pairs]
            ),
            "most_frequent": max(Counter(int(record["label"]) for _, record in pairs).values())
            / len(right),
        }


def cut(image: Tensor, box: Sequence[int] | None) -> Tensor:
    """The pixels left, top, right, bottom of uint8 [3, H, W]; all of it without a box. ValueError for a box outside."""
    if box is None:
        return image
    left, top, right, bottom = map(int, box)
    height, width = image.shape[-2:]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"box {list(box)} does not lie in an image of {width} x {height} pixels: mend `boxes`"
        )
    return image[:, top:bottom, left:right]
