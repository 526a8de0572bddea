"""Pretraining on shards, token ids and datasets mixed by weight can be killed and resumed."""

import shutil
from dataclasses import replace

import pytest

from beit3.data.stores.split_files import locate_split
from beit3.recipe import Recipe
from beit3.tasks.pretrain import Pretrain
from beit3.training.loop import train
from tests.training.runs import assert_same_run, read_metrics
from tests.training.test_checkpoint import train_killed_and_resumed
from tests.world_root import make_pretrain_recipe


@pytest.fixture(scope="module")
def recipe(raw, root, vqkd_weights, tmp_path_factory) -> Recipe:
    """Images are in tars, texts are token ids, pairs are a dataset of tars and one of files."""
    folder = tmp_path_factory.mktemp("shards")
    shutil.copy(root / "text.model", folder)
    Pretrain.prepare(raw / "shards", folder, "images")
    Pretrain.prepare(raw / "texts", folder, "texts", pack=32)
    Pretrain.prepare(raw / "shards", folder, "pairs/web")
    Pretrain.prepare(raw / "pairs", folder, "pairs/files")
    paths = {
        source: locate_split(folder, "pretrain", source, "train").name
        for source in Pretrain.sources
    }
    assert paths == {"images": "train.shards", "texts": "train.tokens", "pairs": "train"}
    base = make_pretrain_recipe(folder, vqkd_weights, save_every=2, eval_every=3, eval_records=4)
    return replace(
        base,
        data=replace(base.data, shuffle_window=16, weights={"pairs/web": 3.0, "pairs/files": 1.0}),
    )


def test_a_killed_and_resumed_run_on_shards_equals_an_uninterrupted_one(
    recipe, tmp_path, monkeypatch
):
    train(recipe, Pretrain, out=tmp_path / "uninterrupted")
    train_killed_and_resumed(recipe, Pretrain, tmp_path / "run", monkeypatch, 3)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")
    assert all(row["loss"] > 0 for row in read_metrics(tmp_path / "uninterrupted") if "loss" in row)


def test_datasets_are_mixed_by_their_weights(recipe, tmp_path, monkeypatch):
    examples: list[tuple[str, bool]] = []
    example = Pretrain.example

    def record_example(self, record, train, *, rng=None):
        examples.append((record["id"], train))
        return example(self, record, train, rng=rng)

    monkeypatch.setattr(Pretrain, "example", record_example)
    train(replace(recipe, run=replace(recipe.run, steps=1)), Pretrain, out=tmp_path / "one")
    pairs = [
        record_id.partition("/")[0]
        for record_id, is_train in examples
        if is_train and record_id.startswith(("web/", "files/"))
    ]
    assert sorted(pairs) == ["files"] * 2 + ["web"] * 6
    with pytest.raises(ValueError, match="data.weights names pears/web: give it by source/dataset"):
        train(
            replace(recipe, data=replace(recipe.data, weights={"pears/web": 1.0})),
            Pretrain,
            out=tmp_path / "two",
        )
    with pytest.raises(ValueError, match="its datasets are files, web"):
        train(
            replace(recipe, data=replace(recipe.data, weights={"pairs/web": 1.0})),
            Pretrain,
            out=tmp_path / "two",
        )
