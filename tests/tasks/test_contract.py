"""Tests of every task with recipes: what the loop, the weights and the predictor need of it.

New tasks are found by their files.
"""

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
from beit3.task import Batch, Task, grow_vocabulary, load_task, task_name
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
"""Networks as the paper describes them and as they were released."""
DENSE = ("coco", "ade20k")
"""Tasks whose loss needs training examples, and draws boxes or points at random."""
NUM_RECORDS = 8
NUM_STEPS = {"vqa": 150}
"""Steps in which a task learns eight records; 60 for tasks that are not named."""


def list_cases() -> list[tuple[type[Task], str]]:
    """Returns pairs of a task and a form of the network; dense tasks are tested in one form."""
    cases = []
    for kind in list_trainable_tasks():
        if not isinstance(kind.recipes["demo"].task.model, ModelConfig):
            cases.append((kind, "own"))
        elif task_name(kind) in DENSE:
            cases.append((kind, "paper"))
        else:
            cases += [(kind, form) for form in FORMS]
    return cases


def make_config(kind: type[Task], form: str, visual_tokenizer: Path) -> TaskConfig:
    """Returns the demo's config with a smaller network of this form.

    Pretraining masks both modalities of a pair.
    """
    config: Any = kind.recipes["demo"].task
    if form in FORMS:
        model = replace(FORMS[form], depth=2, ffn_dim=256, final_norm=config.model.final_norm)
    else:
        model = replace(config.model, dim=32, depth=1, num_heads=2, ffn_dim=64, num_codes=NUM_CODES)
    fields: dict[str, Any] = {"model": model}
    if task_name(kind) == "pretrain":
        fields["pair_masking"] = "both"
        fields["visual_tokenizer"] = str(visual_tokenizer)
        fields["num_codes"] = NUM_CODES
    if task_name(kind) == "ade20k":
        # With gates of 0 the injectors would learn from the second step on only.
        fields["adapter"] = replace(
            config.adapter, num_interactions=2, num_extra_extractors=1, gate_init=0.01
        )
    return replace(config, **fields)


class Case:
    """A task with the first training records of each of its sources."""

    def __init__(self, kind: type[Task], form: str, root: Path, visual_tokenizer: Path):
        self.kind = kind
        tokenizer = TextTokenizer(root / "text.model")
        config = grow_vocabulary(make_config(kind, form, visual_tokenizer), tokenizer)
        self.task = kind(kind.configure(config, root), tokenizer=tokenizer)
        self.task.init_weights(0)
        if self.is_dense:
            self._replace_zeros()
        self.records = {}
        for source in kind.sources:
            directory = root / kind.records_from.get(source, task_name(kind)) / source
            records = RecordDataset(directory / "train.jsonl", root)
            self.records[source] = list(islice(self._select_records(records), NUM_RECORDS))

    @property
    def is_dense(self) -> bool:
        return task_name(self.kind) in DENSE

    def _replace_zeros(self) -> None:
        """Initializes parameters that start at 0, through which no gradient passes at first."""
        for index, (_, parameter) in enumerate(self.task.trainable_parameters()):
            if not parameter.any():
                parameter.data.normal_(std=0.01, generator=torch.Generator().manual_seed(index))

    def _select_records(self, records: RecordDataset) -> Iterator[dict[str, Any]]:
        """Yields records, one per image where the loss compares examples with each other.

        Captions of one image cannot be told apart.
        """
        images = set()
        for record in records:
            if not self.kind.compares_examples or record["image"] not in images:
                yield record
            images.add(record.get("image"))

    def make_batches(self, train: bool = False) -> dict[str, Batch]:
        """Returns a batch of each source; random numbers follow from the records' ids."""
        return {
            source: self.task.collate([self.task.example(record, train) for record in records])
            for source, records in self.records.items()
        }

    def make_loss_batches(self) -> dict[str, Batch]:
        """Returns batches that hold all fields that the loss needs, the same at every call."""
        return self.make_batches(train=self.is_dense)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.task({**batch, "step": 0, "steps": 1})["losses"]

    def compute_total_loss(self, batches: dict[str, Batch]) -> Tensor:
        """Returns the weighted sum of the mean losses, as the loop computes it."""
        total = torch.zeros(())
        for batch in batches.values():
            counts = self.task.targets(batch)
            for name, loss in self.compute_losses(batch).items():
                total = total + self.task.loss_weights.get(name, 1.0) * loss / counts[name]
        return total


@pytest.fixture(params=list_cases(), ids=lambda case: f"{task_name(case[0])}-{case[1]}")
def case(request, root, vqkd_weights) -> Case:
    return Case(*request.param, root, vqkd_weights)


# Examples and batches -----------------------------------------------------------------------------


def test_records_give_finite_losses_with_counts(case):
    for batch in case.make_loss_batches().values():
        counts = case.task.targets(batch)
        result = case.task({**batch, "step": 0, "steps": 1})
        assert result["losses"].keys() == counts.keys() and min(counts.values()) > 0
        for loss in result["losses"].values():
            assert loss.ndim == 0 and loss.isfinite() and loss > 0
        metric_losses = {name.rpartition("/")[0] for name in result["metrics"]}
        assert metric_losses <= counts.keys(), "a metric is a mean over a loss's targets"


def test_images_are_uint8_until_the_task_normalizes_them(case):
    """Normalized images are accepted as well, and give the same outputs."""
    config = case.task.config.image
    mean = torch.tensor(config.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(config.std, dtype=torch.float64).view(3, 1, 1)
    for batch in case.make_loss_batches().values():
        for name in ("image", "token_image"):
            assert name not in batch or batch[name].dtype == torch.uint8
        if "image" not in batch:
            continue
        pixels = case.task.eval().normalize_images(batch)
        expected = (batch["image"].double() / 255 - mean) / std
        if "size" in batch:
            expected = clear_padding(expected, batch["size"])
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-6)
        normalized_batch = {**batch, "image": pixels}
        assert torch.equal(case.task.normalize_images(normalized_batch), pixels)
        outputs, expected_outputs = case.task.outputs(normalized_batch), case.task.outputs(batch)
        assert all(torch.equal(outputs[name], expected_outputs[name]) for name in outputs)


@pytest.mark.parametrize("train", [False, True])
def test_examples_depend_on_their_generator_alone(case, train):
    for records in case.records.values():
        first, second = (
            case.task.example(records[0], train, rng=np.random.default_rng(3)) for _ in range(2)
        )
        check_same_tensors(first, second)
        first, second = (case.task.example(records[0], train) for _ in range(2))
        check_same_tensors(first, second)


def check_same_tensors(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert not isinstance(value, Tensor) or torch.equal(value, second[name]), name


# Training -----------------------------------------------------------------------------------------


def test_a_new_network_predicts_all_codes_and_tokens_alike(case):
    """Initial logits are near 0, so the loss of K classes starts near log K."""
    vocab_size = getattr(case.task.config.model, "vocab_size", 0)
    num_classes = {
        "image": NUM_CODES,
        "pair_image": NUM_CODES,
        "text": vocab_size,
        "pair_text": vocab_size,
    }
    for batch in case.make_loss_batches().values():
        counts = case.task.targets(batch)
        for name, loss in case.compute_losses(batch).items():
            if name in num_classes:
                expected = pytest.approx(math.log(num_classes[name]), rel=0.15)
                assert float(loss.detach()) / counts[name] == expected, name


def test_every_parameter_gets_a_gradient_or_is_declared_unused(case):
    case.task.train()
    case.compute_total_loss(case.make_loss_batches()).backward()
    unused = tuple(f"{prefix}." for prefix in case.task.unused_parameters)
    for name, parameter in case.task.trainable_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient != f"{name}.".startswith(unused), name
    names = [f"{name}." for name, _ in case.task.trainable_parameters()]
    for prefix, reason in case.task.unused_parameters.items():
        assert reason
        assert any(name.startswith(f"{prefix}.") for name in names), f"{prefix} names nothing"
    for name, parameter in case.task.named_parameters():
        is_frozen = name.split(".")[0] in case.task.frozen
        assert not is_frozen or parameter.grad is None, name


def test_building_leaves_no_memory_undefined(case):
    """In deterministic mode torch fills memory that nothing was written to with NaN."""
    tokenizer = case.task.tokenizer if case.task.has_tokenizer else None
    torch.use_deterministic_algorithms(True)
    try:
        task = type(case.task)(case.task.config, tokenizer=tokenizer)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in (*task.named_parameters(), *task.named_buffers()):
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name


def test_eight_records_can_be_learned(case):
    config = OptimConfig(lr=1e-3, weight_decay=0.0, warmup_steps=20, clip=3.0)
    optimizer = make_optimizer(case.task.train(), config)
    num_steps = NUM_STEPS.get(task_name(case.kind), 60)
    batches = case.make_loss_batches()
    initial_loss = float(case.compute_total_loss(batches).detach())
    for step in range(num_steps):
        lr = compute_learning_rate(step, num_steps, config.warmup_steps, config)
        set_learning_rate(optimizer, lr)
        case.compute_total_loss(batches).backward()
        clip_gradients(case.task.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    case.task.eval()
    with torch.no_grad():
        assert float(case.compute_total_loss(batches)) < 0.5 * initial_loss
        if case.kind.headline == "accuracy":
            ((source, batch),) = batches.items()
            scores = case.kind.score(case.task.predict(batch), case.records[source])
            assert scores["accuracy"] == 1.0


# The loss once more, from the outputs -------------------------------------------------------------


def compute_losses_from_outputs(task: Any, batch: Batch) -> dict[str, Tensor]:
    """Returns the losses of `forward`, summed over their targets, from `outputs` alone."""
    outputs = task.outputs(batch)
    if "image_features" in outputs:
        return {"loss": compute_contrastive_loss(task, outputs)}
    if "codes" in outputs:
        return compute_vqkd_losses(task, batch, outputs["codes"])
    if "logits" not in outputs:
        return compute_pretraining_losses(task, batch, outputs)
    logits = outputs["logits"]
    if "text_target" in batch:
        assert task.config.label_smoothing == 0
        logits, target = logits.transpose(1, 2), batch["text_target"]
    else:
        target = batch["target"]
        if target.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            return {"loss": loss}
    return {"loss": F.cross_entropy(logits, target, reduction="sum")}


def compute_contrastive_loss(task: Any, features: dict[str, Tensor]) -> Tensor:
    scale = task.logit_scale.exp()
    similarities = scale * features["image_features"] @ features["text_features"].T
    labels = torch.arange(len(similarities))
    image_loss = F.cross_entropy(similarities, labels, reduction="sum")
    text_loss = F.cross_entropy(similarities.T, labels, reduction="sum")
    return (image_loss + text_loss) / 2


def compute_vqkd_losses(task: Any, batch: Batch, codes: Tensor) -> dict[str, Tensor]:
    images = batch["token_image"]
    targets = task.teacher.extract_features(images)
    distance = 1 - F.cosine_similarity(task.backbone.decode(codes), targets, dim=-1)
    encoded = F.normalize(task.backbone.encode(images), dim=-1)
    chosen = task.backbone.quantizer.codebook[codes]
    commitment = ((encoded - chosen) ** 2).mean(-1)
    return {"reconstruction": distance.sum(), "commitment": commitment.sum()}


def compute_pretraining_losses(
    task: Any, batch: Batch, outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    prefix, targets = "pair_" if len(outputs) == 2 else "", {}
    if "image_logits" in outputs:
        targets["image"] = torch.where(batch["image_mask"], task.compute_codes(batch), -100)
    if "text_logits" in outputs:
        targets["text"] = batch["text_target"]
    losses = {}
    for modality, target in targets.items():
        logits = outputs[f"{modality}_logits"].transpose(1, 2)
        losses[f"{prefix}{modality}"] = F.cross_entropy(logits, target, reduction="sum")
    return losses


def test_losses_follow_from_outputs(case):
    if case.is_dense:
        pytest.skip(
            "the loss draws boxes or points: tests/detection and tests/segmentation compare it"
        )
    case.task.eval()
    for batch in case.make_loss_batches().values():
        losses = case.compute_losses(batch)
        with torch.no_grad():
            expected = compute_losses_from_outputs(case.task, batch)
        assert losses.keys() == expected.keys()
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name].detach(), loss, rtol=1e-5, atol=1e-4)


# Predictions and weights --------------------------------------------------------------------------


def test_predictions_are_json_and_are_joined_to_records_by_id(case, tmp_path):
    case.task.eval()
    for source, batch in case.make_batches().items():
        records = case.records[source]
        with torch.no_grad():
            predictions = case.task.predict(batch)
        ids = [prediction["id"] for prediction in predictions]
        assert ids == [str(record["id"]) for record in records]

        write_predictions(tmp_path / "predictions.jsonl", predictions)
        read = list(read_predictions(tmp_path / "predictions.jsonl"))
        scores = case.kind.score(read, records)
        assert case.kind.headline in scores
        for value in scores.values():
            assert isinstance(value, float) and math.isfinite(value)
        assert case.kind.score(predictions[::-1], records) == pytest.approx(scores)

        missing = predictions[1:]
        repeated = [*predictions, predictions[0]]
        unknown = [*predictions[1:], {**predictions[0], "id": "unknown"}]
        for wrong in (missing, repeated, unknown):
            with pytest.raises(ValueError, match="prediction"):
                case.kind.score(wrong, records)


def test_loaded_weights_give_the_same_outputs(case, tmp_path):
    save_weights(case.task.eval(), tmp_path / "weights")
    loaded = load_weights(tmp_path / "weights").eval()
    assert loaded.config == case.task.config and type(loaded) is case.kind
    for batch in case.make_loss_batches().values():
        with torch.no_grad():
            outputs, expected = loaded.outputs(batch), case.task.outputs(batch)
        check_same_tensors(outputs, expected)


def test_the_task_is_loaded_by_its_name(case):
    assert load_task(task_name(case.kind)) is case.kind
    assert load_task(case.kind.__module__) is case.kind, "a dotted path works as well"
    assert "demo" in case.kind.recipes
    for recipe in case.kind.recipes.values():
        assert isinstance(recipe.task, case.kind.Config)
