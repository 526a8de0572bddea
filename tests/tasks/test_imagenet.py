"""Classes by a linear head and by their names, in passes of any size."""

import json
from dataclasses import replace
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
from tests.world_root import SMALL, make_finetuning_recipe


def built(root, **fields) -> ImageNet:
    tokenizer = TextTokenizer(root / "text.model")
    config = replace(make_finetuning_recipe("imagenet", root).task, **fields)
    task = ImageNet(
        ImageNet.configure(grow_vocabulary(config, tokenizer), root), tokenizer=tokenizer
    )
    task.init_weights(0)
    return task.eval()


def by_names(root, **fields) -> ImageNet:
    return built(root, model=SMALL, head="names", **fields)


@pytest.fixture
def batch(root):
    task = built(root)
    return task.collate(
        [
            task.example(row, False)
            for row in list(RecordDataset(root / "imagenet/main/train.jsonl", root))[:6]
        ]
    )


def test_names_one_by_one_give_the_same_logits(root, batch):
    """Against each name encoded alone, without padding."""
    task = by_names(root, prompt="a {}")
    with torch.no_grad():
        image = F.normalize(
            task.image_projection(task.backbone(image=task.normalize_images(batch)).first("image")),
            dim=-1,
        )
        names = []
        for name in task.config.classes:
            text = torch.tensor([task.tokenizer.encode(f"a {name}")])
            names.append(
                F.normalize(task.text_projection(task.backbone(text=text).first("text")), dim=-1)[0]
            )
        expected = image @ torch.stack(names).T / 0.07
        torch.testing.assert_close(task.outputs(batch)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_passes_change_neither_logits_nor_gradients(root, batch, size):
    """Recomputed passes of a few names against one pass of all."""
    found = []
    for passes in (512, size):
        task = by_names(root, names_per_pass=passes).double().train()
        loss = task(batch)["losses"]["loss"]
        loss.backward()
        found.append(
            (
                loss.detach(),
                {name: p.grad for name, p in task.named_parameters() if p.grad is not None},
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_names_are_encoded_once_for_an_evaluation_and_anew_after_training(root, batch):
    task = by_names(root)
    with torch.no_grad():
        task.predict(batch | {"id": list("abcdef")})
        first = task.encode_class_names()
        assert task.encode_class_names() is first
        task.train().eval()
        task.text_projection.weight.mul_(-1)
        assert not torch.allclose(task.encode_class_names(), first)


def test_the_linear_head_reads_the_mean_of_the_patches(root, batch):
    task = built(root)
    with torch.no_grad():
        states = task.backbone(image=task.normalize_images(batch)).of("image")
        expected = task.head(task.fc_norm(states[:, 1:].mean(1)))
        torch.testing.assert_close(task.outputs(batch)["logits"], expected)


def test_mixed_and_smoothed_targets(root, batch):
    """In training the loss is that of soft targets; in evaluation the plain one."""
    task = built(root, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    with torch.no_grad():
        plain = task(batch)["losses"]["loss"]
        torch.testing.assert_close(
            plain, F.cross_entropy(task.outputs(batch)["logits"], batch["target"], reduction="sum")
        )
        task.train()
        torch.manual_seed(0)
        one = task(batch)["losses"]["loss"]
        torch.manual_seed(0)
        assert torch.equal(task(batch)["losses"]["loss"], one) and not torch.equal(one, plain)


def test_erased_boxes_hold_noise_in_the_networks_pixels(root, batch):
    """The bytes stay whole; on the device normalised pixels get what was drawn for them, the rest
    is as without erasing."""
    task = built(root, erasing=0.5)
    rows = list(RecordDataset(root / "imagenet/main/train.jsonl", root))[:24]
    examples = [task.example(row, True) for row in rows]
    drawn = task.collate(examples)
    boxes = drawn.pop("erased")
    plain, found = task.normalize_images(drawn), task.normalize_images(drawn | {"erased": boxes})
    assert 4 < sum(box is not None for box in boxes) < 20
    for before, after, box in zip(plain, found, boxes, strict=True):
        if box is not None:
            top, left, noise = box
            before[:, top : top + noise.shape[1], left : left + noise.shape[2]] = torch.from_numpy(
                noise
            )
        assert torch.equal(after, before)
    assert "erased" not in batch and "erased" not in built(root, erasing=0.0).example(
        rows[0], True
    ), "evaluation erases nothing"


def test_wrong_labels_lists_and_heads(root, tmp_path):
    task = built(root)
    row = RecordDataset(root / "imagenet/main/train.jsonl", root)[0]
    with pytest.raises(ValueError, match="label 10 is none of the 10 classes"):
        task.example(row | {"label": 10}, False)
    with pytest.raises(ValueError, match="2 class names for 10 classes"):
        ImageNet(replace(task.config, classes=("a", "b")))
    with pytest.raises(ValueError, match="final_norm must be True with task.head names"):
        ImageNet(replace(task.config, head="names"))
    with pytest.raises(ValueError, match="no class names at"):
        read_class_names(tmp_path / "classes.txt")
    nameless = ImageNet(
        ImageNetConfig(model=replace(TINY, final_norm=True), head="names", num_classes=3)
    )
    with pytest.raises(ValueError, match="needs the class names"):
        nameless.encode_class_names()


def test_scores_and_names_of_predictions(root, batch):
    task = built(root)
    records = list(RecordDataset(root / "imagenet/main/train.jsonl", root))[:6]
    predictions = task.predict(batch)
    assert (
        predictions[0]["name"] == task.config.classes[predictions[0]["label"]]
        and len(predictions[0]["candidates"]) == 5
    )
    perfect = [
        p | {"candidates": [{"label": r["label"]}]}
        for p, r in zip(predictions, records, strict=True)
    ]
    assert ImageNet.score(perfect, records)["accuracy"] == 1.0
    second = [
        p | {"candidates": [{"label": -1}, {"label": r["label"]}]}
        for p, r in zip(predictions, records, strict=True)
    ]
    scores = ImageNet.score(second, records)
    assert scores["accuracy"] == 0 and scores["top5"] == 1


def test_kept_names_follow_weights_lists_and_gradients(root, batch):
    """Loading, another list, or a forward with gradients never sees what an earlier evaluation
    kept."""
    task = by_names(root)
    with torch.no_grad():
        first = task.encode_class_names()
        state = {
            name: -value if name == "text_projection.weight" else value
            for name, value in task.state_dict().items()
        }
        task.load_state_dict(state)
        torch.testing.assert_close(task.encode_class_names(), -first)
        task.config = replace(task.config, classes=task.config.classes[:2], num_classes=2)
        assert len(task.encode_class_names()) == 2
    assert task.encode_class_names().requires_grad
    task.train()
    with torch.no_grad():
        task.encode_class_names()
    task(batch | {"target": batch["target"] % 2})["losses"]["loss"].backward()
    assert task.text_projection.weight.grad.any()


def test_a_linear_head_without_names_counts_the_labels(tmp_path):
    """Upstream's index folders have no classes.txt; where there is one it counts, and heads by name
    need it."""
    rows = [{"image_path": f"train/{label}.JPEG", "label": label} for label in (0, 6, 3)]
    (tmp_path / "imagenet.train.index.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    config = ImageNetConfig(classes=("of", "other", "weights"), num_classes=3)
    found: Any = ImageNet.configure(config, tmp_path)
    assert (found.num_classes, found.classes) == (7, ())
    with pytest.raises(ValueError, match="no class names at"):
        ImageNet.configure(replace(config, head="names"), tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    found = ImageNet.configure(config, tmp_path)
    assert (found.num_classes, found.classes) == (2, ("a", "b"))


def test_names_that_say_little_are_reported():
    assert describe_doubtful_names(("tench", "crane bird")) == {}
    said = describe_doubtful_names(("n01440764", "crane", "crane"))["names"]
    assert said.startswith("1 are WordNet's numbers, such as n01440764") and said.endswith(
        "1 stand for several classes, such as crane"
    )
