"""The embedded world is written to the cache once, task by task, completely or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import Records
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.training import embedded_world as module
from beit3.training.embedded_world import WORLDS, prepare_embedded_world

TINY = {"num_train": 12, "num_val": 3, "num_test": 1, "num_questions": 9}


@pytest.fixture
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path))
    monkeypatch.setitem(WORLDS, "tiny", TINY)
    return tmp_path


def test_records_are_written_on_first_use_and_kept(cache_dir):
    progress_calls: list[tuple[int, int]] = []
    root = prepare_embedded_world(
        VQA, "tiny", progress=lambda done, total: progress_calls.append((done, total))
    )
    assert (
        len(Records(root / "vqa/main/train.jsonl")) == 9
        and progress_calls[-1][0] == progress_calls[-1][1]
    )
    assert all(
        os.path.exists(record["image"])
        for record in RecordDataset(root / "vqa/main/train.jsonl", root)
    )
    old_times = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*") if path.is_file()}
    assert prepare_embedded_world(VQA, "tiny") == root
    for task in (Pretrain, VQKD):
        prepare_embedded_world(task, "tiny")
    new_times = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*") if path.is_file()}
    assert all(new_times[path] == mtime for path, mtime in old_times.items()), (
        "later tasks change no file"
    )
    assert {path.name for path in root.iterdir()} == {
        "vqa",
        "pretrain",
        "vqkd",
        "nlvr2",
        "text.model",
    }
    assert all(
        os.path.exists(record["image"])
        for record in RecordDataset(root / "vqkd/main/train.jsonl", root)
    )


def test_two_threads_share_the_records_that_one_writes(cache_dir):
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda task: prepare_embedded_world(task, "tiny"), (VQA, VQA)))
    assert roots[0] == roots[1] and len(Records(roots[0] / "vqa/main/train.jsonl")) == 9
    assert sorted(path.name for path in (roots[0] / "vqa").iterdir()) == ["main"], (
        "the second folder is not moved into the first"
    )


def test_the_tokenizer_has_a_piece_for_most_words(cache_dir):
    root = prepare_embedded_world(Pretrain, "tiny")
    tokenizer = TextTokenizer(root / "text.model")
    texts = [
        record["text"]
        for source in ("texts", "pairs")
        for record in Records(root / f"pretrain/{source}/train.jsonl")
    ]
    words = {word for text in texts for word in text.split() if word.isalpha()}
    cut = [word for word in words if len(tokenizer.encode_pieces(f"a {word}")) != 2]
    assert len(cut) <= 0.1 * len(words), cut


def test_a_failed_preparation_leaves_no_records(cache_dir, monkeypatch):
    def prepare_and_fail(raw: Path, root: Path, source: str):
        (root / "vqkd" / source).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VQKD, "prepare", staticmethod(prepare_and_fail))
        prepare_embedded_world(VQKD, "tiny")
    raw, root = sorted(path for path in cache_dir.iterdir() if path.is_dir())
    assert not (root / "vqkd").exists() and raw.name == f"world-{module.VERSION}-tiny"
    assert len(Records(prepare_embedded_world(VQKD, "tiny") / "vqkd/main/train.jsonl")) == 12
