"""Recall of retrieval against a sorting reference and the official evaluation; ties and faults."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from beit3.metrics import retrieval
from beit3.metrics.retrieval import compute_recall
from tests.golden import find_fixture
from tests.reference import metrics_retrieval as reference


def make_features(rng, num_images, num_texts, dim=4):
    """Features of small integers, so that many similarities tie, and a random owner of each text.

    Every image has at least one text.
    """
    extra_owners = rng.integers(num_images, size=num_texts - num_images)
    owner = rng.permutation(np.concatenate([np.arange(num_images), extra_owners]))
    images = rng.integers(-1, 2, (num_images, dim)).astype(np.float32)
    texts = rng.integers(-1, 2, (num_texts, dim)).astype(np.float32)
    return images, texts, owner


@pytest.mark.parametrize("seed", range(4))
def test_recall_equals_sorting(seed, monkeypatch):
    monkeypatch.setattr(retrieval, "MAX_SIMILARITIES", 100)
    monkeypatch.setattr(retrieval, "TEXTS_PER_BLOCK", 7)
    rng = np.random.default_rng(seed)
    for num_images, num_texts in ((1, 1), (3, 3), (13, 40), (30, 200)):
        inputs = make_features(rng, num_images, num_texts)
        scores = compute_recall(*inputs, ks=(1, 2, 5))
        expected = reference.compute_recall(*inputs, ks=(1, 2, 5))
        assert list(scores) == list(expected)
        assert scores == pytest.approx(expected, abs=1e-12)
    images = rng.standard_normal((20, 8), np.float32)
    texts = rng.standard_normal((50, 8), np.float32)
    inputs = images, texts, np.arange(50) % 20
    expected = reference.compute_recall(*inputs, ks=(1, 5, 10))
    assert compute_recall(*inputs) == pytest.approx(expected, abs=1e-12)


def test_block_sizes_do_not_change_recall(monkeypatch):
    """Equal images tie in every block, although the last bits of their sums may differ."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 33), np.float32)[rng.integers(6, size=60)]
    owner = np.arange(240) % 60
    texts = images[owner] + rng.standard_normal((240, 33), np.float32)
    scores = compute_recall(images, texts, owner)
    for max_similarities, texts_per_block in ((1, 1), (2400, 32), (1000, 999)):
        monkeypatch.setattr(retrieval, "MAX_SIMILARITIES", max_similarities)
        monkeypatch.setattr(retrieval, "TEXTS_PER_BLOCK", texts_per_block)
        assert compute_recall(images, texts, owner) == scores


def test_a_tie_goes_to_the_lower_index():
    same = np.ones((3, 2), np.float32)
    # Every ranking is 0, 1, 2, so image i finds its text at rank 2 - i, and so does each text.
    scores = compute_recall(same, same, np.array([2, 1, 0]), ks=(1, 2))
    assert scores["text_recall@1"] == scores["image_recall@1"] == pytest.approx(1 / 3)
    assert scores["text_recall@2"] == scores["image_recall@2"] == pytest.approx(2 / 3)
    assert scores["mean_recall"] == pytest.approx(1 / 2)


def test_any_text_of_an_image_counts():
    images = np.eye(2, dtype=np.float32)
    texts = np.array([[0, 1], [1, 0], [0, 1]], np.float32)
    scores = compute_recall(images, texts, np.array([0, 0, 1]), ks=(1,))
    # Image 1 retrieves text 0, which belongs to image 0 and has a lower index than its own.
    assert scores["text_recall@1"] == 0.5
    assert scores["image_recall@1"] == pytest.approx(2 / 3)


def test_recall_equals_the_official_evaluation():
    expected = json.loads((find_fixture("retrieval") / "metric.json").read_text())
    inputs = load_file(find_fixture("retrieval") / "inputs.safetensors")
    _, first, owner = np.unique(inputs["metric.image_ids"], return_index=True, return_inverse=True)
    scores = compute_recall(inputs["metric.image_feats"][first], inputs["metric.text_feats"], owner)
    for k in (1, 5, 10):
        assert scores[f"text_recall@{k}"] * 100 == pytest.approx(expected[f"tr_r{k}"], abs=1e-4)
        assert scores[f"image_recall@{k}"] * 100 == pytest.approx(expected[f"ir_r{k}"], abs=1e-4)
    assert scores["mean_recall"] * 100 == pytest.approx(expected["average_score"], abs=1e-4)


def test_invalid_inputs_are_refused():
    ones = np.ones((2, 3), np.float32)
    diverged = ones.copy()
    diverged[1, 2] = np.nan
    for images, texts, owner, message in (
        (ones, ones, [0, 2], "text 1 belongs to image 2"),
        (ones, ones, [0, -1], "text 1 belongs to image -1"),
        (ones, ones, [1, 1], "image 0 has no text"),
        (diverged, ones, [0, 1], "features of image 1 are not finite"),
        (ones, diverged, [0, 1], "features of text 1 are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            compute_recall(images, texts, np.array(owner))
    with pytest.raises(ValueError, match="no images"):
        compute_recall(ones[:0], ones[:0], np.zeros(0, int))
    with pytest.raises(AssertionError):
        compute_recall(ones, ones, np.zeros(3, int))
