"""Damaged files from outside are read or refused by name; benchmarks/fuzz.py tries 20,000."""

import json

from PIL import Image

from beit3.data.stores.label_names import read_answers
from beit3.tasks.vqa import VQA
from benchmarks.fuzz import fuzz, list_kinds

SLOW_KINDS = ("recipe.json of a run", "metrics.jsonl of a run", "texts jsonl.gz", "texts parquet")


def test_no_damage_ends_in_a_traceback_or_loses_records_in_silence():
    """Tables, JSON, tars, corpora, records, weights, predictions: three damaged files each."""
    names = [name for name in list_kinds(["annotations", "stores"]) if name not in SLOW_KINDS]
    outcomes = fuzz(names, 3)
    faults = [f"{name} {fault}" for name, found in outcomes.items() for fault in found.faults]
    assert not faults, faults
    counts = {name: found.counts for name, found in outcomes.items()}
    assert len(counts) > 50 and all(count.total() == 3 for count in counts.values())
    assert sum(count["read"] for count in counts.values()) > 40
    assert sum(count["refused"] for count in counts.values()) > 40


def test_an_answer_that_is_no_text_is_named_before_anything_is_written(tmp_path):
    """The records were written, and then their answer list failed."""
    (tmp_path / "raw" / "train" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "raw" / "train" / "images" / "0.png")
    questions = [["what is it?", answer, 0] for answer in ("red", "\ud800", "blue")]
    (tmp_path / "raw" / "train" / "questions.json").write_text(json.dumps(questions))
    report = VQA.prepare(tmp_path / "raw", tmp_path / "root", "main", bad_share=0.5)
    assert report["records"] == {"train": 2}
    assert len(report["passed_over"]) == 1 and "is no character" in report["passed_over"][0]
    assert read_answers(tmp_path / "root" / "vqa" / "main" / "answer2label.txt") == ("red", "blue")
