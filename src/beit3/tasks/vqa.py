"""Visual question answering as classification over a fixed answer list (paper section 3.1, VQAv2).

The class token's state of the fused sequence goes through a pooler and a two-layer head, as in the release, on states
without a final norm. An answer that several annotators gave is a soft target.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.stores.records import locate, write_text
from beit3.data.views.augment import rand_augment
from beit3.data.views.transforms import Preprocessing, training_view
from beit3.images import open_image
from beit3.metrics.classification import vqa_accuracy, vqa_official
from beit3.metrics.text import normalize_answer, soft_scores
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
    join_by_id,
    make_length_counter,
    make_record_rng,
    pairs_leave_out,
    read_server_id,
)
from beit3.tokenizer.text import TextTokenizer

CANDIDATES = 5
"""Answers that a prediction ranks."""

SAMPLE = 10_000
"""Fewer questions than this are a sample of VQA, from which no list of the release can come."""

MIN_ANSWER_COUNT = 9
"""VQAv2 answers given less often are not in the list: 3129 remain (release)."""

MANY_DROPPED = 0.1
"""Share of the training questions beyond which the report speaks of those left out."""


@dataclass(frozen=True)
class VQAConfig(TaskConfig):
    """`model.final_norm` is off in every released VQA model."""

    model: ModelConfig = replace(BASE, final_norm=False)
    image: Preprocessing = Preprocessing(480)
    num_answers: int = 3129
    answers: tuple[str, ...] = ()
    """Their names in the order of the head's outputs; empty = unknown (tensors still work)."""
    crop: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    rand_augment: bool = False
    """Two random operations on each training picture, as the release does."""


class Pooler(nn.Module):
    """Norm, linear, tanh on the class token: [B, D] -> [B, D]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dense = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(states)))


def _released(model, size: int, lr: float, drop_path_rate: float, note: str) -> Recipe:
    """The release's fine-tuning (its README): batch 128, 10 epochs, head at 20 times the rate."""
    return Recipe(
        task=VQAConfig(
            model=replace(model, image_size=size, final_norm=False, drop_path_rate=drop_path_rate),
            image=Preprocessing(size),
            rand_augment=True,
        ),
        data=DataConfig(batch={"main": 128}, workers=8),
        optim=OptimConfig(
            lr=lr, betas=(0.9, 0.98), weight_decay=0.01, warmup_epochs=1, head_lr_scale=20
        ),
        run=RunConfig(epochs=10, micro_batch=16, log_every=50, eval_every=2_000, save_every=1_000),
        note=note,
    )


class VQA(Task):
    """Backbone, pooler on the image's class token, and a head over the answer list."""

    Config = VQAConfig
    headline = "accuracy"
    official_names: ClassVar[Mapping[str, str]] = {"pooler": "pooler", "head": "head"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "demo": Recipe(
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
                lr=3e-4,
                betas=(0.9, 0.98),
                weight_decay=0.01,
                warmup_steps=20,
                head_lr_scale=20,
                clip=3.0,
            ),
            run=RunConfig(steps=200, log_every=10, save_every=100),
            note="the embedded world's questions",
        ),
        "laptop": Recipe(
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
                lr=3e-4,
                betas=(0.9, 0.98),
                weight_decay=0.01,
                warmup_steps=100,
                head_lr_scale=4,
                clip=3.0,
            ),
            run=RunConfig(steps=3000, log_every=20, eval_every=1000, save_every=500),
            note="questions about photographs on two CPU cores, from the weights of pretrain laptop",
        ),
        "base_480": _released(BASE, 480, 3e-5, 0.1, "release: test-dev 77.65 (in-domain 78.46)"),
        "large_480": _released(LARGE, 480, 2e-5, 0.15, "release: test-dev 81.85 (in-domain 82.53)"),
        "large_768": _released(
            LARGE,
            768,
            2e-5,
            0.15,
            "release, in-domain and with Visual Genome's questions: test-dev 82.97",
        ),
        "giant_756": _released(GIANT, 756, 1e-5, 0.4, "paper: test-dev 84.19, test-std 84.03"),
    }

    def __init__(self, config: VQAConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.config: VQAConfig = config
        dim, eps = config.model.dim, config.model.norm_eps
        self.backbone = BEiT3(config.model)
        self.pooler = Pooler(dim, eps)
        self.head = nn.Sequential(
            nn.Linear(dim, 2 * dim),
            nn.LayerNorm(2 * dim, eps=eps),
            nn.GELU(),
            nn.Linear(2 * dim, config.num_answers),
        )
        self.labels = {answer: index for index, answer in enumerate(config.answers)}
        if config.answers and len(config.answers) != config.num_answers:
            raise ValueError(
                f"{len(config.answers)} answer names for {config.num_answers} outputs: give the list of these weights"
            )

    @property
    def unused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """Only the class token's last state is read."""
        return pairs_leave_out(self.config.model, unread="text")

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str, *, at_least: int = 0) -> Mapping[str, Any]:
        """Files of VQA, OK-VQA, easy-VQA, DAQUAR or tables -> records with soft answers, and the answer list beside them.

        Visual Genome's questions beside VQA's are more training data, as far as the list has their answers. at_least: how
        often an answer of the list is given; 0 = `MIN_ANSWER_COUNT` times in VQA v1 and v2, once in other sets and in samples.
        """
        official = formats.asks_as_vqa(raw)
        questions = list(formats.questions(raw))
        at_least = at_least or (MIN_ANSWER_COUNT if official and len(questions) >= SAMPLE else 1)
        answers = build_answers(
            (q for split, q in questions if split in ("train", "val")), at_least, official=official
        )
        known = set(answers)
        questions += formats.extra_questions(raw)
        records = [
            (split, to_record(question, known, official=official)) for split, question in questions
        ]
        records = [
            (split, record)
            for split, record in records
            if split != "train" or record.get("answers") or "fault" in record
        ]
        report = write_splits(
            root, "vqa", source, records, lengths=make_length_counter(root, VQAConfig.text_length)
        )
        lines = (
            json.dumps({"answer": answer, "label": label}, ensure_ascii=False)
            for label, answer in enumerate(answers)
        )
        write_text(
            root / "vqa" / source / "answer2label.txt", "".join(line + "\n" for line in lines)
        )
        covered = sum(bool(record.get("answers")) for split, record in records if split == "val")
        dropped = len(questions) - len(records)
        share = dropped / max(1, sum(split == "train" for split, _ in questions))
        hint = (
            f"{share:.0%} of the training questions have no answer from the list and are left out"
        )
        hint += ": a smaller --at_least makes it longer" if at_least > 1 else ""
        return (
            dict(report)
            | {
                "answers": len(answers),
                "answer_given_at_least": at_least,
                "train_dropped": dropped,
                "val_answerable": covered / max(1, sum(split == "val" for split, _ in records)),
            }
            | ({"attention": hint} if share > MANY_DROPPED else {})
        )

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Take the answer list from the records."""
        assert isinstance(config, VQAConfig)
        path = locate(root, "vqa", "main", "train").with_name("answer2label.txt")
        answers = read_answers(path)
        return replace(config, answers=answers, num_answers=len(answers))

    def record(self, image: Any, question: str) -> Record:
        """Raw inputs -> record."""
        return {"id": "0", "image": image, "text": question}

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S], `text` and `text_padding` [L], and `target` [A], the soft score of each answer."""
        config = self.config
        image = open_image(record["image"])
        if train:
            image = self.view(image, rng or make_record_rng(record))
        text, padding = self.tokenize_text(record["text"], config.text_length)
        example = {
            "id": str(record["id"]),
            "image": config.image.preprocess(image),
            "text": text,
            "text_padding": padding,
        }
        return (
            example | {"target": self.soft_target(record["answers"])}
            if "answers" in record
            else example
        )

    def view(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """The training view, uint8 [3, H, W]: crop, flip, RandAugment as far as the config asks for them."""
        config = self.config
        image = training_view(
            image, rng, image_size=config.image.image_size, crop=config.crop, flip=config.flip
        )
        return rand_augment(image, rng) if config.rand_augment else image

    def soft_target(self, answers: Mapping[str, float]) -> Tensor:
        """[A] float from {answer: score}; unknown answers do not count."""
        target = torch.zeros(self.config.num_answers)
        for answer, score in answers.items():
            if answer in self.labels:
                target[self.labels[answer]] = score
        return target

    # Training --------------------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` [B, A]."""
        encoded = self.backbone(
            self.normalize_images(batch),
            batch["text"],
            text_padding=batch.get("text_padding"),
            read="first",
        )
        return {"logits": self.head(self.pooler(encoded.first("image")))}

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Binary cross-entropy summed over answers and examples (release: mean over both, times their number)."""
        logits = at_least_float32(self.outputs(batch)["logits"])
        loss = F.binary_cross_entropy_with_logits(
            logits, batch["target"].to(logits.dtype), reduction="sum"
        )
        best = batch["target"].gather(1, logits.argmax(1, keepdim=True))
        return {"losses": {"loss": loss}, "metrics": {"loss/accuracy": best.sum()}}

    # Inference -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """The likeliest answer, its probability, and the first `CANDIDATES` of all; probabilities need not sum to 1."""
        if not self.labels:
            raise ValueError(
                "these weights name no answers: give answers=FILE, one answer per line in the head's order"
            )
        count = min(CANDIDATES, self.config.num_answers)
        scores, labels = self.outputs(batch)["logits"].float().sigmoid().topk(count, dim=1)
        predictions = []
        for key, chosen, probabilities in zip(
            batch["id"], labels.tolist(), scores.tolist(), strict=True
        ):
            ranked = [
                {"answer": self.config.answers[c], "score": p}
                for c, p in zip(chosen, probabilities, strict=True)
            ]
            predictions.append({"id": key} | ranked[0] | {"candidates": ranked})
        return predictions

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """The mean soft score of the given answer, as in the release; and beside it that of the commonest answer.

        Where several annotators' answers are known also `official`: VQA accuracy by leave-one-out with the official
        normalisation, as the test server gives it.
        """
        pairs = join_by_id(predictions, records)
        if not any(record["answers"] for _, record in pairs):
            raise ValueError(
                "these records hold no answers to compare with: score a split that has them"
            )
        totals: Counter[str] = Counter()
        for record in records:
            totals.update(record["answers"])
        scores = {
            "accuracy": vqa_accuracy(
                [p["answer"] for p, _ in pairs], [record["answers"] for _, record in pairs]
            ),
            "most_frequent": max(totals.values(), default=0.0) / len(pairs),
        }
        if all("annotators" in record for _, record in pairs):
            scores["official"] = sum(
                vqa_official(p["answer"], record["annotators"]) for p, record in pairs
            ) / len(pairs)
        return scores

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """What the VQA server takes: question_id and answer."""
        return [
            {"question_id": read_server_id(record), "answer": prediction["answer"]}
            for prediction, record in join_by_id(predictions, records)
        ]


def listed(answer: str, official: bool) -> str:
    """An answer as the list has it: normalised. In VQA's own the articles become "", which counts; in others they stay letters."""
    return normalize_answer(answer) or ("" if official else answer.strip().lower())


def build_answers(
    questions: Iterable[Record], at_least: int, *, official: bool = True
) -> tuple[str, ...]:
    """The normalised answers given for at least so many questions, in the order of their first appearance."""
    counts: Counter[str] = Counter()
    for question in questions:
        if isinstance(question.get("answers"), Mapping):  # all that are scored
            counts.update(listed(answer, official) for answer in question["answers"])
        elif "fault" not in question:
            counts[listed(question["multiple_choice_answer"], official)] += 1
    answers = tuple(
        answer for answer, count in counts.items() if count >= at_least and (answer or official)
    )
    if not answers:
        remedy = (
            "give a smaller --at_least" if at_least > 1 else "give training questions with answers"
        )
        raise ValueError(
            f"no answer is given {at_least} times in these questions, so none can be learnt: {remedy}"
        )
    return answers


def to_record(question: Record, known: set[str], *, official: bool = True) -> Record:
    """A question as a record: its annotators' answers become {answer: soft score} over the known ones.

    Several annotators' answers count as they stand in VQA's own sets, as in the release, else normalised; they are kept
    besides, for the official score. {answer: score} stays as it is given, and so does a fault.
    """
    if "fault" in question:
        return question
    given = question["answers"]
    if isinstance(given, Mapping):
        scores = {listed(answer, official): float(score) for answer, score in given.items()}
    elif len(given) > 1:
        scores = soft_scores(given if official else [listed(answer, official) for answer in given])
    else:
        scores = {listed(answer, official): 1.0 for answer in given}
    answers = {answer: score for answer, score in scores.items() if answer in known}
    record = {
        "id": str(question["id"]),
        "image": question["image"],
        "text": question["text"],
        "answers": answers,
    }
    return record | (
        {"annotators": list(given)} if len(given) > 1 and not isinstance(given, Mapping) else {}
    )


def read_answers(path: Path) -> tuple[str, ...]:
    """An answer list: JSON lines {"answer", "label"} as released, in any order, or one answer per line in the head's.

    In the second form a blank line is the answer "", which VQAv2's list has; at the end of the file it is none.
    """
    if not path.exists():
        raise ValueError(f"no answer list at {path}: run beit3 prepare vqa, or give one")
    text = path.read_text(encoding="utf-8").rstrip()
    if not text.lstrip().startswith("{"):
        return tuple(line.strip() for line in text.splitlines())
    try:
        labelled = sorted(
            (int(entry["label"]), str(entry["answer"]))
            for entry in map(json.loads, filter(str.strip, text.splitlines()))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no answer list of {{"answer", "label"}} lines: {error}'
        ) from None
    if [label for label, _ in labelled] != list(range(len(labelled))):
        raise ValueError(f"{path}: its labels are not 0 to {len(labelled) - 1}, each once")
    return tuple(answer for _, answer in labelled)
