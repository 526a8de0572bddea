"""Tests of the visual tokenizer as a task: its teacher, its scores, and BEiT v2's numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY
from beit3.predict import load
from beit3.tasks import vqkd
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.teacher import Gradients
from beit3.training.evaluate import evaluate


@pytest.fixture
def task(vqkd_weights) -> VQKD:
    task = load(vqkd_weights).task
    assert isinstance(task, VQKD)
    return task


def open_val_records(root: Path) -> RecordDataset:
    return RecordDataset(locate_split(root, "vqkd", "main", "val"), root)


def test_loaded_weights_have_the_scores_of_the_run(task, root, vqkd_weights):
    """The default teacher needs no file, so an evaluation computes the distance too."""
    scores = json.loads((vqkd_weights.parent / "scores.json").read_text())
    assert {
        "step": 10,
        **evaluate(task, {"main": open_val_records(root)}, batch_size=3),
    } == pytest.approx(scores, rel=1e-5)


def test_the_distance_is_the_cosine_distance_to_the_teacher(task, root):
    batch = task.collate([task.example(record, False) for record in open_val_records(root)])
    teacher = Gradients(8).extract_features(batch["token_image"])
    decoded = task.backbone.decode(task.outputs(batch)["codes"])
    with torch.no_grad():
        for prediction, ours, theirs in zip(task.predict(batch), decoded, teacher, strict=True):
            slow = np.mean(
                [
                    1 - float(a @ b / (a.norm() * b.norm()))
                    for a, b in zip(ours, theirs, strict=True)
                ]
            )
            assert prediction["distance"] == pytest.approx(slow, abs=1e-5)


def test_losses_are_counted_by_patches(task, root):
    batch = task.collate([task.example(record, False) for record in open_val_records(root)][:3])
    assert task.targets(batch) == {"reconstruction": 48, "commitment": 48}
    assert task.outputs(batch)["codes"].shape == (3, 16)


def test_image_serves_where_there_is_no_token_image(task, root):
    batch = task.collate([task.example(record, False) for record in open_val_records(root)])
    renamed = {"image": batch["token_image"], "id": batch["id"]}
    assert torch.equal(task.outputs(renamed)["codes"], task.outputs(batch)["codes"])


def test_scores_equal_those_computed_by_hand():
    predictions = [
        {"id": "a", "codes": [0, 0, 1, 1], "num_codes": 8, "distance": 0.2},
        {"id": "b", "codes": [2, 2, 3, 3], "num_codes": 8},
    ]
    predictions[1]["distance"] = 0.4
    scores = VQKD.score(predictions, [{"id": "b"}, {"id": "a"}])
    assert scores == pytest.approx(
        {"codebook_use": 0.5, "perplexity": 4.0, "num_codes": 8.0, "distance": 0.3, "score": 0.7}
    )
    uneven = VQKD.score([{"id": "a", "codes": [0, 0, 0, 5], "num_codes": 8}], [{"id": "a"}])
    assert (
        uneven["perplexity"] == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
        and "distance" not in uneven
    )


def test_evaluation_changes_no_code(task, root):
    before = {name: value.clone() for name, value in task.state_dict().items()}
    evaluate(task.train(), {"main": open_val_records(root)}, batch_size=4)
    assert task.training
    assert all(
        torch.equal(before[name], value)
        for name, value in task.state_dict().items()
        if name in before
    )


def test_a_teacher_of_another_width_is_refused(root):
    config: Any = VQKD.recipes["demo"].task
    task = VQKD(replace(config, model=replace(config.model, teacher_dim=44)))
    batch = task.collate([task.example(record, False) for record in open_val_records(root)])
    with pytest.raises(
        ValueError, match=r"task\.model\.teacher_dim is 44, the gradients teacher has 45"
    ):
        task(batch)


def test_a_backbone_as_teacher_gets_images_with_the_grid_of_the_tokenizer(monkeypatch):
    """The tokenizer's patches of 8 pixels become the backbone's of 4."""
    backbone = BEiT3(replace(TINY, dim=32, depth=1, num_heads=2, ffn_dim=48, patch_size=4)).eval()
    backbone.init_weights(0)
    monkeypatch.setattr(vqkd, "load_backbone", lambda path: backbone)
    config: Any = VQKD.recipes["demo"].task
    model = replace(config.model, image_size=32, patch_size=8, teacher_dim=32)
    task = VQKD(replace(config, teacher="beit3", model=model))
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = task.extract_teacher_features(image)
    small = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    expected = backbone(image=small * 2 - 1).of("image")[:, 1:]
    assert features.shape == (2, 16, 32)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_the_recipe_has_the_published_numbers():
    """The numbers are of BEiT v2's appendix on tokenizer training and of its 3 x 768 x 12
    checkpoint."""
    recipe = VQKD.recipes["base_224_clip"]
    task: Any = recipe.task
    model = task.model
    assert (
        model.image_size,
        model.patch_size,
        model.dim,
        model.depth,
        model.num_heads,
        model.ffn_dim,
    ) == (224, 16, 768, 12, 12, 3072)
    assert (model.decoder_depth, model.code_dim, model.num_codes, model.teacher_dim) == (
        3,
        32,
        8192,
        512,
    )
    assert (model.decay, model.beta, model.revive_after, model.ln_eps) == (0.99, 1.0, 0, 1e-6)
    assert (task.teacher, task.crop, task.flip) == ("clip", (0.08, 1.0), 0.5)
    assert (task.image.mean, task.image.std) == ((0, 0, 0), (1, 1, 1)), "pixels stay in [0, 1]"
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.betas, optim.weight_decay, optim.warmup_epochs) == (
        2e-4,
        1e-5,
        (0.9, 0.99),
        1e-4,
        10,
    )
    assert recipe.data.batch == {"main": 512} and recipe.run.epochs == 100
    assert VQKDConfig().model == model
