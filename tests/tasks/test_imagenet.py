"""Tests of image classification by a linear head and by class names."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beit3.data.loader import RecordDataset
from beit3.data.stores.label_names import read_class_names
from beit3.model.config import TINY
from beit3.task import grow_vocabulary
from beit3.tasks.imagenet import ImageNet, ImageNetConfig, describe_doubtful_names
from beit3.tokenizer.text import TextTokenizer
from beit3.training.step import backward, sum_targets
from tests.world_root import SMALL, make_finetuning_recipe


def make_task(root, **fields) -> ImageNet:
    tokenizer = TextTokenizer(root / "text.model")
    config = replace(make_finetuning_recipe("imagenet", root).task, **fields)
    config = ImageNet.configure(grow_vocabulary(config, tokenizer), root)
    task = ImageNet(config, tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


def make_names_task(root, **fields) -> ImageNet:
    """Returns a task that classifies by class names."""
    return make_task(root, model=SMALL, head="names", **fields)


def read_train_records(root, count: int) -> list[dict]:
    return list(RecordDataset(root / "imagenet/main/train.jsonl", root))[:count]


@pytest.fixture
def batch(root):
    task = make_task(root)
    return task.collate([task.example(record, False) for record in read_train_records(root, 6)])


# Class names --------------------------------------------------------------------------------------


def test_logits_are_those_of_names_encoded_one_by_one(root, batch):
    """Each name is encoded alone, without padding."""
    task = make_names_task(root, prompt="a {}")
    with torch.no_grad():
        image_states = task.backbone(image=task.normalize_images(batch)).first("image")
        image_features = F.normalize(task.image_projection(image_states), dim=-1)
        name_features = []
        for name in task.config.classes:
            text = torch.tensor([task.tokenizer.encode(f"a {name}")])
            projected = task.text_projection(task.backbone(text=text).first("text"))
            name_features.append(F.normalize(projected, dim=-1)[0])
        expected = image_features @ torch.stack(name_features).T / 0.07
        torch.testing.assert_close(task.outputs(batch)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names_per_pass", [1, 3, 10])
def test_names_per_pass_changes_neither_loss_nor_gradients(root, batch, names_per_pass):
    """Compares recomputed passes of a few names with one pass of all names."""
    losses, gradients = [], []
    for size in (512, names_per_pass):
        task = make_names_task(root, names_per_pass=size).double().train()
        loss = task(batch)["losses"]["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in task.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for name, expected in gradients[0].items():
        gradient = gradients[1][name]
        if expected is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("names_per_pass", [3, 512])
def test_names_are_encoded_once_a_step_with_the_gradients_of_one_batch(
    root, batch, monkeypatch, names_per_pass
):
    """Micro-batches of 1, 2 and 3 images share the features of the names and their gradient."""
    encode, num_encoded = ImageNet.encode_class_names, 0

    def count_and_encode(self: ImageNet) -> torch.Tensor:
        nonlocal num_encoded
        num_encoded += 1
        return encode(self)

    monkeypatch.setattr(ImageNet, "encode_class_names", count_and_encode)
    results = []
    for bounds in ((0, 6), (0, 1, 3, 6)):
        task = make_names_task(root, names_per_pass=names_per_pass).double().train()
        parts = [
            {key: value[start:end] for key, value in batch.items()}
            for start, end in pairwise(bounds)
        ]
        totals = sum_targets(task, parts)
        values, _ = backward(task, parts, totals, torch.autocast("cpu", enabled=False))
        gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
        results.append((values, gradients))
    assert num_encoded == 2, "once for each of the two steps"
    (expected_values, expected_gradients), (values, gradients) = results
    assert values == pytest.approx(expected_values, rel=1e-12)
    assert gradients["text_projection.weight"].abs().max() > 1e-4
    for name, expected in expected_gradients.items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_an_evaluation_encodes_names_once_until_training_changes_the_weights(root, batch):
    task = make_names_task(root)
    with torch.no_grad():
        task.predict(batch | {"id": list("abcdef")})
        features = task.encode_class_names()
        assert task.encode_class_names() is features
        task.train().eval()
        task.text_projection.weight.mul_(-1)
        assert not torch.allclose(task.encode_class_names(), features)


def test_cached_names_follow_weights_lists_and_gradients(root, batch):
    """Loading, another list and a forward with gradients never use features of an earlier
    evaluation."""
    task = make_names_task(root)
    with torch.no_grad():
        features = task.encode_class_names()
        state = dict(task.state_dict())
        state["text_projection.weight"] = -state["text_projection.weight"]
        task.load_state_dict(state)
        torch.testing.assert_close(task.encode_class_names(), -features)
        task.config = replace(task.config, classes=task.config.classes[:2], num_classes=2)
        assert len(task.encode_class_names()) == 2
    assert task.encode_class_names().requires_grad
    task.train()
    with torch.no_grad():
        task.encode_class_names()
    task(batch | {"target": batch["target"] % 2})["losses"]["loss"].backward()
    assert task.text_projection.weight.grad.any()


def test_doubtful_names_are_reported():
    assert describe_doubtful_names(("tench", "crane bird")) == {}
    remark = describe_doubtful_names(("n01440764", "crane", "crane"))["names"]
    assert remark.startswith("1 are WordNet's numbers, such as n01440764")
    assert remark.endswith("1 stand for several classes, such as crane")


# Linear head, targets and augmentation ------------------------------------------------------------


def test_the_linear_head_reads_the_mean_of_the_patches(root, batch):
    task = make_task(root)
    with torch.no_grad():
        states = task.backbone(image=task.normalize_images(batch)).of("image")
        expected = task.head(task.fc_norm(states[:, 1:].mean(1)))
        torch.testing.assert_close(task.outputs(batch)["logits"], expected)


def test_targets_are_mixed_and_smoothed_in_training_only(root, batch):
    task = make_task(root, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    with torch.no_grad():
        evaluation_loss = task(batch)["losses"]["loss"]
        logits = task.outputs(batch)["logits"]
        expected = F.cross_entropy(logits, batch["target"], reduction="sum")
        torch.testing.assert_close(evaluation_loss, expected)
        task.train()
        torch.manual_seed(0)
        training_loss = task(batch)["losses"]["loss"]
        torch.manual_seed(0)
        assert torch.equal(task(batch)["losses"]["loss"], training_loss)
        assert not torch.equal(training_loss, evaluation_loss)


def test_erased_boxes_are_filled_with_noise_after_normalization(root, batch):
    """The bytes stay as they are, and so do pixels outside the boxes."""
    task = make_task(root, erasing=0.5)
    records = read_train_records(root, 24)
    train_batch = task.collate([task.example(record, True) for record in records])
    boxes = train_batch.pop("erased")
    assert 4 < sum(box is not None for box in boxes) < 20
    expected = task.normalize_images(train_batch)
    for pixels, box in zip(expected, boxes, strict=True):
        if box is not None:
            top, left, noise = box
            bottom, right = top + noise.shape[1], left + noise.shape[2]
            pixels[:, top:bottom, left:right] = torch.from_numpy(noise)
    assert torch.equal(task.normalize_images(train_batch | {"erased": boxes}), expected)
    assert "erased" not in batch, "evaluation erases nothing"
    assert "erased" not in make_task(root, erasing=0.0).example(records[0], True)


# Errors, scores and configuration -----------------------------------------------------------------


def test_wrong_labels_class_lists_and_heads_are_refused(root, tmp_path):
    task = make_task(root)
    (record,) = read_train_records(root, 1)
    with pytest.raises(ValueError, match="label 10 is none of the 10 classes"):
        task.example(record | {"label": 10}, False)
    with pytest.raises(ValueError, match="2 class names for 10 classes"):
        ImageNet(replace(task.config, classes=("a", "b")))
    with pytest.raises(ValueError, match="final_norm must be True with task.head names"):
        ImageNet(replace(task.config, head="names"))
    with pytest.raises(ValueError, match="no class names at"):
        read_class_names(tmp_path / "classes.txt")
    config = ImageNetConfig(model=replace(TINY, final_norm=True), head="names", num_classes=3)
    with pytest.raises(ValueError, match="needs the class names"):
        ImageNet(config).encode_class_names()


def test_predictions_are_named_and_scored_by_rank(root, batch):
    task = make_task(root)
    records = read_train_records(root, 6)
    predictions = task.predict(batch)
    first = predictions[0]
    assert first["name"] == task.config.classes[first["label"]]
    assert len(first["candidates"]) == 5

    def predict_label_at(rank: int) -> list[dict[str, Any]]:
        wrong = [{"label": -1}] * rank
        return [
            {"id": str(record["id"]), "candidates": [*wrong, {"label": record["label"]}]}
            for record in records
        ]

    assert ImageNet.score(predict_label_at(0), records)["accuracy"] == 1.0
    scores = ImageNet.score(predict_label_at(1), records)
    assert scores["accuracy"] == 0 and scores["top5"] == 1


def test_a_linear_head_counts_the_labels_where_there_are_no_names(tmp_path):
    """Upstream's index folders have no classes.txt. Where there is one, it counts the classes; the
    names head needs it."""
    lines = [
        json.dumps({"image_path": f"train/{label}.JPEG", "label": label}) for label in (0, 6, 3)
    ]
    (tmp_path / "imagenet.train.index.jsonl").write_text("\n".join(lines) + "\n")
    config = ImageNetConfig(classes=("of", "other", "weights"), num_classes=3)
    configured: Any = ImageNet.configure(config, tmp_path)
    assert (configured.num_classes, configured.classes) == (7, ())
    with pytest.raises(ValueError, match="no class names at"):
        ImageNet.configure(replace(config, head="names"), tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    configured = ImageNet.configure(config, tmp_path)
    assert (configured.num_classes, configured.classes) == (2, ("a", "b"))
