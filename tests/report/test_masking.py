"""Masked patches and tokens are shown as the network predicts them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.report.codebook import CodeStatistics
from beit3.report.images import draw_hatching
from beit3.report.masking import (
    collate_masked_pairs,
    list_masked_sources,
    predict_token_ids,
    render_caption,
    render_patch_row,
)
from beit3.report.panel_inputs import load_run_weights, open_run_records, pick_evenly
from beit3.report.runs import read_runs
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain
from tests.report.conftest import decode_images

RNG = np.random.default_rng(0)


def test_a_row_shows_masked_patches_predicted_and_true():
    mean_patches = np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in (10, 20, 30)])
    statistics = CodeStatistics(mean_patches, np.ones(3))
    image = RNG.integers(100, 256, (4, 4, 3), dtype=np.uint8)
    mask = np.array([True, False, True, False])
    predicted_codes, true_codes = np.array([1, 0, 2, 0]), np.array([1, 1, 0, 2])
    html = render_patch_row(image, mask, predicted_codes, true_codes, statistics)
    original, masked, filled, codes = decode_images(html)
    np.testing.assert_array_equal(original, image)
    np.testing.assert_array_equal(masked[:2, :2], draw_hatching(2, 2))
    assert (filled[:2, :2] == 20).all() and (filled[2:, :2] == 30).all()
    np.testing.assert_array_equal(masked[:, 2:], image[:, 2:])
    np.testing.assert_array_equal(filled[:, 2:], image[:, 2:])
    assert [codes[0, 0, 0], codes[0, 2, 0], codes[2, 0, 0], codes[2, 2, 0]] == [20, 20, 10, 30]
    assert "1 of 2 masked patches predicted exactly" in html


def test_tokens_are_marked_right_or_wrong_and_escaped(tokenizer):
    ids = tokenizer.encode("red <b> cube")
    pieces = [tokenizer.id_to_piece(token_id).strip() for token_id in ids]
    is_masked = [index == pieces.index("<") for index in range(len(ids))]
    assert '<mark class="gap"' in render_caption(tokenizer, ids, is_masked, ())
    assert '<mark class="right">✓ &lt;</mark>' in render_caption(tokenizer, ids, is_masked, ids)
    wrong_ids = [ids[pieces.index("b")]] * len(ids)
    wrong = render_caption(tokenizer, ids, is_masked, wrong_ids)
    assert '<mark class="wrong">✗ b <i>&lt;</i></mark>' in wrong and "<b>" not in wrong
    unmasked = render_caption(tokenizer, ids, [False] * len(ids), ())
    assert unmasked == "red &lt;b&gt; cube"


@pytest.mark.parametrize("masking", ["both", "text_only", "alternate"])
def test_all_target_tokens_are_masked_and_predicted_with_and_without_the_image(pretrain, masking):
    run = read_runs([pretrain])[0]
    task = load_run_weights(run, Pretrain, load_frozen=False)
    assert task.visual_tokenizer is None
    task.config = replace(task.config, pair_masking=masking)
    records = pick_evenly(open_run_records(run, "pairs", "val"), 8)
    batch = collate_masked_pairs(task, records * 3)
    is_target = batch["text_target"] != IGNORE_INDEX
    assert is_target.any(1).all() and (batch["text"][is_target] == task.tokenizer.mask).all()
    with torch.no_grad():
        expected = task.outputs(batch)["text_logits"].argmax(-1)
        torch.testing.assert_close(predict_token_ids(task, batch, use_image=True), expected)
        other_images = batch | {"image": torch.zeros_like(batch["image"])}
        without_image = predict_token_ids(task, batch, use_image=False)
        torch.testing.assert_close(
            without_image, predict_token_ids(task, other_images, use_image=False)
        )
        assert len(without_image) == len(batch["id"])


def test_masked_sources_follow_the_recipe(pretrain):
    run = read_runs([pretrain])[0]
    assert list_masked_sources(run, "image") == ["images", "pairs"]
    assert list_masked_sources(run, "text") == ["pairs"]
    run.recipe["task"]["pair_masking"] = "text_only"
    run.recipe["data"]["batch"] = {"pairs": 4, "texts": 4}
    assert list_masked_sources(run, "image") == []
    assert list_masked_sources(run, "text") == ["texts", "pairs"]
