"""Image captioning by masked words (paper section 3.1): image tokens see the image, words see it and the words before.

Training hides some of the caption, its end mark included, and predicts what is hidden from the same place: nothing is
shifted. A caption is written by asking a [MASK] slot for the next word (model/generation.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.views.augment import rand_augment
from beit3.data.views.masking import IGNORE, text_mask
from beit3.data.views.transforms import Preprocessing, training_view
from beit3.images import open_image
from beit3.metrics.caption import caption_scores
from beit3.metrics.caption_java import java_missing, java_scores
from beit3.model.attention_mask import image_to_text
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY, ModelConfig
from beit3.model.generation import Decoding, Marks, Slots, generate
from beit3.ops.losses import over_vocabulary, smoothed_divergence, without_worst
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.seeding import make_rng as seeded_rng
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_by_id,
    make_length_counter,
    make_record_rng,
    pairs_leave_out,
    read_server_id,
    task_name,
)
from beit3.tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class CaptioningConfig(TaskConfig):
    """The release's training; the paper's giant hides 60 % and keeps the worst words."""

    text_length: int = 32
    """Tokens of a caption, marks included, in training and when one is written."""
    mask_rate: float = 0.7
    """Share of a caption's tokens that training hides, counted with both marks; the begin mark stays."""
    label_smoothing: float = 0.1
    drop_worst: float = 0.2
    """Share of a micro-batch's words that is left out of the loss, those with the largest, once `drop_worst_after` has passed."""
    drop_worst_after: int = 12_000
    """Optimizer steps."""
    decoding: Decoding = Decoding()
    crop: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    rand_augment: bool = False


def _released(model: ModelConfig, lr: float, note: str) -> Recipe:
    """The release's commands: 480 px, batch 256, 10 epochs, one of warmup."""
    network = replace(model, image_size=480, drop_path_rate=0.1)
    return Recipe(
        task=CaptioningConfig(model=network, image=Preprocessing(480), rand_augment=True),
        data=DataConfig(batch={"main": 256}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup_epochs=1),
        run=RunConfig(epochs=10, micro_batch=16, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


class Captioning(Task):
    """Backbone under the image-then-text mask, and pretraining's head over words (not tied to the embedding)."""

    Config = CaptioningConfig
    headline = "cider"
    official_names: ClassVar[Mapping[str, str]] = {"text_head": "mlm_head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": Recipe(
            task=CaptioningConfig(
                model=TINY,
                image=Preprocessing(32),
                text_length=20,
                label_smoothing=0.0,
                drop_worst=0.0,
                crop=(1.0, 1.0),
                flip=0.0,
                decoding=Decoding("greedy"),
            ),
            data=DataConfig(batch={"main": 64}),
            optim=OptimConfig(
                lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, clip=3.0
            ),
            run=RunConfig(steps=200, log_every=10, save_every=100),
            note="the embedded world's captions",
        ),
        "laptop": Recipe(
            task=CaptioningConfig(
                model=SMALL,
                image=Preprocessing(112),
                text_length=28,
                drop_worst=0.0,
                crop=(0.6, 1.0),
            ),
            data=DataConfig(batch={"main": 32}),
            optim=OptimConfig(
                lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=100, clip=3.0
            ),
            run=RunConfig(steps=600, log_every=20, save_every=200),
            note="captions of photographs on two CPU cores, from the weights of pretrain laptop",
        ),
        "base_480": _released(BASE, 4e-5, "release: COCO CIDEr 133.6 (in-domain 135.0)"),
        "large_480": _released(LARGE, 8e-6, "release: COCO CIDEr 143.2"),
        "base_480_nocaps": _released(
            BASE, 1e-5, "release: NoCaps CIDEr 104.4 (in-domain 105.6), trained on COCO"
        ),
        "large_480_nocaps": _released(LARGE, 8e-6, "release: NoCaps CIDEr 120.2, trained on COCO"),
        "giant_392": Recipe(
            task=CaptioningConfig(
                model=replace(GIANT, image_size=392, drop_path_rate=0.3),
                image=Preprocessing(392),
                mask_rate=0.6,
                drop_worst=0.0,
            ),
            data=DataConfig(batch={"main": 256}, workers=8),
            optim=OptimConfig(lr=8e-6, weight_decay=0.01, warmup_steps=1_600),
            run=RunConfig(
                steps=16_000,
                micro_batch=4,
                checkpointing="full",
                log_every=50,
                eval_every=2_000,
                save_every=1_000,
            ),
            note="paper: COCO CIDEr 147.6, BLEU-4 44.1",
        ),
    }

    backbone: BEiT3

    def __init__(self, config: CaptioningConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: CaptioningConfig = config
        self.backbone = BEiT3(config.model)
        self.text_head = nn.Linear(config.model.dim, config.model.vocab_size)

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Only the words' last states are read."""
        return pairs_leave_out(self.config.model, unread="image")

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Karpathy's, COCO's, NoCaps' or Flickr8k's files, or a table of one's own -> a record per training caption, else per image."""
        rows = formats.one_per_caption(formats.captioned(raw))
        return write_splits(
            root,
            "captioning",
            source,
            rows,
            lengths=make_length_counter(root, CaptioningConfig.text_length),
        )

    def record(self, image: Any) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S]; where the record holds a caption also `text`, partly hidden, `text_padding` and `text_target` [L]."""
        rng = rng or make_record_rng(record)
        image = open_image(record["image"])
        example = {
            "id": str(record["id"]),
            "image": self.config.image.preprocess(self.view(image, rng) if train else image),
        }
        if "text" not in record:
            return example
        text, padding = self.tokenize_text(record["text"], self.config.text_length)
        hidden, target = self.hide(text.numpy(), int((~padding).sum()), rng)
        return example | {
            "text": torch.from_numpy(hidden),
            "text_padding": padding,
            "text_target": torch.from_numpy(target),
        }

    def hide(
        self, ids: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of `count` tokens hide the configured share, at least one, never the begin mark: (corrupted [L], targets [L])."""
        wanted = max(1, min(int(count * self.config.mask_rate + 0.5), count - 1))
        keep = np.arange(len(ids)) >= count
        keep[0] = True
        # The release draws random words from the unknown piece up to its <mask>, both included.
        return text_mask(
            ids,
            rng,
            count=wanted,
            mask_id=self.tokenizer.mask,
            vocab=(3, self.tokenizer.vocab_size),
            keep=keep,
        )

    def view(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The training view, uint8 [3, H, W]: crop, flip, RandAugment as far as the config asks for them."""
        config = self.config
        image = training_view(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return rand_augment(image, rng) if config.rand_augment else image

    # Training --------------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Hidden words."""
        return {"loss": int((batch["text_target"] != IGNORE).sum())}

    def states(self, batch: Batch, read: Literal["real", "all"]) -> Tensor:
        """The words' last states [B, L, D]; unless all are read those of padding mean nothing."""
        text, padding = batch["text"], batch.get("text_padding")
        mask = image_to_text(1 + self.config.model.num_patches, text.shape[1], device=text.device)
        return self.backbone(
            self.normalize_images(batch), text, text_padding=padding, attention_mask=mask, read=read
        ).of("text")

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` [B, L, V] of the word at each place."""
        return {"logits": self.text_head(self.states(batch, "all"))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Divergence from the smoothed words at the hidden places; late in training without the worst of them."""
        config, hidden = self.config, batch["text_target"] != IGNORE
        divergence = partial(smoothed_divergence, smoothing=config.label_smoothing)
        losses, right = over_vocabulary(
            self.states(batch, "real")[hidden],
            batch["text_target"][hidden],
            self.text_head,
            divergence,
        )
        late = config.drop_worst and batch.get("step", 0) > config.drop_worst_after
        loss = without_worst(losses, config.drop_worst) if late else losses.sum()
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": right.sum()}}

    # Inference -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """`caption` and its `score`, the log-probability (for beams over the length's power)."""
        tokenizer, decoding = self.tokenizer, self.config.decoding
        marks = Marks(tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.mask)
        draws = [seeded_rng(decoding.seed, 0, key).random for key in batch["id"]]
        captions = generate(
            Slots(self.backbone, self.text_head, self.normalize_images(batch), marks),
            self.config.text_length,
            decoding,
            draws,
        )
        return [
            {"id": key, "caption": tokenizer.decode(caption.words), "score": caption.score}
            for key, caption in zip(batch["id"], captions, strict=True)
        ]

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """BLEU, ROUGE-L, CIDEr and CIDEr-D as the official scorer gives them; on NoCaps also CIDEr of each `domain`."""
        candidates, references = compared(predictions, records)
        scores = caption_scores(candidates, references)
        for domain in sorted({record["domain"] for record in records if "domain" in record}):
            ids = [str(record["id"]) for record in records if record.get("domain") == domain]
            part = caption_scores(
                {id: candidates[id] for id in ids}, {id: references[id] for id in ids}
            )
            scores[f"cider/{domain}"] = part["cider"]
        return scores

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """What the COCO and NoCaps servers take: image_id and caption."""
        pairs = join_by_id(predictions, records)
        return [
            {"image_id": read_server_id(record, "image_id"), "caption": prediction["caption"]}
            for prediction, record in pairs
        ]


def java_scorer(
    task: type[Task],
) -> Callable[[Sequence[Prediction], Sequence[Record]], dict[str, float]]:
    """What gives METEOR and SPICE beside `score`: minutes of Java, for those who ask, never for an evaluation in training.

    Raises ValueError where `task` is none of captions, and where Java or pycocoevalcap is missing.
    """
    if not issubclass(task, Captioning):
        raise ValueError(
            f"--java: METEOR and SPICE are scores of captions, {task_name(task)} writes none: leave it out"
        )
    if missing := java_missing():
        raise ValueError(f"--java: {missing}")
    return lambda predictions, records: java_scores(*compared(predictions, records))


def compared(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions written, and those that people gave, by the record's id."""
    pairs = join_by_id(predictions, records)
    candidates = {str(record["id"]): prediction["caption"] for prediction, record in pairs}
    return candidates, {str(record["id"]): references_of(record) for _, record in pairs}


def references_of(record: Record) -> list[str]:
    """The captions that people gave; ValueError where there are none, or where an index file holds them as ids."""
    found = record.get("captions") or ([record["text"]] if "text" in record else [])
    if not found:
        raise ValueError(
            f"record {record['id']} holds no captions to compare with: score a split that has them"
        )
    if not all(isinstance(caption, str) for caption in found):
        raise ValueError(
            f"the captions of record {record['id']} are ids: scores need words, prepare the split from its annotations"
        )
    return list(found)
