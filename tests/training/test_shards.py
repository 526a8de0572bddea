"""A pretraining from tars, from ids, and from several sets mixed by weight: killed and resumed, it
is the run left alone."""

import shutil
from dataclasses import replace

import pytest

from beit3.data.stores.split_files import locate_split
from beit3.recipe import Recipe
from beit3.tasks.pretrain import Pretrain
from beit3.training.loop import train
from tests.training.runs import assert_same_run, read_metrics
from tests.training.test_checkpoint import resumed
from tests.world_root import make_pretrain_recipe


@pytest.fixture(scope="module")
def recipe(raw, root, vqkd_weights, tmp_path_factory) -> Recipe:
    """Images of tars, texts as ids, and pairs of a set of tars and one of files."""
    place = tmp_path_factory.mktemp("shards")
    shutil.copy(root / "text.model", place)
    Pretrain.prepare(raw / "shards", place, "images")
    Pretrain.prepare(raw / "texts", place, "texts", pack=32)
    Pretrain.prepare(raw / "shards", place, "pairs/web")
    Pretrain.prepare(raw / "pairs", place, "pairs/files")
    paths = {
        source: locate_split(place, "pretrain", source, "train").name for source in Pretrain.sources
    }
    assert paths == {"images": "train.shards", "texts": "train.tokens", "pairs": "train"}
    made = make_pretrain_recipe(place, vqkd_weights, save_every=2, eval_every=3, eval_records=4)
    return replace(
        made,
        data=replace(made.data, shuffle_window=16, weights={"pairs/web": 3.0, "pairs/files": 1.0}),
    )


def test_killed_and_resumed_equals_the_run_left_alone(recipe, tmp_path, monkeypatch):
    train(recipe, Pretrain, out=tmp_path / "whole")
    resumed(recipe, Pretrain, tmp_path / "run", monkeypatch, 3)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert all(row["loss"] > 0 for row in read_metrics(tmp_path / "whole") if "loss" in row)


def test_a_step_takes_sets_by_their_weights(recipe, tmp_path, monkeypatch):
    known: list[tuple[str, bool]] = []
    example = Pretrain.example

    def noting(self, record, train, *, rng=None):
        known.append((record["id"], train))
        return example(self, record, train, rng=rng)

    monkeypatch.setattr(Pretrain, "example", noting)
    train(replace(recipe, run=replace(recipe.run, steps=1)), Pretrain, out=tmp_path / "one")
    pairs = [
        key.partition("/")[0]
        for key, learnt in known
        if learnt and key.startswith(("web/", "files/"))
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
