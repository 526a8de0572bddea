"""Tests of re-ranking against slow and obvious scores: one pair, and one token, at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.images import open_image
from beit3.model.attention_mask import make_image_to_text_mask
from beit3.search import rerank as module
from beit3.search.input_tables import open_any_image
from beit3.search.rerank import (
    CaptioningReranker,
    MaskedReranker,
    MatchingReranker,
    combine_scores,
    load_reranker,
    make_reranker,
    rerank,
    standardize,
)
from beit3.task import Task, grow_vocabulary, load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.store import save_weights
from tests.world_root import SMALL


@pytest.fixture(scope="module")
def pairs(root) -> tuple[list[str], list[str]]:
    """Returns 7 texts of different lengths and image paths; two texts and two images recur."""
    records = list(RecordDataset(root / "retrieval/main/val.jsonl", root))
    texts = [record["captions"][0] for record in records[:5]]
    texts = [texts[0], "a red circle", *texts[1:], texts[0]]
    images = [records[index]["image"] for index in (0, 1, 1, 2, 3, 4, 0)]
    return texts, images


def build_task(name: str, root: Path, **fields: Any) -> Task:
    """Returns a task with random weights, whose predictions differ from token to token."""
    config: Any = load_task(name).recipes["demo"].task
    model = replace(SMALL, text_positions=60, final_norm=config.model.final_norm)
    tokenizer = TextTokenizer(root / "text.model")
    config = grow_vocabulary(replace(config, model=model, text_length=24, **fields), tokenizer)
    task = load_task(name)(config, tokenizer=tokenizer)
    task.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in task.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2, generator=generator)
    return task.eval()


def make_batch(task: Any, text: str, image: str | None) -> dict[str, torch.Tensor]:
    """Returns a batch of one pair without padding."""
    batch = {"text": torch.tensor([task.encode_text(text, task.config.text_length)])}
    if image is not None:
        batch["image"] = task.config.image.preprocess(open_image(image))[None]
    return batch


# Scores -------------------------------------------------------------------------------------------


@torch.inference_mode()
def mask_one_token_at_a_time(task: Any, text: str, image: str | None) -> float:
    """Returns the pseudo-log-likelihood of a text by `pretrain`."""
    batch, total = make_batch(task, text, image), 0.0
    for position in range(1, batch["text"].shape[1] - 1):
        masked = batch["text"].clone()
        masked[0, position] = task.tokenizer.mask
        logits = task.outputs(batch | {"text": masked})["text_logits"][0, position]
        total += float(logits.log_softmax(-1)[batch["text"][0, position]])
    return total


def test_pretraining_weights_give_the_likelihood_of_every_token_given_the_image(root, pairs):
    task = build_task("pretrain", root)
    reranker = MaskedReranker(task, batch_size=3, num_groups=0)
    expected = [
        mask_one_token_at_a_time(task, text, image) - mask_one_token_at_a_time(task, text, None)
        for text, image in zip(*pairs, strict=True)
    ]
    scores = reranker.score(*pairs)
    assert scores.dtype == np.float32 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_groups_mask_each_token_once_and_no_neighbors(root, pairs):
    task = build_task("pretrain", root)
    ids = task.encode_text(pairs[0][0], 24)
    text = torch.tensor([ids, ids[:4] + [0] * (len(ids) - 4)])
    groups = list(MaskedReranker(task, num_groups=3)._make_groups(text))
    assert len(groups) == 3
    counts = torch.stack(groups).sum(0)
    assert torch.equal(counts, (text >= 4).long()) and not counts[:, 0].any()
    for group in groups:
        assert not (group[:, 1:] & group[:, :-1]).any()


@torch.inference_mode()
def write_one_token_at_a_time(task: Any, text: str, image: str | None) -> float:
    """Returns the log-probability with which `captioning` writes a text, EOS included."""
    batch, total = make_batch(task, text, image), 0.0
    num_image = 0 if image is None else 1 + task.config.model.num_patches
    ids = batch["text"][0].tolist()
    for length in range(1, len(ids)):
        prefix = torch.tensor([[*ids[:length], task.tokenizer.mask]])
        encoded = task.backbone(
            None if image is None else task.normalize_images(batch),
            prefix,
            attention_mask=make_image_to_text_mask(num_image, length + 1),
        )
        logits = task.text_head(encoded.of("text")[0, -1])
        total += float(logits.log_softmax(-1)[ids[length]])
    return total


def test_captioning_weights_give_the_likelihood_of_writing_the_text(root, pairs):
    task = build_task("captioning", root)
    expected = [
        write_one_token_at_a_time(task, text, image) - write_one_token_at_a_time(task, text, None)
        for text, image in zip(*pairs, strict=True)
    ]
    scores = CaptioningReranker(task, batch_size=3).score(*pairs)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_matching_head_scores_one_pair_as_it_scores_many(root, pairs):
    task: Any = build_task("retrieval", root, matching=True)
    expected = []
    for text, image in zip(*pairs, strict=True):
        batch = make_batch(task, text, image)
        states = task.backbone(task.normalize_images(batch), batch["text"]).of("image")
        expected.append(float(task.matching_head(states)[0, 0, 0]))
    scores = MatchingReranker(task, batch_size=3).score(*pairs)
    assert scores.dtype == np.float32 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_one_image_with_many_texts_is_read_once_and_a_text_alone_is_read_once(
    root, pairs, monkeypatch
):
    texts, images = pairs
    reranker = MaskedReranker(build_task("pretrain", root), batch_size=2)
    read, alone = [], []
    monkeypatch.setattr(
        module, "open_any_image", lambda image: read.append(image) or open_any_image(image)
    )
    score_texts = reranker.score_texts
    monkeypatch.setattr(
        reranker,
        "score_texts",
        lambda text, padding: alone.append(len(text)) or score_texts(text, padding),
    )
    scores = reranker.score(texts, [images[0]] * len(texts))
    assert read == [images[0]] and sum(alone) == len(set(texts)) < len(texts)
    assert scores[0] == pytest.approx(scores[-1], abs=1e-5)
    assert reranker.score([], []).shape == (0,)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["a", "b"], ["x.png"], "2 texts and 1 images: give one image for each text"),
        (["a circle", " "], ["x.png"] * 2, r"texts\[1\] is empty"),
        (["a circle"], ["missing.png"], "missing.png"),
    ],
)
def test_wrong_pairs_are_one_line(root, texts, images, message):
    reranker = MatchingReranker(build_task("retrieval", root, matching=True))
    with pytest.raises(ValueError, match=message) as error:
        reranker.score(texts, images)
    assert "\n" not in str(error.value)


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("retrieval", MatchingReranker),
        ("captioning", CaptioningReranker),
        ("pretrain", MaskedReranker),
    ],
)
def test_the_kind_of_weights_decides_how_they_re_rank(root, pairs, tmp_path, name, kind):
    fields = {"matching": True} if name == "retrieval" else {}
    task = build_task(name, root, **fields)
    save_weights(task, tmp_path / "weights")
    reranker = load_reranker(tmp_path / "weights", batch_size=5)
    assert type(reranker) is kind and reranker.batch_size == 5
    expected = make_reranker(task, batch_size=5).score(*pairs)
    np.testing.assert_array_equal(reranker.score(*pairs), expected)


@pytest.mark.parametrize("name", ["retrieval", "vqa"])
def test_weights_that_cannot_re_rank_say_what_is_needed(root, tmp_path, name):
    save_weights(build_task(name, root), tmp_path / "weights")
    with pytest.raises(ValueError, match=r"cannot re-rank: give weights of a recipe") as error:
        load_reranker(tmp_path / "weights")
    assert str(tmp_path / "weights") in str(error.value) and "\n" not in str(error.value)


# Order --------------------------------------------------------------------------------------------


class FixedReranker(MatchingReranker):
    """Scores by the number that is the image."""

    def score(self, texts, images) -> np.ndarray:
        return np.array(images, np.float32)


def test_candidates_are_sorted_by_both_scores(root):
    reranker = FixedReranker(build_task("retrieval", root, matching=True))
    first, fused = [0.9, 0.8, 0.7, 0.1], [1.0, 3.0, 2.0, 90.0]
    result = rerank(reranker, ["a"] * 4, fused, first, weight=0.5)
    expected = (np.array(first) - np.mean(first)) / np.std(first) + 0.5 * (
        np.array(fused) - np.mean(fused)
    ) / np.std(fused)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-6)
    assert result.order.tolist() == sorted(range(4), key=lambda index: -expected[index])
    np.testing.assert_array_equal(result.fused, np.float32(fused))
    assert rerank(reranker, ["a"] * 4, fused, first, weight=0).order.tolist() == [0, 1, 2, 3]
    assert rerank(reranker, ["a"] * 4, fused, first, weight=1e9).order.tolist() == [3, 1, 2, 0]


def test_equal_scores_keep_the_order_of_the_search():
    assert not standardize([0.3, 0.3]).any() and standardize([]).shape == (0,)
    combined = combine_scores([0.5, 0.5, 0.5], np.ones(3, np.float32), 1.0)
    assert combined.tolist() == [0, 0, 0]
