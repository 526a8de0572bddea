"""Evaluation: order, batches, records that cannot be read, and scores over several sources."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.predict import load
from beit3.tasks.vqkd import VQKD
from beit3.training.evaluate import evaluate, predict, predict_sources, score_sources
from beit3.training.loop import train
from tests.world_root import make_vqkd_recipe


@pytest.fixture
def task(vqkd_weights) -> VQKD:
    found = load(vqkd_weights).task
    assert isinstance(found, VQKD)
    return found


@pytest.fixture
def rows(root) -> list[dict]:
    return [dict(record) for record in RecordDataset(root / "vqkd/main/val.jsonl", root)]


def source(folder: Path, rows: list[dict], *, broken: int = 0) -> RecordDataset:
    """The records as a file of their own; of the first few the image's data ends too early."""
    rows = [dict(row) for row in rows]
    for row in rows[:broken]:
        half = folder / f"half-{Path(row['image']).name}"
        half.write_bytes(Path(row["image"]).read_bytes()[:90])
        row["image"] = str(half)
    write_records(folder / "val.jsonl", rows)
    return RecordDataset(folder / "val.jsonl", folder)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_predictions_come_in_order_whatever_the_batch(task, rows, size):
    predictions = predict(task, rows, batch_size=size)
    assert [p["id"] for p in predictions] == [str(row["id"]) for row in rows]
    assert [p["codes"] for p in predictions] == [
        p["codes"] for p in predict(task, rows, batch_size=2)
    ]


def test_the_mode_is_put_back(task, rows):
    for training in (True, False):
        task.train(training)
        predict(task, rows[:1], batch_size=1)
        assert task.training == training
    assert torch.is_grad_enabled()


def test_limit_takes_the_first(task, rows, tmp_path):
    found = predict_sources(task, {"main": source(tmp_path, rows)}, batch_size=2, limit=3)
    assert [record["id"] for record in found["main"][1]] == [row["id"] for row in rows[:3]]


def test_unreadable_records_are_left_out_of_the_score_up_to_a_share(task, rows, tmp_path):
    whole = evaluate(task, {"main": source(tmp_path, rows[2:])}, batch_size=3)
    damaged = {"main": source(tmp_path, rows, broken=2)}
    assert evaluate(task, damaged, batch_size=3, bad_share=0.25) == pytest.approx(whole)
    with pytest.raises(
        ValueError, match=r"2 of 8 records of .*val\.jsonl cannot be read: .*half-.*half-"
    ):
        evaluate(task, damaged, batch_size=3, bad_share=0.2)
    with pytest.raises(ValueError, match="1 of 8 records"):
        evaluate(task, {"main": source(tmp_path, rows, broken=1)}, batch_size=3)


def test_a_broken_image_of_the_val_split_does_not_cost_the_run(rows, root, tmp_path):
    for split, broken in (("train", 0), ("val", 1)):
        found = source(tmp_path, rows, broken=broken)
        write_records(tmp_path / f"root/vqkd/main/{split}.jsonl", list(found))
    recipe = make_vqkd_recipe(tmp_path / "root", steps=2)
    scores = train(
        replace(recipe, data=replace(recipe.data, bad_share=0.2)), VQKD, out=tmp_path / "run"
    )
    assert scores["step"] == 2 and (tmp_path / "run" / "last").is_dir()


def test_scores_of_several_sources_have_a_mean_and_their_own(rows):
    found = {
        name: ([{"id": "1", "codes": codes, "num_codes": 4, "distance": distance}], [{"id": "1"}])
        for name, codes, distance in (("a", [0, 0], 0.2), ("b", [0, 1], 0.6))
    }
    scores = score_sources(VQKD, found)
    assert (
        scores["score"] == pytest.approx(0.6)
        and scores["a/score"] == pytest.approx(0.8)
        and scores["b/score"] == pytest.approx(0.4)
    )
    assert scores["codebook_use"] == pytest.approx((0.25 + 0.5) / 2)
    assert score_sources(VQKD, {"a": found["a"]}).keys() == {
        "codebook_use",
        "perplexity",
        "num_codes",
        "distance",
        "score",
    }
