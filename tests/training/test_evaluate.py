"""Evaluation: order, batches, unreadable records, and scores over several sources."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.predict import load
from beit3.tasks.vqkd import VQKD
from beit3.training.evaluate import evaluate, predict, score_sources
from beit3.training.loop import train
from tests.world_root import make_vqkd_recipe


@pytest.fixture
def task(vqkd_weights) -> VQKD:
    vqkd = load(vqkd_weights).task
    assert isinstance(vqkd, VQKD)
    return vqkd


@pytest.fixture
def records(root) -> list[dict]:
    return [dict(record) for record in RecordDataset(root / "vqkd/main/val.jsonl", root)]


def write_source(folder: Path, records: list[dict], *, broken: int = 0) -> RecordDataset:
    """Writes records to a file; the image files of the first `broken` are truncated."""
    records = [dict(record) for record in records]
    for record in records[:broken]:
        truncated = folder / f"half-{Path(record['image']).name}"
        truncated.write_bytes(Path(record["image"]).read_bytes()[:90])
        record["image"] = str(truncated)
    write_records(folder / "val.jsonl", records)
    return RecordDataset(folder / "val.jsonl", folder)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_predictions_are_in_order_for_any_batch_size(task, records, size):
    predictions = predict(task, records, batch_size=size)
    assert [p["id"] for p in predictions] == [str(record["id"]) for record in records]
    assert [p["codes"] for p in predictions] == [
        p["codes"] for p in predict(task, records, batch_size=2)
    ]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_of_every_start_method_give_the_same_predictions(task, records, tmp_path, method):
    multiprocessing.set_start_method(method, force=True)
    sources = {"main": write_source(tmp_path, records, broken=1)}
    try:
        scores = [
            evaluate(task, sources, batch_size=3, bad_share=0.5, workers=workers)
            for workers in (0, 2)
        ]
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert scores[0] == scores[1]


def test_prediction_restores_training_mode(task, records):
    for training in (True, False):
        task.train(training)
        predict(task, records[:1], batch_size=1)
        assert task.training == training
    assert torch.is_grad_enabled()


def test_few_unreadable_records_are_left_out_of_the_score(task, records, tmp_path):
    expected = evaluate(task, {"main": write_source(tmp_path, records[2:])}, batch_size=3)
    damaged = {"main": write_source(tmp_path, records, broken=2)}
    assert evaluate(task, damaged, batch_size=3, bad_share=0.25) == pytest.approx(expected)
    with pytest.raises(
        ValueError, match=r"2 of 8 records of .*val\.jsonl cannot be read: .*half-.*half-"
    ):
        evaluate(task, damaged, batch_size=3, bad_share=0.2)
    with pytest.raises(ValueError, match="1 of 8 records"):
        evaluate(task, {"main": write_source(tmp_path, records, broken=1)}, batch_size=3)


def test_a_run_continues_after_an_unreadable_val_image(records, root, tmp_path):
    for split, broken in (("train", 0), ("val", 1)):
        dataset = write_source(tmp_path, records, broken=broken)
        write_records(tmp_path / f"root/vqkd/main/{split}.jsonl", list(dataset))
    recipe = make_vqkd_recipe(tmp_path / "root", steps=2)
    scores = train(
        replace(recipe, data=replace(recipe.data, bad_share=0.2)), VQKD, out=tmp_path / "run"
    )
    assert scores["step"] == 2 and (tmp_path / "run" / "last").is_dir()


def test_several_sources_have_their_own_scores_and_a_mean(records):
    results = {
        name: ([{"id": "1", "codes": codes, "num_codes": 4, "distance": distance}], [{"id": "1"}])
        for name, codes, distance in (("a", [0, 0], 0.2), ("b", [0, 1], 0.6))
    }
    scores = score_sources(VQKD, results)
    assert (
        scores["score"] == pytest.approx(0.6)
        and scores["a/score"] == pytest.approx(0.8)
        and scores["b/score"] == pytest.approx(0.4)
    )
    assert scores["codebook_use"] == pytest.approx((0.25 + 0.5) / 2)
    assert score_sources(VQKD, {"a": results["a"]}).keys() == {
        "codebook_use",
        "perplexity",
        "num_codes",
        "distance",
        "score",
    }
