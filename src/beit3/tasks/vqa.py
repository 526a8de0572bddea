"""Visual question answering as classification over a fixed answer list (paper section 3.1, VQAv2).

Image and question are encoded as one fused sequence. The class token's state goes through a pooler
and a two-layer head, as in the release, on states without a final norm. Each answer is a class of
its own with a sigmoid; one that only some annotators gave is a soft target.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.prepare.answers import build_answers, choose_min_count, make_vqa_record
from beit3.data.prepare.formats.detect import (
    holds_vqa_questions,
    read_extra_questions,
    read_questions,
)
from beit3.data.prepare.splits import BAD_SHARE, find_invalid_character, write_splits
from beit3.data.prepare.val_images import train_on_val
from beit3.data.stores.label_names import ANSWERS_FILE, read_answers, write_answers
from beit3.data.stores.predictions import STRING
from beit3.data.stores.record_fields import (
    ANSWERS,
    FILE,
    PURPOSES,
    STRINGS,
    TEXT_OR_IDS,
    FieldKind,
    Purpose,
    RecordField,
)
from beit3.data.stores.split_files import locate_split
from beit3.data.views.augment import rand_augment
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import crop_and_flip
from beit3.images import open_image
from beit3.metrics.classification import compute_vqa_accuracy, score_vqa_answer
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, GIANT, IMAGE, LARGE, SMALL, TEXT, TINY, ModelConfig
from beit3.model.heads import AnswerHead, Pooler
from beit3.ops.precision import promote_to_float32
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
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
)
from beit3.tokenizer.text import TextTokenizer

NUM_CANDIDATES = 5
"""Answers that a prediction ranks."""

MAX_DROPPED_RATE = 0.1
"""Fraction of dropped training questions beyond which the report of `prepare` warns."""


@dataclass(frozen=True)
class VQAConfig(TaskConfig):
    """`model.final_norm` is off in every released VQA model."""

    model: ModelConfig = replace(BASE, final_norm=False)
    image: Preprocessing = Preprocessing(480)
    num_answers: int = 3129
    answers: tuple[str, ...] = ()
    """Names of the answers in the order of the head's outputs; empty = unknown, which suffices for
    tensors."""
    crop: tuple[float, float] = (0.5, 1.0)
    """Fraction of the area that the random crop of training keeps."""
    flip: float = 0.5
    rand_augment: bool = False
    """Whether two random operations change each training image, as in the release."""

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.answers

    @property
    def head_sizes(self) -> Mapping[str, int]:
        return {"num_answers": self.num_answers}

    @cached_property
    def answer_set(self) -> frozenset[str]:
        """The answers, for fast look-ups."""
        return frozenset(self.answers)


# Recipes ---------------------------------------------------------------------------------------

_DEMO = Recipe(
    task=VQAConfig(
        model=replace(TINY, final_norm=False),
        image=Preprocessing(32),
        text_length=16,
        num_answers=1,
        crop=(1.0, 1.0),
        flip=0.0,
    ),
    data=DataConfig(batch={"main": 32}),
    optim=OptimConfig(
        lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=20, head_lr_scale=20, clip=3.0
    ),
    run=RunConfig(steps=200, log_every=10, save_every=100),
    note="the embedded world's questions",
)

_LAPTOP = Recipe(
    task=VQAConfig(
        model=replace(SMALL, final_norm=False),
        image=Preprocessing(112),
        text_length=24,
        num_answers=1,
        crop=(0.8, 1.0),
        flip=0.0,
    ),
    data=DataConfig(batch={"main": 32}),
    optim=OptimConfig(
        lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=100, head_lr_scale=4, clip=3.0
    ),
    run=RunConfig(steps=3000, log_every=20, eval_every=1000, save_every=500),
    note="questions about photographs on two CPU cores, from the weights of pretrain laptop",
)


def _make_recipe(
    model: ModelConfig,
    image_size: int,
    *,
    lr: float,
    drop_path_rate: float,
    note: str,
    betas: tuple[float, float] = (0.9, 0.98),
) -> Recipe:
    """Fine-tuning as in the release's README: batch 128, 10 epochs, head at 20 times the rate.

    The default of `betas` is the release's; the paper's giant has (0.9, 0.999) (table 12).
    """
    model = replace(model, image_size=image_size, final_norm=False, drop_path_rate=drop_path_rate)
    return Recipe(
        task=VQAConfig(model=model, image=Preprocessing(image_size), rand_augment=True),
        data=DataConfig(batch={"main": 128}, workers=8),
        optim=OptimConfig(lr=lr, betas=betas, weight_decay=0.01, warmup_epochs=1, head_lr_scale=20),
        run=RunConfig(epochs=10, micro_batch=16, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


class VQA(Task):
    """The backbone, a pooler on the image's class token, and a head over the answer list."""

    Config = VQAConfig
    record_fields: ClassVar[Mapping[str, RecordField]] = {
        "image": RecordField(FILE, needed_for=PURPOSES),
        "text": RecordField(TEXT_OR_IDS, needed_for=PURPOSES),
        # A val question none of whose answers is in the list counts as wrong.
        "answers": RecordField(ANSWERS, needed_for=("train", "score"), may_be_empty_for=("score",)),
        "annotators": RecordField(STRINGS),
    }
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {"answer": STRING}
    headline = "accuracy"
    released_names: ClassVar[Mapping[str, str]] = {"pooler": "pooler", "head": "head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": _DEMO,
        "laptop": _LAPTOP,
        "base_480": _make_recipe(
            BASE,
            480,
            lr=3e-5,
            drop_path_rate=0.1,
            note="release: test-dev 77.65 (in-domain 78.46)",
        ),
        "large_480": _make_recipe(
            LARGE,
            480,
            lr=2e-5,
            drop_path_rate=0.15,
            note="release: test-dev 81.85 (in-domain 82.53)",
        ),
        "large_768": _make_recipe(
            LARGE,
            768,
            lr=2e-5,
            drop_path_rate=0.15,
            note="release, in-domain and with Visual Genome's questions: test-dev 82.97",
        ),
        "giant_756": _make_recipe(
            GIANT,
            756,
            lr=1e-5,
            betas=(0.9, 0.999),
            drop_path_rate=0.4,
            note="paper: test-dev 84.19, test-std 84.03",
        ),
    }

    def __init__(self, config: VQAConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: VQAConfig = config
        if config.answers and len(config.answers) != config.num_answers:
            raise ValueError(
                f"{len(config.answers)} answer names for {config.num_answers} outputs: "
                "give the list of these weights"
            )
        model = config.model
        self.backbone = BEiT3(model)
        self.pooler = Pooler(model.dim, model.norm_eps)
        self.head = AnswerHead(model.dim, config.num_answers, model.norm_eps)
        self.answer_labels = {answer: label for label, answer in enumerate(config.answers)}

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Only the class token's last state is read."""
        return self.find_unused_in_backbone((IMAGE, TEXT), read=(IMAGE,))

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(
        raw: Path,
        root: Path,
        source: str,
        *,
        at_least: int = 0,
        val_images: int = 0,
        bad_share: float = BAD_SHARE,
    ) -> Mapping[str, Any]:
        """Converts VQA, OK-VQA, easy-VQA, DAQUAR or tables to records, and writes the answer list.

        Training questions none of whose answers are in the list are dropped. Visual Genome's
        questions beside VQA's are more training data, as far as the list has their answers.

        Args:
            raw: Directory of the public files.
            root: Directory of records.
            source: Name of the source, main.
            at_least: How often an answer of the list must be given; 0 = 9 times in VQA v1 and v2,
                once in other datasets and in samples.
            val_images: Number of val images to hold out; questions about all other val images
                become training data. The published figures hold out 1,000. 0 = val as it is.
            bad_share: Largest fraction of questions that may be unusable.
        """
        is_vqa = holds_vqa_questions(raw)
        questions = [(split, refuse_invalid(question)) for split, question in read_questions(raw)]
        min_count = at_least or choose_min_count(len(questions), is_vqa=is_vqa)
        listed_questions = [
            question
            for split, question in questions
            if split in ("train", "val") and "answers" in question
        ]
        # A test split alone is for weights that have an answer list of their own.
        answers: tuple[str, ...] = ()
        answer_set: set[str] | None = None
        if listed_questions or not any("answers" in question for _, question in questions):
            answers = build_answers(listed_questions, min_count, is_vqa=is_vqa)
            answer_set = set(answers)
        moved_ids: frozenset[str] = frozenset()
        if val_images:
            questions, moved_ids = train_on_val(questions, val_images)
        questions += read_extra_questions(raw, trained_ids=moved_ids)
        records = []
        for split, question in questions:
            record = make_vqa_record(question, answer_set, is_vqa=is_vqa)
            if split != "train" or record.get("answers") or "answers" not in record:
                records.append((split, record))
        lengths = make_length_counter(root, VQAConfig.text_length)
        report = write_splits(root, "vqa", source, records, lengths=lengths, bad_share=bad_share)
        if not answers:
            return report
        write_answers(root / "vqa" / source / ANSWERS_FILE, answers)
        return {**report, **_describe_answers(questions, records, len(answers), min_count)}

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Takes the answer list from the records."""
        assert isinstance(config, VQAConfig)
        path = locate_split(root, "vqa", "main", "train").with_name(ANSWERS_FILE)
        answers = read_answers(path)
        return replace(config, answers=answers, num_answers=len(answers))

    @staticmethod
    def find_record_fault(record: Record, purpose: Purpose, config: TaskConfig | None) -> str:
        """Finds training records none of whose answers the network can give."""
        if purpose != "train" or not isinstance(config, VQAConfig):
            return ""
        if not config.answers or not config.answer_set.isdisjoint(record["answers"]):
            return ""
        return (
            f"field answers names {', '.join(map(repr, record['answers']))}, none of which is in "
            f"the list of {config.num_answers} answers ({ANSWERS_FILE})"
        )

    def record(self, image: Any, question: str) -> Record:
        """Makes a record of an image and a question about it."""
        return {"id": "0", "image": image, "text": question}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns `image` uint8 [3, S, S], `text` and `text_padding` [L], and `target` [A].

        `target` holds the soft score of each answer; it is absent where the record has none.
        """
        image = open_image(record["image"])
        if train:
            image = self.augment(image, rng or make_record_rng(record))
        text, padding = self.tokenize_text(record["text"], self.config.text_length)
        example: Example = {
            "id": str(record["id"]),
            "image": self.config.image.preprocess(image),
            "text": text,
            "text_padding": padding,
        }
        if "answers" in record:
            example["target"] = self.make_soft_target(record["answers"])
        return example

    def augment(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Crops, flips and changes uint8 [3, H, W] as far as the config says."""
        config = self.config
        image = crop_and_flip(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return rand_augment(image, rng) if config.rand_augment else image

    def make_soft_target(self, answers: Mapping[str, float]) -> Tensor:
        """Returns float [A] from answers and their scores; unlisted answers are left out."""
        target = torch.zeros(self.config.num_answers)
        for answer, score in answers.items():
            if answer in self.answer_labels:
                target[self.answer_labels[answer]] = score
        return target

    # Training ----------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `logits` [B, A]."""
        encoded = self.backbone(
            self.normalize_images(batch),
            batch["text"],
            text_padding=batch.get("text_padding"),
            read="first",
        )
        return {"logits": self.head(self.pooler(encoded.first("image")))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Binary cross-entropy, summed over answers and examples.

        The release takes the mean over both, times the number of answers.
        """
        logits = promote_to_float32(self.outputs(batch)["logits"])
        loss = F.binary_cross_entropy_with_logits(
            logits, batch["target"].to(logits.dtype), reduction="sum"
        )
        top_score = batch["target"].gather(1, logits.argmax(1, keepdim=True))
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": top_score.sum()}}

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the likeliest `answer`, its probability `score`, and the first `candidates`.

        Probabilities of different answers need not sum to 1.
        """
        answers = self.config.answers
        if not answers:
            raise ValueError(
                "these weights name no answers: give answers=FILE, one answer per line in the "
                "head's order"
            )
        probabilities = self.outputs(batch)["logits"].float().sigmoid()
        top = probabilities.topk(min(NUM_CANDIDATES, len(answers)), dim=1)
        predictions = []
        for id, labels, scores in zip(
            batch["id"], top.indices.tolist(), top.values.tolist(), strict=True
        ):
            candidates = [
                {"answer": answers[label], "score": score}
                for label, score in zip(labels, scores, strict=True)
            ]
            predictions.append({"id": id, **candidates[0], "candidates": candidates})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Returns `accuracy`, `most_frequent`, and where annotators are known `official`.

        `accuracy` is the mean soft score of the predicted answers, as in the release.
        `most_frequent` is what always giving the most common answer would score. `official` is
        VQA accuracy by leave-one-out with the official normalization, as the test server has it.
        """
        pairs = join_by_id(predictions, records)
        if not any(record.get("answers") for record in records):
            raise ValueError(
                "these records hold no answers to compare with: score a split that has them"
            )
        answer_totals: Counter[str] = Counter()
        for record in records:
            answer_totals.update(record["answers"])
        scores = {
            "accuracy": compute_vqa_accuracy(
                [prediction["answer"] for prediction, _ in pairs],
                [record["answers"] for _, record in pairs],
            ),
            "most_frequent": max(answer_totals.values(), default=0.0) / len(pairs),
        }
        if all("annotators" in record for record in records):
            official_scores = [
                score_vqa_answer(prediction["answer"], record["annotators"])
                for prediction, record in pairs
            ]
            scores["official"] = sum(official_scores) / len(pairs)
        return scores

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """Returns `question_id` and `answer`, as the VQA server takes them."""
        return [
            {"question_id": read_server_id(record), "answer": prediction["answer"]}
            for prediction, record in join_by_id(predictions, records)
        ]


def refuse_invalid(question: Record) -> Record:
    """Returns the question, or {id, fault} where a text of it, or an answer, is no UTF-8.

    The answer list could not be written otherwise.
    """
    fault = find_invalid_character(question)
    return {"id": str(question["id"]), "fault": fault} if fault else question


def _describe_answers(
    questions: Sequence[tuple[str, Record]],
    records: Sequence[tuple[str, Record]],
    num_answers: int,
    min_count: int,
) -> dict[str, Any]:
    """Returns the part of the report of `prepare` that is about answers."""
    num_dropped = len(questions) - len(records)
    num_train = sum(split == "train" for split, _ in questions)
    val_records = [record for split, record in records if split == "val"]
    num_answerable = sum(bool(record.get("answers")) for record in val_records)
    report: dict[str, Any] = {
        "answers": num_answers,
        "answer_given_at_least": min_count,
        "train_dropped": num_dropped,
        "val_answerable": num_answerable / max(1, len(val_records)),
    }
    num_null = sum(question.get("null_answers", 0) for _, question in questions)
    if num_null:
        report["null_answers"] = num_null
    dropped_rate = num_dropped / max(1, num_train)
    if dropped_rate > MAX_DROPPED_RATE:
        report["attention"] = (
            f"{dropped_rate:.0%} of the training questions have no answer from the list and are "
            "left out"
        )
        if min_count > 1:
            report["attention"] += ": a smaller --at_least makes it longer"
    return report
