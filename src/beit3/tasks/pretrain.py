"""Masked data modeling (paper section 2.2): predict masked tokens of images, texts and pairs.

One step visits three sources: images have 40 % of their patches masked, texts 15 % of their tokens,
image-text pairs 50 % of their text and 40 % of their patches. The target of a patch is its code by
a frozen visual tokenizer. What the paper leaves open is a field of the config, whose default is
argued in docs/pretraining.md.

`Pretrain.example` masks a record. `Pretrain.compute_masked_losses` computes the cross-entropy of
every masked patch and token, and `Pretrain.forward` sums it: as the losses `image` and `text`, or
for image-text pairs as `pair_image` and `pair_text`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from beit3.data.batches import pad_token_ids
from beit3.data.prepare.formats.detect import (
    holds_pretraining_tars,
    read_images,
    read_pairs,
    read_texts,
)
from beit3.data.prepare.splits import BAD_SHARE, write_splits
from beit3.data.stores.record_fields import FILE, PURPOSES, TEXT_OR_IDS, RecordField
from beit3.data.stores.shard_writer import write_shards
from beit3.data.text.tokenize import remove_unused_arrays, write_tokens
from beit3.data.views.masking import IGNORE_INDEX, draw_block_mask, mask_text
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import make_two_views
from beit3.images import open_image
from beit3.model.beit3 import BEiT3, Encoded
from beit3.model.config import BASE, GIANT, LARGE, MEDIUM, SMALL, TINY, ModelConfig
from beit3.ops.losses import chunked_vocabulary_loss, token_cross_entropy
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import (
    Batch,
    Example,
    FrozenFile,
    Prediction,
    Record,
    Task,
    join_by_id,
    make_length_counter,
    make_record_rng,
)
from beit3.tokenizer.text import MODEL_FILE, TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer
from beit3.weights.loading import load_frozen
from beit3.weights.names import is_there


@dataclass(frozen=True)
class PretrainConfig(TaskConfig):
    """Defaults are the paper's (sections 2.2, 2.3, appendix B) or argued in docs/pretraining.md."""

    # Masks are drawn on the patch grid of the model.
    fixed_image_size: ClassVar[bool] = True

    visual_tokenizer: str = ""
    """Weights of the visual tokenizer (`beit3 train vqkd`, or a VQ-KD file of BEiT v2)."""
    num_codes: int = 8192
    token_size: int = 224
    """Side in pixels of the visual tokenizer's view of an image: 256 where the patch is 14, so that
    both networks see the same grid."""
    image_mask_rate: float = 0.4
    min_mask_block: int = 16
    """Patches of the smallest block that is masked at once; 0 = patches are masked one by one."""
    text_mask_rate: float = 0.15
    pair_text_mask_rate: float = 0.5
    mask_token_rate: float = 0.8
    """Fraction of the masked tokens that become `<mask>`. Of the others one half become a random
    piece and one half stay, as in BERT."""
    pair_masking: Literal["both", "text_only", "image_only", "alternate"] = "both"
    """What is masked in a pair: text and patches at once, one of them, or one of them by the toss
    of a coin."""
    monomodal_text_length: int = 512
    cache_codes: bool = False
    """Whether each image's codes are kept in memory after its first epoch. Needs views that are the
    same in every epoch: no crop, flip or jitter."""
    image_crop: tuple[float, float] = (0.2, 1.0)
    """Fraction of an image's area that the random crop keeps."""
    pair_crop: tuple[float, float] = (0.5, 1.0)
    image_flip: float = 0.5
    """Probability of a horizontal flip."""
    pair_flip: float = 0.5
    color_jitter: float = 0.4
    image_weight: float = 1.0
    text_weight: float = 1.0
    pair_image_weight: float = 1.0
    pair_text_weight: float = 1.0
    visible_weight: float = 0.0
    """Weight of predicting the codes of visible patches, in images and in pairs. 0 is the paper's.
    With few images the codes of visible patches bring the teacher's knowledge into the network far
    sooner, see docs/lab_notes.md."""

    @property
    def has_fixed_views(self) -> bool:
        """Whether every epoch shows an image in the same view."""
        is_cropped = self.image_crop[0] < 1 or self.pair_crop[0] < 1
        return not (is_cropped or self.image_flip or self.pair_flip or self.color_jitter)


# Recipes ------------------------------------------------------------------------------------------

_NO_DECAY = (
    "image_embedding.positions",
    "text_embedding.positions",
    "image_embedding.class_token",
    "image_embedding.mask_token",
)
"""Pretraining also exempts both position tables and the mask token, as BEiT's scripts do."""

_OPTIM = OptimConfig(
    lr=1e-3,
    min_lr=1e-5,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.05,
    warmup_steps=10_000,
    clip=3.0,
    no_decay=_NO_DECAY,
)
"""The paper's settings (section 2.3, appendix B)."""

# No random views: the world's language names colors, places and sizes, and codes stay the same over
# the epochs.
_DEMO = Recipe(
    task=PretrainConfig(
        model=TINY,
        image=Preprocessing(32),
        num_codes=64,
        token_size=32,
        min_mask_block=1,
        text_length=20,
        monomodal_text_length=48,
        mask_token_rate=1.0,
        pair_masking="text_only",
        image_crop=(1.0, 1.0),
        pair_crop=(1.0, 1.0),
        image_flip=0.0,
        pair_flip=0.0,
        color_jitter=0.0,
    ),
    data=DataConfig(batch={"images": 32, "texts": 32, "pairs": 64}),
    optim=replace(_OPTIM, name="muon", lr=1.5e-3, warmup_steps=50),
    run=RunConfig(steps=600, log_every=10, save_every=200, eval_records=500),
    note="the embedded world on a laptop CPU; in pairs only the text is masked, "
    "which grounds words far sooner here",
)

_DEMO_PAIRS = replace(
    _DEMO,
    data=DataConfig(batch={"pairs": 64}),
    optim=replace(_DEMO.optim, lr=3e-3),
    run=replace(_DEMO.run, steps=1600),
    note="the first part of the demo's pretraining: pairs alone, until words follow the image",
)

_LAPTOP_TASK = PretrainConfig(
    model=SMALL,
    image=Preprocessing(112),
    num_codes=256,
    token_size=112,
    min_mask_block=4,
    text_length=32,
    pair_masking="text_only",
    image_crop=(0.4, 1.0),
    pair_crop=(0.6, 1.0),
    color_jitter=0.0,
)
"""For small datasets of photographs. No color jitter, because captions name colors."""

# A text of 512 tokens costs as much as 8 images.
_LAPTOP = Recipe(
    task=replace(
        _LAPTOP_TASK,
        model=replace(SMALL, init="torch"),
        mask_token_rate=1.0,
        visible_weight=1.0,
    ),
    data=DataConfig(batch={"images": 32, "texts": 1, "pairs": 32}),
    optim=replace(_OPTIM, name="muon", lr=2e-3, warmup_steps=50),
    run=RunConfig(steps=800, log_every=20, eval_every=400, save_every=200),
    note="photographs, books and captions on two CPU cores in about 25 minutes; in pairs only the "
    "text is masked, and the codes of visible patches are predicted too",
)

_GPU_HOUR = Recipe(
    task=replace(
        _LAPTOP_TASK,
        model=replace(MEDIUM, drop_path_rate=0.1),
        image=Preprocessing(224),
        num_codes=1024,
        token_size=224,
        min_mask_block=16,
        text_length=64,
    ),
    data=DataConfig(batch={"images": 512, "texts": 128, "pairs": 512}, workers=14),
    optim=replace(_OPTIM, warmup_steps=200),
    run=RunConfig(steps=8000, compile=True, log_every=50, eval_every=2000, save_every=1000),
    note="the same records at 224 px on one large GPU, bfloat16 and compiled",
)


def _make_recipe(model: ModelConfig, *, token_size: int = 224, note: str) -> Recipe:
    """Returns the paper's run (section 2.3, appendix B): 1M steps of 3 x 2048 records."""
    return Recipe(
        task=PretrainConfig(model=replace(model, drop_path_rate=0.1), token_size=token_size),
        data=DataConfig(batch={"images": 2048, "texts": 2048, "pairs": 2048}, workers=8),
        optim=_OPTIM,
        run=RunConfig(
            steps=1_000_000,
            micro_batch=32,
            checkpointing="full",
            log_every=100,
            eval_every=20_000,
            save_every=2_000,
        ),
        note=note,
    )


# Task ---------------------------------------------------------------------------------------------


class MaskedLosses(NamedTuple):
    """The losses of one modality at its M masked positions, and which predictions are correct.

    `visible` are the patches that are not masked.
    """

    modality: Literal["image", "text", "visible"]
    losses: Tensor  # [M]
    is_correct: Tensor  # [M] bool
    mask: Tensor  # [B, P or L] bool, the positions that are predicted


class Pretrain(Task):
    """BEiT-3 with a head over the codes and a head over the vocabulary.

    The heads read the states after the final norm. They are not tied to the embeddings.
    """

    Config = PretrainConfig
    sources = ("images", "texts", "pairs")
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "text": RecordField(TEXT_OR_IDS, needed_for=PURPOSES),
    }
    headline = "negative_loss"
    released_names: ClassVar[Mapping[str, str]] = {
        "text_head": "mlm_head",
        "image_head": "mim_head",
    }
    frozen = ("visual_tokenizer",)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _DEMO,
        "demo_pairs": _DEMO_PAIRS,
        "laptop": _LAPTOP,
        "gpu_hour": _GPU_HOUR,
        "base_224": _make_recipe(BASE, note="paper's numbers on the released base network"),
        "base_224_indomain": _make_recipe(
            BASE, note="the same with COCO and Visual Genome among the pairs (released `indomain`)"
        ),
        "large_224": _make_recipe(LARGE, note="paper's numbers on the released large network"),
        "giant_224": _make_recipe(
            GIANT,
            token_size=256,
            note="the paper's BEiT-3 (section 2.3): 1M steps of 6144 records, patch 14",
        ),
    }

    def __init__(self, config: PretrainConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: PretrainConfig = config
        if config.cache_codes and not config.has_fixed_views:
            raise ValueError(
                "task.cache_codes needs fixed views: set the crops to 1.0 1.0 and flips and "
                "color_jitter to 0"
            )
        self.backbone = BEiT3(config.model)
        self.text_head = nn.Linear(config.model.dim, config.model.vocab_size)
        self.image_head = nn.Linear(config.model.dim, config.num_codes)
        self.visual_tokenizer: VisualTokenizer | None = None
        self.frozen_files: Mapping[str, FrozenFile] = {}
        self._cached_codes: dict[tuple[str, str], Tensor] = {}
        # Pretrained weights may be used where the visual tokenizer is not at hand.
        if config.visual_tokenizer and is_there(config.visual_tokenizer):
            self._load_visual_tokenizer()

    def _load_visual_tokenizer(self) -> None:
        """Loads the frozen visual tokenizer; ValueError where it has other codes than the head."""
        config = self.config
        task, file = load_frozen(config.visual_tokenizer, "vqkd")
        assert isinstance(task.backbone, VisualTokenizer)
        num_codes = task.backbone.config.num_codes
        if num_codes != config.num_codes:
            raise ValueError(
                f"task.num_codes is {config.num_codes}, but {config.visual_tokenizer} has "
                f"{num_codes} codes"
            )
        self.visual_tokenizer, self.frozen_files = task.backbone, {"visual_tokenizer": file}

    # Records --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path,
        root: Path,
        source: str,
        *,
        pack: int = 512,
        field: str = "text",
        workers: int = 0,
        bad_share: float = BAD_SHARE,
    ) -> Mapping[str, Any]:
        """Converts images, texts (.txt, .jsonl, .parquet) or images with captions to records.

        Images and pairs may also lie in tars, which are indexed where they are.

        Args:
            raw: Directory of the files.
            root: Directory of records.
            source: images, texts or pairs; where a source consists of several datasets, with the
                dataset's name behind it, as in pairs/coco.
            pack: Tokens of a text record, counted by the root's `text.model`, whose ids are
                written. 0 = one record per paragraph, as text.
            field: Field of .jsonl and .parquet files that holds the text.
            workers: Processes that tokenize; 0 = one per core.
            bad_share: Largest fraction of records or documents that may be unusable.
        """
        kind = source.partition("/")[0]
        if kind == "texts":
            return _prepare_texts(
                raw, root, source, pack=pack, field=field, workers=workers, bad_share=bad_share
            )
        captions = kind == "pairs"
        lengths = make_length_counter(root, PretrainConfig.text_length)
        if holds_pretraining_tars(raw, captions=captions):
            return write_shards(
                root,
                "pretrain",
                source,
                raw,
                captions=captions,
                lengths=lengths,
                bad_share=bad_share,
                workers=workers,
            )
        records = read_pairs(raw) if captions else read_images(raw)
        return write_splits(root, "pretrain", source, records, lengths=lengths, bad_share=bad_share)

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Returns `config` as it is; ValueError for a run whose visual tokenizer is missing."""
        assert isinstance(config, PretrainConfig)
        if config.visual_tokenizer and not is_there(config.visual_tokenizer):
            raise ValueError(
                f"task.visual_tokenizer: {config.visual_tokenizer} is not there (beit3 train vqkd "
                "writes one)"
            )
        return config

    @classmethod
    def get_record_fields(cls, source: str) -> Mapping[str, RecordField]:
        """Images have no text, texts no image, pairs both."""
        field = {"images": "image", "texts": "text"}.get(source)
        return {field: cls.record_fields[field]} if field else cls.record_fields

    # Masking of images, texts and pairs -----------------------------------------------------------

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns what the record holds of image and text, masked, and the targets.

        See `make_image_example` and `make_text_example` for the tensors.
        """
        rng = rng or make_record_rng(record)
        is_pair = "image" in record and "text" in record
        image_is_masked, text_is_masked = self.choose_masked(is_pair, rng)
        example: Example = {"id": str(record["id"])}
        if "image" in record:
            example |= self.make_image_example(
                record, train, rng, is_pair=is_pair, is_masked=image_is_masked
            )
        if "text" in record:
            example |= self.make_text_example(
                record, rng, is_pair=is_pair, is_masked=text_is_masked
            )
        return example

    def choose_masked(self, is_pair: bool, rng: np.random.Generator) -> tuple[bool, bool]:
        """Returns whether patches of a record are masked, and whether its text is."""
        pair_masking = self.config.pair_masking
        if not is_pair or pair_masking == "both":
            return True, True
        if pair_masking == "alternate":
            image_is_masked = bool(rng.random() < 0.5)
            return image_is_masked, not image_is_masked
        return pair_masking == "image_only", pair_masking == "text_only"

    def make_image_example(
        self,
        record: Record,
        train: bool,
        rng: np.random.Generator,
        *,
        is_pair: bool,
        is_masked: bool,
    ) -> Example:
        """Returns `image` uint8 [3, S, S], `image_mask` [P] and `token_image` uint8 [3, T, T].

        `token_image` is the visual tokenizer's view of the same crop, with T = `config.token_size`.
        The mask is absent where the config never masks this kind of image, and this view where it
        has no codes to predict either.
        """
        config = self.config
        crop, flip, color_jitter = (1.0, 1.0), 0.0, 0.0
        if train:
            crop = config.pair_crop if is_pair else config.image_crop
            flip = config.pair_flip if is_pair else config.image_flip
            color_jitter = config.color_jitter
        image, token_image = make_two_views(
            open_image(record["image"]),
            rng,
            image_size=config.image.image_size,
            token_size=config.token_size,
            scale=crop,
            hflip=flip,
            color_jitter=color_jitter,
        )
        example: Example = {"image": image}
        is_never_masked = is_pair and config.pair_masking == "text_only"
        if config.visible_weight or not is_never_masked:
            example["token_image"] = token_image
        if is_never_masked:
            return example
        rows, columns = config.model.grid
        mask = np.zeros((rows, columns), dtype=bool)
        num_masked = int(config.image_mask_rate * rows * columns)
        if is_masked and num_masked:
            mask = draw_block_mask(
                (rows, columns), num_masked, rng, min_block=config.min_mask_block
            )
        example["image_mask"] = torch.from_numpy(mask.reshape(-1))
        return example

    def make_text_example(
        self, record: Record, rng: np.random.Generator, *, is_pair: bool, is_masked: bool
    ) -> Example:
        """Returns masked `text` [L], `text_padding` [L] and `text_target` [L].

        The target is absent where the config never masks this kind of text.
        """
        config, tokenizer = self.config, self.tokenizer
        length = config.text_length if is_pair else config.monomodal_text_length
        token_ids = np.asarray(self.encode_text(record["text"], length), dtype=np.int64)
        target = np.full(length, IGNORE_INDEX, dtype=np.int64)
        if is_masked:
            token_ids, target[: len(token_ids)] = mask_text(
                token_ids,
                rng,
                rate=config.pair_text_mask_rate if is_pair else config.text_mask_rate,
                mask_id=tokenizer.mask,
                vocab=(tokenizer.first_piece, tokenizer.mask),
                mask_token_rate=config.mask_token_rate,
            )
        text, padding = pad_token_ids(token_ids.tolist(), length, tokenizer.pad)
        example: Example = {"text": text, "text_padding": padding}
        if not (is_pair and config.pair_masking == "image_only"):
            example["text_target"] = torch.from_numpy(target)
        return example

    # Loss of masked patches and tokens ------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Returns the cross-entropy of the masked patches' codes and of the masked tokens.

        The losses are called `image` and `text`, for image-text pairs `pair_image` and `pair_text`,
        those of visible patches `visible` and `pair_visible`.
        """
        prefix, with_visible = self.get_loss_prefix(batch), self.config.visible_weight > 0
        losses, metrics = {}, {}
        for masked in self.compute_masked_losses(batch, with_visible=with_visible):
            losses[f"{prefix}{masked.modality}"] = masked.losses.sum()
            metrics[f"{prefix}{masked.modality}/accuracy"] = masked.is_correct.sum()
        return {"losses": losses, "metrics": metrics}

    def compute_masked_losses(
        self, batch: Batch, *, with_visible: bool = False
    ) -> Iterator[MaskedLosses]:
        """Yields the losses of every modality that has masked positions, and of visible patches.

        Logits are computed at these positions only, and never all at once.
        """
        encoded = self.encode(batch)
        masks: dict[Literal["image", "visible"], Tensor] = {}
        if "image_mask" in batch:
            masks["image"] = batch["image_mask"].bool()
        if with_visible and "image" in batch:
            masks["visible"] = self.find_visible(batch)
        if masks:
            codes = self.compute_codes(batch)
            patch_states = encoded.of("image")[:, 1:]  # without the class token
            for name, mask in masks.items():
                losses, is_correct = chunked_vocabulary_loss(
                    patch_states[mask], codes[mask], self.image_head, token_cross_entropy
                )
                yield MaskedLosses(name, losses, is_correct, mask)
        if "text_target" in batch:
            mask = batch["text_target"] != IGNORE_INDEX
            states = encoded.of("text")[mask]  # [M, D]
            target = batch["text_target"][mask]
            losses, is_correct = chunked_vocabulary_loss(
                states, target, self.text_head, token_cross_entropy
            )
            yield MaskedLosses("text", losses, is_correct, mask)

    def find_visible(self, batch: Batch) -> Tensor:
        """Returns which patches [B, P] of the batch's images are not masked."""
        if "image_mask" in batch:
            return ~batch["image_mask"].bool()
        images = batch["image"]
        shape = (len(images), self.config.model.num_patches)
        return torch.ones(shape, dtype=torch.bool, device=images.device)

    @staticmethod
    def get_loss_prefix(batch: Batch) -> str:
        """Returns what the names of the batch's losses start with: those of pairs are separate."""
        return "pair_" if "image" in batch and "text" in batch else ""

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the masked patches and tokens, and the visible patches that are predicted."""
        prefix, counts = self.get_loss_prefix(batch), {}
        if "image" in batch and self.config.visible_weight:
            counts[f"{prefix}visible"] = int(self.find_visible(batch).sum())
        if "image_mask" in batch:
            counts[f"{prefix}image"] = int(batch["image_mask"].sum())
        if "text_target" in batch:
            counts[f"{prefix}text"] = int((batch["text_target"] != IGNORE_INDEX).sum())
        return counts

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss in the total; the paper's are all 1."""
        config = self.config
        return {
            "image": config.image_weight,
            "text": config.text_weight,
            "pair_image": config.pair_image_weight,
            "pair_text": config.pair_text_weight,
            "visible": config.visible_weight,
            "pair_visible": config.visible_weight,
        }

    # Network --------------------------------------------------------------------------------------

    def encode(self, batch: Batch, read: Literal["real", "all"] = "real") -> Encoded:
        """Returns the states of the batch's images and texts.

        `read="all"` includes the states of padding.
        """
        return self.backbone(
            self.normalize_images(batch) if "image" in batch else None,
            batch.get("text"),
            image_mask=batch.get("image_mask"),
            text_padding=batch.get("text_padding"),
            read=read,
        )

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `image_logits` [B, P, K] and `text_logits` [B, L, V] of what is present."""
        encoded = self.encode(batch, "all")
        outputs = {}
        if "image" in batch:
            outputs["image_logits"] = self.image_head(encoded.of("image")[:, 1:])
        if "text" in batch:
            outputs["text_logits"] = self.text_head(encoded.of("text"))
        return outputs

    # Codes of the patches -------------------------------------------------------------------------

    def compute_codes(self, batch: Batch) -> Tensor:
        """Returns the patches' targets [B, P] int64.

        They are the batch's own `image_codes`, else the visual tokenizer's codes of `token_image`.
        """
        if "image_codes" in batch:
            return batch["image_codes"]
        if self.visual_tokenizer is None:
            path = self.config.visual_tokenizer
            reason = f"{path} is not there" if path else "none is given"
            raise ValueError(
                f"image targets need a visual tokenizer and {reason}: --task.visual_tokenizer "
                "WEIGHTS (beit3 train vqkd)"
            )
        if self.config.cache_codes:
            return self._tokenize_new_images(batch, self.visual_tokenizer)
        return self.visual_tokenizer.tokenize(batch["token_image"])

    def _tokenize_new_images(self, batch: Batch, visual_tokenizer: VisualTokenizer) -> Tensor:
        """Returns the codes [B, P] of the batch; those of images seen before are in the cache."""
        # Ids may recur in another source and in another split.
        prefix = f"{self.get_loss_prefix(batch)}{self.training}"
        keys = [(prefix, id) for id in batch["id"]]
        new_indices = [index for index, key in enumerate(keys) if key not in self._cached_codes]
        if new_indices:
            new_codes = visual_tokenizer.tokenize(batch["token_image"][new_indices])
            for index, codes in zip(new_indices, new_codes, strict=True):
                self._cached_codes[keys[index]] = codes
        return torch.stack([self._cached_codes[key] for key in keys])

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns per modality the summed loss, and how many masked positions are correct.

        The fields are `image_loss`, `image_targets`, `image_correct`, and the same of text.
        """
        predictions: list[Prediction] = [{"id": id} for id in batch["id"]]
        for modality, losses, is_correct, mask in self.compute_masked_losses(batch):
            values = torch.stack((losses, torch.ones_like(losses), is_correct.to(losses.dtype)))
            record_indices = mask.nonzero()[:, 0]  # [M]
            sums = torch.zeros(3, len(predictions), dtype=torch.float64, device=losses.device)
            sums.index_add_(1, record_indices, values.double())
            for prediction, (loss, count, correct) in zip(
                predictions, sums.T.tolist(), strict=True
            ):
                prediction[f"{modality}_loss"] = loss
                prediction[f"{modality}_targets"] = int(count)
                prediction[f"{modality}_correct"] = int(correct)
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns mean loss (nats) and accuracy over all masked positions of each modality.

        The headline `negative_loss` is minus the sum of the losses.
        """
        joined = [prediction for prediction, _ in join_by_id(predictions, records)]
        scores: dict[str, float] = {}
        for modality in ("image", "text"):
            total = sum(prediction.get(f"{modality}_targets", 0) for prediction in joined)
            if total:
                _check_masked_fields(joined, modality)
                sum_loss = sum(prediction[f"{modality}_loss"] for prediction in joined)
                num_correct = sum(prediction[f"{modality}_correct"] for prediction in joined)
                scores[f"{modality}_loss"] = sum_loss / total
                scores[f"{modality}_accuracy"] = num_correct / total
        losses = [value for name, value in scores.items() if name.endswith("_loss")]
        return scores | {"negative_loss": -sum(losses)}


def _check_masked_fields(predictions: Sequence[Prediction], modality: str) -> None:
    """Raises ValueError for a prediction that lacks the loss or the correct ones of a modality."""
    for prediction in predictions:
        for name in (f"{modality}_loss", f"{modality}_correct"):
            if name not in prediction:
                raise ValueError(
                    f"the prediction for record {prediction['id']} has no field {name!r}: "
                    "write the file by beit3 eval --predictions"
                )


# Texts of `prepare` -------------------------------------------------------------------------------


def _prepare_texts(
    raw: Path, root: Path, source: str, *, pack: int, field: str, workers: int, bad_share: float
) -> Mapping[str, Any]:
    """Writes texts as packed token ids, or with `pack` 0 as one record per paragraph."""
    directory = root / "pretrain" / source
    tokenizer_path = root / MODEL_FILE
    if pack:
        if not tokenizer_path.exists():
            raise ValueError(
                f"packing counts tokens: write {tokenizer_path} first (beit3 tokenizer train), "
                "or give --pack 0"
            )
        tokenizer = TextTokenizer(tokenizer_path)
        return write_tokens(
            raw,
            directory,
            tokenizer,
            pack=pack,
            field=field,
            workers=workers,
            bad_share=bad_share,
        )
    lengths = make_length_counter(root, PretrainConfig.monomodal_text_length)
    records = read_texts(raw, field=field)
    report = write_splits(root, "pretrain", source, records, lengths=lengths, bad_share=bad_share)
    remove_unused_arrays(directory)
    return report
