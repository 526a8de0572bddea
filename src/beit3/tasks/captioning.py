"""Image captioning by masked language modeling (paper section 3.1).

Image tokens attend to the image, a caption's tokens to the image and to the tokens before them.
Training masks some of the caption, its EOS token included, and predicts each masked token from its
own position: nothing is shifted. A caption is written token by token, each predicted by a [MASK]
token behind the others (model/generation.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from beit3.data.prepare.formats.captions import split_by_caption
from beit3.data.prepare.formats.detect import read_captioned_images
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.predictions import STRING
from beit3.data.stores.record_fields import (
    CAPTIONS,
    FILE,
    ID,
    PURPOSES,
    TEXT_OR_IDS,
    WORD,
    FieldKind,
    Purpose,
    RecordField,
)
from beit3.data.views.augment import rand_augment
from beit3.data.views.masking import IGNORE_INDEX, mask_text
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.images import open_image
from beit3.metrics.caption import score_captions
from beit3.metrics.caption_java import explain_missing_java, score_captions_with_java
from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate
from beit3.ops.losses import chunked_vocabulary_loss, drop_worst, label_smoothed_kl_div
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.seeding import make_rng
from beit3.task import (
    Batch,
    Example,
    Prediction,
    Record,
    Task,
    join_by_id,
    make_length_counter,
    make_record_rng,
    read_server_id,
    task_name,
)
from beit3.tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class CaptioningConfig(TaskConfig):
    """Defaults are the release's. The paper's giant masks 60 % and keeps the worst tokens."""

    # The attention mask is made for the patch grid of the model.
    fixed_image_size: ClassVar[bool] = True

    text_length: int = 32
    """Tokens of a caption, BOS and EOS included, in training and when one is written."""
    mask_rate: float = 0.7
    """Fraction of a caption's tokens that training masks, counted with BOS and EOS. BOS is never
    masked."""
    label_smoothing: float = 0.1
    drop_worst: float = 0.2
    """Fraction of a micro-batch's masked tokens that the loss leaves out, those of the largest
    loss, once `drop_worst_after` steps have passed."""
    drop_worst_after: int = 12_000
    """Optimizer steps."""
    decoding: Decoding = Decoding()
    crop: tuple[float, float] = (0.5, 1.0)
    """Fraction of the area that the random crop of training keeps."""
    flip: float = 0.5
    rand_augment: bool = False
    """Whether two random operations change each training image, as in the release."""


# Recipes ---------------------------------------------------------------------------------------

_DEMO = Recipe(
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
    optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, clip=3.0),
    run=RunConfig(steps=200, log_every=10, save_every=100),
    note="the embedded world's captions",
)

_LAPTOP = Recipe(
    task=CaptioningConfig(
        model=SMALL,
        image=Preprocessing(112),
        text_length=28,
        drop_worst=0.0,
        crop=(0.6, 1.0),
    ),
    data=DataConfig(batch={"main": 32}),
    optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=100, clip=3.0),
    run=RunConfig(steps=600, log_every=20, save_every=200),
    note="captions of photographs on two CPU cores, from the weights of pretrain laptop",
)

_GIANT = Recipe(
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
)


def _make_recipe(model: ModelConfig, lr: float, note: str) -> Recipe:
    """The release's commands: 480 px, batch 256, 10 epochs, one of them warmup."""
    model = replace(model, image_size=480, drop_path_rate=0.1)
    return Recipe(
        task=CaptioningConfig(model=model, image=Preprocessing(480), rand_augment=True),
        data=DataConfig(batch={"main": 256}, workers=8),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup_epochs=1),
        run=RunConfig(epochs=10, micro_batch=16, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


class Captioning(Task):
    """The backbone under the image-to-text mask, and pretraining's head over the vocabulary.

    The head is not tied to the text embedding.
    """

    Config = CaptioningConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "text": RecordField(TEXT_OR_IDS, needed_for=("train",)),
        "captions": RecordField(
            CAPTIONS, needed_for=("score",), refused_for=("train",), alternative="text"
        ),
        "image_id": RecordField(ID),
        "domain": RecordField(WORD),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"caption": STRING}
    headline = "cider"
    released_names: ClassVar[Mapping[str, str]] = {"text_head": "mlm_head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _DEMO,
        "laptop": _LAPTOP,
        "base_480": _make_recipe(BASE, 4e-5, "release: COCO CIDEr 133.6 (in-domain 135.0)"),
        "large_480": _make_recipe(LARGE, 8e-6, "release: COCO CIDEr 143.2"),
        "base_480_nocaps": _make_recipe(
            BASE, 1e-5, "release: NoCaps CIDEr 104.4 (in-domain 105.6), trained on COCO"
        ),
        "large_480_nocaps": _make_recipe(
            LARGE, 8e-6, "release: NoCaps CIDEr 120.2, trained on COCO"
        ),
        "giant_392": _GIANT,
    }

    backbone: BEiT3

    def __init__(self, config: CaptioningConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: CaptioningConfig = config
        self.backbone = BEiT3(config.model)
        self.text_head = nn.Linear(config.model.dim, config.model.vocab_size)

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Only the text's last states are read."""
        return self.find_unused_in_backbone((IMAGE, TEXT), read=(TEXT,))

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path, root: Path, source: str, *, bad_share: float = BAD_SHARE
    ) -> Mapping[str, Any]:
        """Converts Karpathy's, COCO's, NoCaps' or Flickr8k's files, or a table of your own.

        Training has a record per caption, the other splits a record per image. `bad_share` is the
        largest fraction of records that may be unusable.
        """
        records = split_by_caption(read_captioned_images(raw))
        lengths = make_length_counter(root, CaptioningConfig.text_length)
        return write_splits(
            root, "captioning", source, records, lengths=lengths, bad_share=bad_share
        )

    @staticmethod
    def find_record_fault(record: Record, purpose: Purpose, config: TaskConfig | None) -> str:
        """Finds val records whose only reference is a list of token ids."""
        text = record.get("text")
        if purpose == "score" and not record.get("captions") and not isinstance(text, str):
            return f"field text is {str(text)[:40]}, and scoring needs captions that are strings"
        return ""

    def record(self, image: Any) -> Record:
        """Makes a record of an image."""
        return {"id": "0", "image": image}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns `image` uint8 [3, S, S], `text`, `text_padding` and `text_target` [L].

        `text` is partly masked, `text_target` holds the masked token ids and elsewhere the ignore
        index. All three are absent where the record holds no caption.
        """
        rng = rng or make_record_rng(record)
        image = open_image(record["image"])
        if train:
            image = self.augment(image, rng)
        example: Example = {
            "id": str(record["id"]),
            "image": self.config.image.preprocess(image),
        }
        if "text" in record:
            token_ids, padding = self.tokenize_text(record["text"], self.config.text_length)
            masked, target = self.mask_caption(token_ids.numpy(), int((~padding).sum()), rng)
            example["text"] = torch.from_numpy(masked)
            example["text_padding"] = padding
            example["text_target"] = torch.from_numpy(target)
        return example

    def augment(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Crops, flips and changes uint8 [3, H, W] as far as the config says."""
        config = self.config
        image = crop_and_flip(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return rand_augment(image, rng) if config.rand_augment else image

    def mask_caption(
        self, token_ids: np.ndarray, length: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks the configured fraction of a caption's tokens, at least one, never BOS.

        Args:
            token_ids: Token ids [L], of which the first `length` are no padding.
            length: Tokens of the caption, BOS and EOS included.
            rng: Source of randomness.

        Returns:
            The corrupted ids [L], and the targets [L], the ignore index where nothing is masked.
        """
        num_masked = max(1, min(int(length * self.config.mask_rate + 0.5), length - 1))
        keep = np.arange(len(token_ids)) >= length
        keep[0] = True
        # The release draws random ids from <unk> up to its <mask>, both included.
        return mask_text(
            token_ids,
            rng,
            count=num_masked,
            mask_id=self.tokenizer.mask,
            vocab=(3, self.tokenizer.vocab_size),
            keep=keep,
        )

    # Training ----------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the masked tokens."""
        return {"loss": int((batch["text_target"] != IGNORE_INDEX).sum())}

    def encode_captions(self, batch: Batch, read: Literal["real", "all"]) -> Tensor:
        """Returns the text's last states [B, L, D]; `read="real"` leaves out those of padding."""
        text, image = batch["text"], self.normalize_images(batch)
        patch_size = self.config.model.patch_size
        num_patches = (image.shape[2] // patch_size) * (image.shape[3] // patch_size)
        encoded = self.backbone(
            image,
            text,
            text_padding=batch.get("text_padding"),
            attention_mask=make_image_to_text_mask(
                1 + num_patches, text.shape[1], device=text.device
            ),
            read=read,
        )
        return encoded.of("text")

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `logits` [B, L, V] of the token at each position."""
        return {"logits": self.text_head(self.encode_captions(batch, "all"))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """KL divergence from the smoothed labels at the masked positions.

        Late in training the worst of them are left out.
        """
        config = self.config
        is_masked = batch["text_target"] != IGNORE_INDEX
        token_losses, is_correct = chunked_vocabulary_loss(
            self.encode_captions(batch, "real")[is_masked],
            batch["text_target"][is_masked],
            self.text_head,
            partial(label_smoothed_kl_div, smoothing=config.label_smoothing),
        )
        if config.drop_worst and batch.get("step", 0) > config.drop_worst_after:
            loss = drop_worst(token_losses, config.drop_worst)
        else:
            loss = token_losses.sum()
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": is_correct.sum()}}

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns each image's `caption`, and as `score` its log-probability.

        Beam search divides the log-probability by a power of the length.
        """
        tokenizer, decoding = self.tokenizer, self.config.decoding
        special_tokens = SpecialTokens(tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.mask)
        state = DecoderState(
            self.backbone, self.text_head, self.normalize_images(batch), special_tokens
        )
        random_numbers = [make_rng(decoding.seed, 0, id).random for id in batch["id"]]
        captions = generate(state, self.config.text_length, decoding, random_numbers)
        return [
            {"id": id, "caption": tokenizer.decode(caption.token_ids), "score": caption.score}
            for id, caption in zip(batch["id"], captions, strict=True)
        ]

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns BLEU, ROUGE-L, CIDEr and CIDEr-D as the official scorer computes them.

        On NoCaps also `cider/<domain>` of each `domain` of the records.
        """
        candidates, references = _collect_captions(predictions, records)
        scores = score_captions(candidates, references)
        for domain in sorted({record["domain"] for record in records if "domain" in record}):
            ids = [str(record["id"]) for record in records if record.get("domain") == domain]
            domain_scores = score_captions(
                {id: candidates[id] for id in ids}, {id: references[id] for id in ids}
            )
            scores[f"cider/{domain}"] = domain_scores["cider"]
        return scores

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """Returns `image_id` and `caption`, as the COCO and NoCaps servers take them."""
        return [
            {"image_id": read_server_id(record, "image_id"), "caption": prediction["caption"]}
            for prediction, record in join_by_id(predictions, records)
        ]


def make_java_scorer(
    task: type[Task],
) -> Callable[[Sequence[Prediction], Sequence[Record]], dict[str, float]]:
    """Returns a function that computes METEOR and SPICE beside `score`.

    They take minutes of Java, so only those who ask get them, never an evaluation in training.
    Raises ValueError where `task` writes no captions, and where Java or pycocoevalcap is missing.
    """
    if not issubclass(task, Captioning):
        raise ValueError(
            f"--java: METEOR and SPICE are scores of captions, {task_name(task)} writes none: "
            "leave it out"
        )
    reason = explain_missing_java()
    if reason:
        raise ValueError(f"--java: {reason}")

    def score_with_java(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> dict[str, float]:
        return score_captions_with_java(*_collect_captions(predictions, records))

    return score_with_java


def _collect_captions(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns the written captions and the reference captions, each by the record's id."""
    pairs = join_by_id(predictions, records)
    candidates = {str(record["id"]): prediction["caption"] for prediction, record in pairs}
    references = {str(record["id"]): _get_references(record) for _, record in pairs}
    return candidates, references


def _get_references(record: Record) -> list[str]:
    """Returns a record's reference captions; ValueError without any, and where they are ids."""
    captions = record.get("captions") or []
    if not captions and "text" in record:
        captions = [record["text"]]
    if not captions:
        raise ValueError(
            f"record {record['id']} holds no captions to compare with: score a split that has them"
        )
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(
            f"the captions of record {record['id']} are ids: scores need strings, prepare the "
            "split from its annotations"
        )
    return list(captions)
