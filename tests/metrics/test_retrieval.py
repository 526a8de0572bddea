"""Recall: sorted lists one by one, ties, chunks, features of the official code; faults by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from beit3.metrics import retrieval
from beit3.metrics.retrieval import recall
from tests.golden import golden
from tests.reference import metrics_retrieval as slow


def features(rng, images, texts, width=4):
    """Features with many equal similarities (small whole numbers), and an owner for every text, in no order."""
    owner = rng.permutation(
        np.concatenate([np.arange(images), rng.integers(images, size=texts - images)])
    )
    return (
        rng.integers(-1, 2, (images, width)).astype(np.float32),
        rng.integers(-1, 2, (texts, width)).astype(np.float32),
        owner,
    )


@pytest.mark.parametrize("seed", range(4))
def test_equals_sorting(seed, monkeypatch):
    monkeypatch.setattr(retrieval, "VALUES", 100)
    monkeypatch.setattr(retrieval, "TEXTS", 7)
    rng = np.random.default_rng(seed)
    for images, texts in ((1, 1), (3, 3), (13, 40), (30, 200)):
        given = features(rng, images, texts)
        ours, expected = recall(*given, ks=(1, 2, 5)), slow.recall(*given, ks=(1, 2, 5))
        assert list(ours) == list(expected)
        assert ours == pytest.approx(expected, abs=1e-12)
    given = [
        rng.standard_normal((20, 8), np.float32),
        rng.standard_normal((50, 8), np.float32),
        np.arange(50) % 20,
    ]
    assert recall(*given) == pytest.approx(slow.recall(*given, ks=(1, 5, 10)), abs=1e-12)


def test_chunks_change_nothing(monkeypatch):
    """Images that are the same picture tie in every chunk, though the last bits of their sums may not."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 33), np.float32)[rng.integers(6, size=60)]
    owner = np.arange(240) % 60
    texts = images[owner] + rng.standard_normal((240, 33), np.float32)
    whole = recall(images, texts, owner)
    for values, columns in ((1, 1), (2400, 32), (1000, 999)):
        monkeypatch.setattr(retrieval, "VALUES", values)
        monkeypatch.setattr(retrieval, "TEXTS", columns)
        assert recall(images, texts, owner) == whole


def test_a_tie_goes_to_the_lower_index():
    same = np.ones((3, 2), np.float32)
    # Every list is 0, 1, 2. Image i finds its text at place 2 - i, text t its image at the same.
    scores = recall(same, same, np.array([2, 1, 0]), ks=(1, 2))
    assert scores["text_recall@1"] == scores["image_recall@1"] == pytest.approx(1 / 3)
    assert scores["text_recall@2"] == scores["image_recall@2"] == pytest.approx(2 / 3)
    assert scores["mean_recall"] == pytest.approx(1 / 2)


def test_any_caption_of_an_image_counts():
    images = np.eye(2, dtype=np.float32)
    texts = np.array([[0, 1], [1, 0], [0, 1]], np.float32)
    scores = recall(images, texts, np.array([0, 0, 1]), ks=(1,))
    assert (
        scores["text_recall@1"] == 0.5
    )  # image 1 finds text 0, of image 0 and with a lower index, before its own
    assert scores["image_recall@1"] == pytest.approx(2 / 3)


def test_equals_the_official_evaluation():
    expected = json.loads((golden("retrieval") / "metric.json").read_text())
    given = load_file(golden("retrieval") / "inputs.safetensors")
    _, first, owner = np.unique(given["metric.image_ids"], return_index=True, return_inverse=True)
    scores = recall(given["metric.image_feats"][first], given["metric.text_feats"], owner)
    for k in (1, 5, 10):
        assert scores[f"text_recall@{k}"] * 100 == pytest.approx(expected[f"tr_r{k}"], abs=1e-4)
        assert scores[f"image_recall@{k}"] * 100 == pytest.approx(expected[f"ir_r{k}"], abs=1e-4)
    assert scores["mean_recall"] * 100 == pytest.approx(expected["average_score"], abs=1e-4)


def test_faults_are_named():
    one = np.ones((2, 3), np.float32)
    diverged = one.copy()
    diverged[1, 2] = np.nan
    for images, texts, owner, words in (
        (one, one, [0, 2], "text 1 belongs to image 2"),
        (one, one, [0, -1], "text 1 belongs to image -1"),
        (one, one, [1, 1], "image 0 has no text"),
        (diverged, one, [0, 1], "features of image 1 are not finite"),
        (one, diverged, [0, 1], "features of text 1 are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            recall(images, texts, np.array(owner))
    with pytest.raises(ValueError, match="no images"):
        recall(one[:0], one[:0], np.zeros(0, int))
    with pytest.raises(AssertionError):
        recall(one, one, np.zeros(3, int))
