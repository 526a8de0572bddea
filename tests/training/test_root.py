"""The embedded world in the cache: written once, whole or not at all, for each task when it first
asks."""

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
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path))
    monkeypatch.setitem(WORLDS, "tiny", TINY)
    return tmp_path


def test_records_are_made_on_first_use_and_kept(place):
    seen: list[tuple[int, int]] = []
    root = prepare_embedded_world(
        VQA, "tiny", progress=lambda done, total: seen.append((done, total))
    )
    assert len(Records(root / "vqa/main/train.jsonl")) == 9 and seen[-1][0] == seen[-1][1]
    assert all(
        os.path.exists(record["image"])
        for record in RecordDataset(root / "vqa/main/train.jsonl", root)
    )
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert prepare_embedded_world(VQA, "tiny") == root
    for task in (Pretrain, VQKD):
        prepare_embedded_world(task, "tiny")
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert all(after[path] == time for path, time in before.items()), (
        "later tasks add, and change nothing"
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


def test_two_that_ask_at_once_share_what_one_writes(place):
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda task: prepare_embedded_world(task, "tiny"), (VQA, VQA)))
    assert roots[0] == roots[1] and len(Records(roots[0] / "vqa/main/train.jsonl")) == 9
    assert sorted(path.name for path in (roots[0] / "vqa").iterdir()) == ["main"], (
        "the second does not land inside the first"
    )


def test_every_word_is_one_piece(place):
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


def test_a_preparation_that_fails_leaves_nothing_of_it(place, monkeypatch):
    def failing(raw: Path, root: Path, source: str):
        (root / "vqkd" / source).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VQKD, "prepare", staticmethod(failing))
        prepare_embedded_world(VQKD, "tiny")
    raw, root = sorted(path for path in place.iterdir() if path.is_dir())
    assert not (root / "vqkd").exists() and raw.name == f"world-{module.VERSION}-tiny"
    assert len(Records(prepare_embedded_world(VQKD, "tiny") / "vqkd/main/train.jsonl")) == 12
