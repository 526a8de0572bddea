"""What every task with recipes owes the loop, the store and the predictor. New tasks are found, not
listed."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.loader import RecordDataset
from beit3.data.stores.predictions import read_predictions, write_predictions
from beit3.data.views.preprocessing import clear_padding
from beit3.model.config import TINY, TINY_RELEASE, ModelConfig
from beit3.recipe import OptimConfig, TaskConfig
from beit3.task import Batch, Task, grow_vocabulary, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.training.optim import (
    clip_gradients,
    compute_learning_rate,
    make_optimizer,
    set_learning_rate,
)
from beit3.weights.loading import load_weights
from beit3.weights.store import save_weights
from tests.world_root import NUM_CODES, list_trainable_tasks

FORMS = {"paper": TINY, "release": TINY_RELEASE}
DENSE = ("coco", "ade20k")
"""Learn from views that only training makes, and from places or boxes that are drawn."""
CASES = [
    (task, form)
    for task in list_trainable_tasks()
    for form in (FORMS if isinstance(task.recipes["demo"].task.model, ModelConfig) else ["own"])
]
CASES = [(task, form) for task, form in CASES if task_name(task) not in DENSE or form == "paper"]
RECORDS = 8
ENOUGH = {"vqa": 150}
"""Steps on eight records; 60 where nothing is said."""


def small(kind: type[Task], form: str, visual: Path) -> TaskConfig:
    """The demo's config with half the layers, of this form; pretraining hides both sides of a
    pair."""
    config: Any = kind.recipes["demo"].task
    if form in FORMS:
        model = replace(FORMS[form], depth=2, ffn_dim=256, final_norm=config.model.final_norm)
    else:
        model = replace(config.model, dim=32, depth=1, num_heads=2, ffn_dim=64, num_codes=NUM_CODES)
    changes: dict[str, Any] = {"model": model}
    if hasattr(config, "pair_masking"):
        changes |= {"pair_masking": "both", "visual_tokenizer": str(visual), "num_codes": NUM_CODES}
    if hasattr(config, "adapter"):  # with gates of 0 injectors learn from the second step on
        changes["adapter"] = replace(
            config.adapter, num_interactions=2, num_extra_extractors=1, gate_init=0.01
        )
    return replace(config, **changes)


class Case:
    """A task with the first training records of each of its sources, as batches."""

    def __init__(self, kind: type[Task], form: str, root: Path, visual: Path):
        self.kind = kind
        tokenizer = TextTokenizer(root / "text.model")
        self.task = kind(
            kind.configure(grow_vocabulary(small(kind, form, visual), tokenizer), root),
            tokenizer=tokenizer,
        )
        self.task.init_weights(0)
        if self.dense:  # places are read evenly at first, and nothing comes back through zeros
            for index, (_, parameter) in enumerate(self.task.trainable_parameters()):
                if not parameter.any():
                    parameter.data.normal_(std=0.01, generator=torch.Generator().manual_seed(index))
        own = {name: kind.records_from.get(name, task_name(kind)) for name in kind.sources}
        paths = {name: root / folder / name / "train.jsonl" for name, folder in own.items()}
        self.records = {
            name: list(islice(self.rows(RecordDataset(path, root)), RECORDS))
            for name, path in paths.items()
        }

    def rows(self, source: RecordDataset) -> Iterator[dict[str, Any]]:
        """All records; one of each image where the loss compares them: captions of one image cannot
        be told apart."""
        seen = set()
        for row in source:
            if not self.kind.compares_examples or row["image"] not in seen:
                yield row
            seen.add(row.get("image"))

    @property
    def dense(self) -> bool:
        return task_name(self.kind) in DENSE

    def batches(self) -> dict[str, Batch]:
        """What the loss takes, the same at every call: evaluation's views where these hold all of
        it."""
        return self.views(self.dense)

    def views(self, train: bool = False) -> dict[str, Batch]:
        """Training's views are those of the record's own generator."""
        return {
            name: self.task.collate([self.task.example(row, train) for row in rows])
            for name, rows in self.records.items()
        }

    def loss(self, batches: dict[str, Batch]) -> Tensor:
        """The sum of the means, as the loop forms it."""
        total = torch.zeros(())
        for batch in batches.values():
            counts = self.task.targets(batch)
            for name, value in self.task(batch | {"step": 0, "steps": 1})["losses"].items():
                total = total + self.task.loss_weights.get(name, 1.0) * value / counts[name]
        return total


@pytest.fixture(params=CASES, ids=lambda case: f"{task_name(case[0])}-{case[1]}")
def case(request, root, vqkd_weights) -> Case:
    return Case(*request.param, root, vqkd_weights)


def test_records_make_batches_and_a_finite_loss(case):
    for batch in case.batches().values():
        counts = case.task.targets(batch)
        result = case.task(batch | {"step": 0, "steps": 1})
        assert result["losses"].keys() == counts.keys() and min(counts.values()) > 0
        assert all(
            value.ndim == 0 and value.isfinite() and value > 0
            for value in result["losses"].values()
        )
        assert {name.rpartition("/")[0] for name in result["metrics"]} <= counts.keys(), (
            "a metric is a mean over a loss's targets"
        )


def test_pictures_are_bytes_until_the_network_reads_them(case):
    """Normalised then, in the weights' type, by the plain arithmetic; floats are taken as they are,
    and give the same."""
    config = case.task.config.image
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (config.mean, config.std)
    )
    for batch in case.batches().values():
        assert all(
            batch[name].dtype == torch.uint8 for name in ("image", "token_image") if name in batch
        )
        if "image" in batch:
            pixels = case.task.eval().normalize_images(batch)
            plain = (batch["image"].double() / 255 - mean) / std
            plain = clear_padding(plain, batch["size"]) if "size" in batch else plain
            assert pixels.dtype == torch.float32 and pixels.is_contiguous()
            torch.testing.assert_close(pixels.double(), plain, rtol=0, atol=1e-6)
            normalised = batch | {"image": pixels}
            assert torch.equal(case.task.normalize_images(normalised), pixels)
            one, two = (case.task.outputs(each) for each in (batch, normalised))
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_fresh_network_guesses_evenly(case):
    """Initial logits near 0: the loss of a classifier starts near that of a coin."""
    for batch in case.batches().values():
        counts = case.task.targets(batch)
        for name, value in case.task(batch | {"step": 0, "steps": 1})["losses"].items():
            config: Any = case.task.config
            even = {
                "image": NUM_CODES,
                "pair_image": NUM_CODES,
                "text": config.model,
                "pair_text": config.model,
            }.get(name)
            if even is not None:
                classes = even.vocab_size if isinstance(even, ModelConfig) else even
                assert float(value.detach()) / counts[name] == pytest.approx(
                    math.log(classes), rel=0.15
                ), name


def test_every_parameter_learns_or_is_said_not_to(case):
    case.task.train()
    case.loss(case.batches()).backward()
    unused = tuple(f"{prefix}." for prefix in case.task.unused_parameters)
    still = {
        name for name, p in case.task.trainable_parameters() if p.grad is None or not p.grad.any()
    }
    assert still == {
        name for name, _ in case.task.trainable_parameters() if f"{name}.".startswith(unused)
    }
    for prefix, reason in case.task.unused_parameters.items():
        assert reason and any(f"{name}.".startswith(f"{prefix}.") for name in still), (
            f"{prefix} names nothing"
        )
    outside = {
        name
        for name, p in case.task.named_parameters()
        if name.split(".")[0] in case.task.frozen and p.grad is not None
    }
    assert not outside, "frozen parts get no gradient"


def test_eight_records_can_be_learnt(case):
    config = OptimConfig(lr=1e-3, weight_decay=0.0, warmup_steps=20, clip=3.0)
    optimizer = make_optimizer(case.task.train(), config)
    steps = ENOUGH.get(task_name(case.kind), 60)
    batches = case.batches()
    start = float(case.loss(batches).detach())
    for step in range(steps):
        set_learning_rate(
            optimizer, compute_learning_rate(step, steps, config.warmup_steps, config)
        )
        case.loss(batches).backward()
        clip_gradients(case.task.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    case.task.eval()
    with torch.no_grad():
        assert float(case.loss(batches)) < 0.5 * start
        if case.kind.headline == "accuracy":
            ((name, batch),) = batches.items()
            assert case.kind.score(case.task.predict(batch), case.records[name])["accuracy"] == 1.0


def test_predictions_are_json_with_ids_and_score_has_its_headline(case, tmp_path):
    case.task.eval()
    for name, batch in case.views().items():
        with torch.no_grad():
            predictions = case.task.predict(batch)
        assert [prediction["id"] for prediction in predictions] == [
            str(record["id"]) for record in case.records[name]
        ]
        write_predictions(tmp_path / "predictions.jsonl", predictions)
        again = list(read_predictions(tmp_path / "predictions.jsonl"))
        scores = case.kind.score(again, case.records[name])
        assert case.kind.headline in scores and all(
            isinstance(value, float) and math.isfinite(value) for value in scores.values()
        )
        assert case.kind.score(predictions[::-1], case.records[name]) == pytest.approx(scores), (
            "they are joined by id"
        )
        for wrong in (
            predictions[1:],
            [*predictions, predictions[0]],
            [*predictions[1:], predictions[0] | {"id": "stranger"}],
        ):
            with pytest.raises(ValueError, match="prediction"):
                case.kind.score(wrong, case.records[name])


def test_saved_and_loaded_it_says_the_same(case, tmp_path):
    save_weights(case.task.eval(), tmp_path / "weights")
    again = load_weights(tmp_path / "weights").eval()
    assert again.config == case.task.config and type(again) is case.kind
    for batch in case.batches().values():
        with torch.no_grad():
            outputs, wanted = again.outputs(batch), case.task.outputs(batch)
        assert outputs.keys() == wanted.keys() and all(
            torch.equal(outputs[name], wanted[name]) for name in wanted
        )


def by_hand(task: Any, batch: Batch) -> dict[str, Tensor]:
    """The losses of `forward` from `outputs` alone, summed over their targets."""
    outputs = task.outputs(batch)
    if "image_features" in outputs:
        similarities = (
            task.logit_scale.exp() * outputs["image_features"] @ outputs["text_features"].T
        )
        labels = torch.arange(len(similarities))
        return {
            "loss": sum(
                F.cross_entropy(each, labels, reduction="sum")
                for each in (similarities, similarities.T)
            )
            / 2
        }
    if "text_target" in batch and "logits" in outputs:
        assert task.config.label_smoothing == 0
        return {
            "loss": F.cross_entropy(
                outputs["logits"].transpose(1, 2), batch["text_target"], reduction="sum"
            )
        }
    if "logits" in outputs and batch["target"].ndim == 1:
        return {"loss": F.cross_entropy(outputs["logits"], batch["target"], reduction="sum")}
    if "logits" in outputs:
        return {
            "loss": F.binary_cross_entropy_with_logits(
                outputs["logits"], batch["target"], reduction="sum"
            )
        }
    if "codes" in outputs:
        images = batch["token_image"]
        features, unit = (
            task.backbone.decode(outputs["codes"]),
            F.normalize(task.backbone.encode(images), dim=-1),
        )
        chosen = task.backbone.quantizer.codebook[outputs["codes"]]
        return {
            "reconstruction": (
                1 - F.cosine_similarity(features, task.teacher.extract_features(images), dim=-1)
            ).sum(),
            "commitment": ((unit - chosen) ** 2).mean(-1).sum(),
        }
    pair, losses = "pair_" if len(outputs) == 2 else "", {}
    if "image_logits" in outputs:
        targets = torch.where(batch["image_mask"], task.compute_codes(batch), -100)
        losses[f"{pair}image"] = F.cross_entropy(
            outputs["image_logits"].transpose(1, 2), targets, reduction="sum"
        )
    if "text_logits" in outputs:
        losses[f"{pair}text"] = F.cross_entropy(
            outputs["text_logits"].transpose(1, 2), batch["text_target"], reduction="sum"
        )
    return losses


def test_outputs_tell_the_same_loss_as_forward(case):
    if case.dense:
        pytest.skip(
            "its loss is of boxes or points that are drawn: tests/detection and "
            "tests/segmentation compare it"
        )
    case.task.eval()
    for batch in case.batches().values():
        losses = case.task(batch | {"step": 0, "steps": 1})["losses"]
        with torch.no_grad():
            expected = by_hand(case.task, batch)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(losses[name].detach(), value, rtol=1e-5, atol=1e-4)


def test_examples_depend_on_their_generator_alone(case):
    for rows in case.records.values():
        for train in (False, True):
            one, two = (
                case.task.example(rows[0], train, rng=np.random.default_rng(3)) for _ in range(2)
            )
            assert one.keys() == two.keys()
            assert all(
                torch.equal(one[key], two[key]) for key in one if isinstance(one[key], Tensor)
            )
        fixed, again = (case.task.example(rows[0], False) for _ in range(2))
        assert all(
            torch.equal(fixed[key], again[key]) for key in fixed if isinstance(fixed[key], Tensor)
        )


def test_the_task_is_found_by_its_name(case):
    from beit3 import task as contract

    assert contract.load_task(task_name(case.kind)) is case.kind
    assert contract.load_task(case.kind.__module__) is case.kind, (
        "a dotted path works for tasks of others"
    )
    assert "demo" in case.kind.recipes and all(
        isinstance(r.task, case.kind.Config) for r in case.kind.recipes.values()
    )
