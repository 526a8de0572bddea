"""Masked data modelling (paper section 2.2): predict the hidden tokens of images, texts and
image-text pairs.

One step visits three sources: images lose 40 % of their patches, texts 15 % of their tokens, pairs
50 % of their text
and 40 % of their patches. Patches are predicted as the codes of a frozen visual tokenizer. What the
paper leaves open
is a field with the choice argued in docs/pretraining.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
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
    pad_token_ids,
)
from beit3.tokenizer.text import MODEL_FILE, TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer
from beit3.weights.loading import load_frozen


@dataclass(frozen=True)
class PretrainConfig(TaskConfig):
    """Defaults are the paper's (sections 2.2, 2.3 and appendix B), or the choice argued in
    docs/pretraining.md."""

    visual_tokenizer: str = ""
    """Weights of the visual tokenizer (`beit3 train vqkd`, or a VQ-KD file of BEiT v2)."""
    num_codes: int = 8192
    token_size: int = 224
    """Pixels of the visual tokenizer's own view: 256 where the patch is 14, so that both see one
    grid."""
    image_mask_rate: float = 0.4
    min_mask_block: int = 16
    text_mask_rate: float = 0.15
    pair_text_mask_rate: float = 0.5
    pair_masking: Literal["both", "text_only", "image_only", "alternate"] = "both"
    """What a pair hides: its text and its patches at once, one of them, or by turns of the record's
    own coin."""
    monomodal_text_length: int = 512
    cache_codes: bool = False
    """Keep each image's codes in memory after its first epoch; only where views are fixed (no crop,
    flip or jitter)."""
    image_crop: tuple[float, float] = (0.2, 1.0)
    """Share of an image's area that a random crop keeps."""
    pair_crop: tuple[float, float] = (0.5, 1.0)
    image_flip: float = 0.5
    """Chance of a horizontal flip."""
    pair_flip: float = 0.5
    color_jitter: float = 0.4
    image_weight: float = 1.0
    text_weight: float = 1.0
    pair_image_weight: float = 1.0
    pair_text_weight: float = 1.0

    @property
    def fixed_views(self) -> bool:
        """Whether every epoch shows an image in the same view."""
        crops, rates = (
            (self.image_crop, self.pair_crop),
            (self.image_flip, self.pair_flip, self.color_jitter),
        )
        return all(crop[0] >= 1 for crop in crops) and not any(rates)


def _paper(model: ModelConfig, *, token_size: int = 224, note: str) -> Recipe:
    """The paper's run (section 2.3, appendix B): 1M steps of 2048 images, texts and pairs."""
    return Recipe(
        task=PretrainConfig(model=replace(model, drop_path_rate=0.1), token_size=token_size),
        data=DataConfig(batch={"images": 2048, "texts": 2048, "pairs": 2048}, workers=8),
        optim=OptimConfig(
            lr=1e-3,
            min_lr=1e-5,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.05,
            warmup_steps=10_000,
            clip=3.0,
            no_decay=PRETRAIN_NO_DECAY,
        ),
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


PRETRAIN_NO_DECAY = (
    "image_embedding.positions",
    "text_embedding.positions",
    "image_embedding.class_token",
    "image_embedding.mask_token",
)
"""Pretraining also spares both position tables and the mask token from decay, as BEiT's scripts
do."""


DEMO = Recipe(
    task=PretrainConfig(
        model=TINY,
        image=Preprocessing(32),
        num_codes=64,
        token_size=32,
        min_mask_block=1,
        text_length=20,
        monomodal_text_length=48,
        pair_masking="text_only",
        image_crop=(1.0, 1.0),
        pair_crop=(1.0, 1.0),
        image_flip=0.0,
        pair_flip=0.0,
        color_jitter=0.0,
    ),
    data=DataConfig(batch={"images": 32, "texts": 32, "pairs": 64}),
    optim=OptimConfig(
        lr=1e-3,
        min_lr=1e-5,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.05,
        warmup_steps=50,
        clip=3.0,
        no_decay=PRETRAIN_NO_DECAY,
    ),
    run=RunConfig(steps=600, log_every=10, save_every=200, eval_records=500),
    note="the embedded world on a laptop CPU; in pairs only the text is hidden, which grounds words far sooner here",
)
"""No random views: the world's language names colors, places and sizes, and codes stay the same
over epochs."""


PHOTOGRAPHS = PretrainConfig(
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
"""Small sets of real photographs. No color jitter: captions name colors."""


LAPTOP = Recipe(
    task=PHOTOGRAPHS,
    data=DataConfig(batch={"images": 16, "texts": 2, "pairs": 32}),
    optim=OptimConfig(
        lr=1e-3,
        min_lr=1e-5,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.05,
        warmup_steps=200,
        clip=3.0,
        no_decay=PRETRAIN_NO_DECAY,
    ),
    run=RunConfig(steps=2000, log_every=20, eval_every=500, save_every=200),
    note="photographs, books and captions on two CPU cores in about 40 minutes; in pairs only the text is hidden",
)
"""Four texts of 512 tokens cost as much as 32 pictures."""


class Pretrain(Task):
    """BEiT-3 with its two pretraining heads, untied, on the final norm's states."""

    Config = PretrainConfig
    sources = ("images", "texts", "pairs")
    headline = "negative_loss"
    released_names: ClassVar[Mapping[str, str]] = {
        "text_head": "mlm_head",
        "image_head": "mim_head",
    }
    frozen = ("visual_tokenizer",)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": DEMO,
        "demo_pairs": replace(
            DEMO,
            data=DataConfig(batch={"pairs": 64}),
            optim=replace(DEMO.optim, lr=1.5e-3),
            run=replace(DEMO.run, steps=2500),
            note="the first part of the demo's pretraining: pairs alone, until words follow the picture",
        ),
        "laptop": LAPTOP,
        "gpu_hour": replace(
            LAPTOP,
            task=replace(
                PHOTOGRAPHS,
                model=replace(MEDIUM, drop_path_rate=0.1),
                image=Preprocessing(224),
                num_codes=1024,
                token_size=224,
                min_mask_block=16,
                text_length=64,
            ),
            data=DataConfig(batch={"images": 512, "texts": 128, "pairs": 512}, workers=14),
            run=RunConfig(steps=8000, compile=True, log_every=50, eval_every=2000, save_every=1000),
            note="the same records at 224 px on one large GPU, bfloat16 and compiled",
        ),
        "base_224": _paper(BASE, note="paper's numbers on the released base network"),
        "base_224_indomain": _paper(
            BASE, note="the same with COCO and Visual Genome among the pairs (released `indomain`)"
        ),
        "large_224": _paper(LARGE, note="paper's numbers on the released large network"),
        "giant_224": _paper(
            GIANT,
            token_size=256,
            note="the paper's BEiT-3 (section 2.3): 1M steps of 6144 records, patch 14",
        ),
    }

    def __init__(self, config: PretrainConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: PretrainConfig = config
        self.backbone = BEiT3(config.model)
        self.text_head = nn.Linear(config.model.dim, config.model.vocab_size)
        self.image_head = nn.Linear(config.model.dim, config.num_codes)
        self.visual_tokenizer: VisualTokenizer | None = None
        self.frozen_files: Mapping[str, FrozenFile] = {}
        self.known_codes: dict[tuple[str, str], Tensor] = {}
        if config.cache_codes and not config.fixed_views:
            raise ValueError(
                "task.cache_codes needs fixed views: set the crops to 1.0 1.0 and flips and "
                "color_jitter to 0"
            )
        if (
            config.visual_tokenizer and Path(config.visual_tokenizer).exists()
        ):  # weights alone may be used elsewhere
            task, file = load_frozen(config.visual_tokenizer, "vqkd")
            assert isinstance(task.backbone, VisualTokenizer)
            self.visual_tokenizer, self.frozen_files = task.backbone, {"visual_tokenizer": file}
            found = self.visual_tokenizer.config.num_codes
            if found != config.num_codes:
                raise ValueError(
                    f"task.num_codes is {config.num_codes}, but {config.visual_tokenizer} has "
                    f"{found} codes"
                )

    # Data -----------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path,
        root: Path,
        source: str,
        *,
        pack: int = 512,
        field: str = "text",
        workers: int = 0,
    ) -> Mapping[str, Any]:
        """`images`: a folder of images; `texts`: .txt, .jsonl and .parquet files; `pairs`: images
        with captions; or tars of images.

        source: with a set's own name behind it, pairs/coco, where a source is to be several sets.
        pack: tokens of a text record under the root's `text.model`, whose ids are written; 0 = one
        record a paragraph, in words.
        field: where .jsonl and .parquet have their texts. workers: processes that tokenize, 0 = one
        a core.
        """
        kind = source.partition("/")[0]
        if kind == "texts":
            if pack and not (root / MODEL_FILE).exists():
                raise ValueError(
                    f"packing counts tokens: write {root / MODEL_FILE} first (beit3 tokenizer "
                    "train), or give --pack 0"
                )
            if pack:
                return write_tokens(
                    raw,
                    root / "pretrain" / source,
                    TextTokenizer(root / MODEL_FILE),
                    pack=pack,
                    field=field,
                    workers=workers,
                )
            lengths = make_length_counter(root, PretrainConfig.monomodal_text_length)
            report = write_splits(
                root, "pretrain", source, formats.texts(raw, field=field), lengths=lengths
            )
            remove_unused_arrays(root / "pretrain" / source)
            return report
        lengths, captions = make_length_counter(root, PretrainConfig.text_length), kind == "pairs"
        if formats.lies_in_tars(raw, captions=captions):
            return write_shards(
                root, "pretrain", source, raw, captions=captions, lengths=lengths, workers=workers
            )
        return write_splits(
            root,
            "pretrain",
            source,
            formats.pairs(raw) if captions else formats.images(raw),
            lengths=lengths,
        )

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Nothing to complete; a run whose visual tokenizer is missing ends here."""
        assert isinstance(config, PretrainConfig)
        if config.visual_tokenizer and not Path(config.visual_tokenizer).exists():
            raise ValueError(
                f"task.visual_tokenizer: {config.visual_tokenizer} is not there (beit3 train vqkd "
                "writes one)"
            )
        return config

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`text` and/or `image` with what was hidden of them; `token_image` where codes will be
        wanted."""
        rng = rng or make_record_rng(record)
        example: Example = {"id": str(record["id"])}
        pair = "image" in record and "text" in record
        hide_image, hide_text = self.hidden(pair, rng)
        if "image" in record:
            example |= self.image_example(record, train, rng, pair=pair, hide=hide_image)
        if "text" in record:
            example |= self.text_example(record, rng, pair=pair, hide=hide_text)
        return example

    def hidden(self, pair: bool, rng: np.random.Generator) -> tuple[bool, bool]:
        """Whether this record hides patches, and whether it hides text."""
        how = self.config.pair_masking
        if not pair or how == "both":
            return True, True
        if how == "alternate":
            image = bool(rng.random() < 0.5)
            return image, not image
        return how == "image_only", how == "text_only"

    def image_example(
        self, record: Record, train: bool, rng: np.random.Generator, *, pair: bool, hide: bool
    ) -> Example:
        """`image` uint8 [3, S, S], and with masking in use `image_mask` [P] and `token_image` uint8
        [3, T, T]."""
        config = self.config
        view, token_view = make_two_views(
            open_image(record["image"]),
            rng,
            image_size=config.image.image_size,
            token_size=config.token_size,
            scale=(config.pair_crop if pair else config.image_crop) if train else (1.0, 1.0),
            hflip=(config.pair_flip if pair else config.image_flip) if train else 0.0,
            color_jitter=config.color_jitter if train else 0.0,
        )
        example: Example = {"image": view}
        if pair and config.pair_masking == "text_only":
            return example
        grid = config.model.grid
        count = int(config.image_mask_rate * grid[0] * grid[1]) if hide else 0
        mask = (
            draw_block_mask(grid, count, rng, min_block=config.min_mask_block)
            if count
            else np.zeros(grid, dtype=bool)
        )
        return example | {
            "image_mask": torch.from_numpy(mask.reshape(-1)),
            "token_image": token_view,
        }

    def text_example(
        self, record: Record, rng: np.random.Generator, *, pair: bool, hide: bool
    ) -> Example:
        """`text` [L] with words hidden, `text_padding` [L], and `text_target` [L] where any may be
        hidden."""
        config, tokenizer = self.config, self.tokenizer
        length = config.text_length if pair else config.monomodal_text_length
        ids = np.asarray(self.encode_text(record["text"], length), dtype=np.int64)
        targets = np.full(length, IGNORE_INDEX, dtype=np.int64)
        if hide:
            rate = config.pair_text_mask_rate if pair else config.text_mask_rate
            ids, targets[: len(ids)] = mask_text(
                ids,
                rng,
                rate=rate,
                mask_id=tokenizer.mask,
                vocab=(tokenizer.first_piece, tokenizer.mask),
            )
        text, padding = pad_token_ids(ids.tolist(), length, tokenizer.pad)
        example: Example = {"text": text, "text_padding": padding}
        return (
            example
            if pair and config.pair_masking == "image_only"
            else example | {"text_target": torch.from_numpy(targets)}
        )

    # Training -------------------------------------------------------------------------------------

    @property
    def loss_weights(self) -> Mapping[str, float]:
        config = self.config
        return {
            "image": config.image_weight,
            "text": config.text_weight,
            "pair_image": config.pair_image_weight,
            "pair_text": config.pair_text_weight,
        }

    @staticmethod
    def prefix(batch: Batch) -> str:
        """Losses of pairs are counted apart."""
        return "pair_" if "image" in batch and "text" in batch else ""

    def targets(self, batch: Batch) -> dict[str, int]:
        counts = {}
        if "image_mask" in batch:
            counts[self.prefix(batch) + "image"] = int(batch["image_mask"].sum())
        if "text_target" in batch:
            counts[self.prefix(batch) + "text"] = int((batch["text_target"] != IGNORE_INDEX).sum())
        return counts

    def encode(self, batch: Batch, read: Literal["real", "all"] = "real") -> Encoded:
        """The backbone's states of whatever the batch holds, those of padding among them if all are
        read."""
        image = self.normalize_images(batch) if "image" in batch else None
        text, padding = batch.get("text"), batch.get("text_padding")
        return self.backbone(
            image, text, image_mask=batch.get("image_mask"), text_padding=padding, read=read
        )

    def codes(self, batch: Batch) -> Tensor:
        """Targets [B, P] int64: the batch's own `image_codes`, else the frozen tokenizer's."""
        if "image_codes" in batch:
            return batch["image_codes"]
        if self.visual_tokenizer is None:
            where = self.config.visual_tokenizer
            reason = f"{where} is not there" if where else "none is given"
            raise ValueError(
                f"image targets need a visual tokenizer and {reason}: --task.visual_tokenizer "
                "WEIGHTS (beit3 train vqkd)"
            )
        if not self.config.cache_codes:
            return self.visual_tokenizer.tokenize(batch["token_image"])
        keys = [
            (f"{self.prefix(batch)}{self.training}", key) for key in batch["id"]
        ]  # ids may recur in another split
        new = [row for row, key in enumerate(keys) if key not in self.known_codes]
        if new:
            found = self.visual_tokenizer.tokenize(batch["token_image"][new])
            self.known_codes |= dict(zip((keys[row] for row in new), found, strict=True))
        return torch.stack([self.known_codes[key] for key in keys])

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Logits are computed at hidden positions only, and never all at once."""
        prefix = self.prefix(batch)
        losses, metrics = {}, {}
        for name, each, right, _ in self.predicted(batch, self.encode(batch)):
            losses[prefix + name], metrics[f"{prefix}{name}/accuracy"] = each.sum(), right.sum()
        return {"losses": losses, "metrics": metrics}

    def predicted(
        self, batch: Batch, encoded: Encoded
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(modality, losses [M], whether right [M], hidden [B, P or L]) for every modality with
        hidden positions."""
        if "image_mask" in batch:
            hidden = batch["image_mask"].bool()
            states, target = encoded.of("image")[:, 1:][hidden], self.codes(batch)[hidden]
            yield (
                "image",
                *chunked_vocabulary_loss(states, target, self.image_head, token_cross_entropy),
                hidden,
            )
        if "text_target" in batch:
            hidden = batch["text_target"] != IGNORE_INDEX
            states, target = encoded.of("text")[hidden], batch["text_target"][hidden]
            yield (
                "text",
                *chunked_vocabulary_loss(states, target, self.text_head, token_cross_entropy),
                hidden,
            )

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`image_logits` [B, P, K] and `text_logits` [B, L, V] of whatever is present."""
        encoded = self.encode(batch, "all")
        outputs = {}
        if "image" in batch:
            outputs["image_logits"] = self.image_head(encoded.of("image")[:, 1:])
        if "text" in batch:
            outputs["text_logits"] = self.text_head(encoded.of("text"))
        return outputs

    # Inference ------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Per record and modality: summed loss, hidden positions, and how many were named
        correctly."""
        predictions: list[Prediction] = [{"id": key} for key in batch["id"]]
        for name, losses, right, hidden in self.predicted(batch, self.encode(batch)):
            sums = torch.zeros(3, len(predictions), dtype=torch.float64, device=losses.device)
            values = torch.stack((losses, torch.ones_like(losses), right.to(losses.dtype)))
            sums.index_add_(1, hidden.nonzero()[:, 0], values.double())
            for prediction, (loss, count, correct) in zip(
                predictions, sums.T.tolist(), strict=True
            ):
                prediction |= {
                    f"{name}_loss": loss,
                    f"{name}_targets": int(count),
                    f"{name}_correct": int(correct),
                }
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Mean loss in nats and accuracy over all hidden positions of each modality;
        `negative_loss` is the headline."""
        pairs = join_by_id(predictions, records)
        scores: dict[str, float] = {}
        for name in ("image", "text"):
            total = sum(p.get(f"{name}_targets", 0) for p, _ in pairs)
            if total:
                scores[f"{name}_loss"] = sum(p[f"{name}_loss"] for p, _ in pairs) / total
                scores[f"{name}_accuracy"] = sum(p[f"{name}_correct"] for p, _ in pairs) / total
        return scores | {
            "negative_loss": -sum(value for name, value in scores.items() if name.endswith("_loss"))
        }
