"""What panels show is what the networks do: codes, mean patches, fillings and answers, against slow
second readings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.report.panel_inputs import records, spread, weights
from beit3.report.panels import (
    CodeBook,
    code_book,
    fill_words,
    panels,
    patch_row,
    sentence,
    trained_on,
    word_batch,
)
from beit3.report.pictures import cut, hatch
from beit3.report.runs import read_runs
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain
from beit3.tasks.vqkd import VQKD
from tests.report.conftest import images_of

RNG = np.random.default_rng(0)


def test_mean_patches_are_the_means_of_their_codes(vqkd):
    run = read_runs([vqkd])[0]
    tokenizer, source = weights(run, VQKD), records(run, "main", "val")
    book = code_book(tokenizer.backbone, tokenizer, source)
    members: dict[int, list[np.ndarray]] = {}
    for record in source:
        view = tokenizer.example(record, False)["token_image"]
        codes = tokenizer.backbone.tokenize(view[None])[0].tolist()
        for code, patch in zip(codes, cut(np.array(Image.open(record["image"])), 4), strict=True):
            members.setdefault(code, []).append(patch)
    assert len(members) > 1
    for code in range(12):
        assert book.counts[code] == len(members.get(code, []))
        expected = np.mean(members[code], 0) if code in members else hatch(4, 4)
        np.testing.assert_allclose(book.patches[code], expected, atol=0.51)


def test_a_row_of_hidden_patches_shows_guess_and_truth():
    book = CodeBook(
        np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in (10, 20, 30)]), np.ones(3)
    )
    image = RNG.integers(100, 256, (4, 4, 3), dtype=np.uint8)
    mask, guess, true = (
        np.array([True, False, True, False]),
        np.array([1, 0, 2, 0]),
        np.array([1, 1, 0, 2]),
    )
    html = patch_row(image, mask, guess, true, book)
    original, masked, filled, codes = images_of(html)
    np.testing.assert_array_equal(original, image)
    np.testing.assert_array_equal(masked[:2, :2], hatch(2, 2))
    assert (filled[:2, :2] == 20).all() and (filled[2:, :2] == 30).all()
    for shown in (masked, filled):
        np.testing.assert_array_equal(shown[:, 2:], image[:, 2:])
    assert [codes[0, 0, 0], codes[0, 2, 0], codes[2, 0, 0], codes[2, 2, 0]] == [20, 20, 10, 30]
    assert "1 of 2 hidden patches named exactly" in html


def test_words_are_marked_right_or_wrong_and_escaped(tokenizer):
    ids = tokenizer.encode("red <b> cube")
    place = next(index for index, id in enumerate(ids) if tokenizer.id_to_piece(id).strip() == "<")
    hidden = [index == place for index in range(len(ids))]
    assert '<mark class="gap"' in sentence(tokenizer, ids, hidden, ())
    assert '<mark class="right">✓ &lt;</mark>' in sentence(tokenizer, ids, hidden, ids)
    other = next(id for id in ids if tokenizer.id_to_piece(id).strip() == "b")
    wrong = sentence(tokenizer, ids, hidden, [other] * len(ids))
    assert '<mark class="wrong">✗ b <i>&lt;</i></mark>' in wrong and "<b>" not in wrong
    assert sentence(tokenizer, ids, [False] * len(ids), ()) == "red &lt;b&gt; cube"


@pytest.mark.parametrize("masking", ["both", "text_only", "alternate"])
def test_words_are_filled_from_everything_hidden_with_and_without_the_picture(pretrain, masking):
    run = read_runs([pretrain])[0]
    task = weights(run, Pretrain, frozen=False)
    assert task.visual_tokenizer is None
    task.config = replace(task.config, pair_masking=masking)
    batch = word_batch(task, spread(records(run, "pairs", "val"), 8) * 3)
    hidden = batch["text_target"] != IGNORE_INDEX
    assert hidden.any(1).all() and (batch["text"][hidden] == task.tokenizer.mask).all()
    with torch.no_grad():
        torch.testing.assert_close(
            fill_words(task, batch, seeing=True), task.outputs(batch)["text_logits"].argmax(-1)
        )
        other = batch | {"image": torch.zeros_like(batch["image"])}
        blind = fill_words(task, batch, seeing=False)
        torch.testing.assert_close(blind, fill_words(task, other, seeing=False))
        assert len(blind) == len(batch["id"])


def test_which_sources_hide_what(pretrain):
    run = read_runs([pretrain])[0]
    assert trained_on(run, "image") == ["images", "pairs"] and trained_on(run, "text") == ["pairs"]
    run.recipe["task"]["pair_masking"] = "text_only"
    run.recipe["data"]["batch"] = {"pairs": 4, "texts": 4}
    assert trained_on(run, "image") == [] and trained_on(run, "text") == ["texts", "pairs"]


def test_panels_of_every_task(vqkd, pretrain, vqa, nlvr2, captioning, retrieval, imagenet):
    tuned = [runs[0] for runs in (vqa, nlvr2, captioning, retrieval, imagenet)]
    found = {
        panel.title: panel.body
        for path in (vqkd, pretrain, *tuned)
        for panel in panels(read_runs([path]))
    }
    assert [body for body in found.values() if "Nothing to show" in body] == []
    counts = {title: len(images_of(body)) for title, body in found.items()}
    assert counts == {
        "The codebook": 1,
        "Pictures in codes": 8 * 2,
        "Hidden patches": 6 * 4,
        "Hidden words": 8,
        "Questions and answers": 8,
        "Statements and judgements": 8 * 2,
        "Captions": 8,
        "Pictures found by a caption": 6 * 3,
        "Captions found by a picture": 6,
        "Pictures and classes": 8,
    }


def test_what_is_gone_leaves_one_line(pretrain, vqa, retrieval, tmp_path):
    for path in (pretrain, retrieval[0]):
        run = read_runs([path])[0]
        run.recipe["data"]["root"] = str(tmp_path)
        found = panels([run])
        assert (
            found
            and [
                panel.body
                for panel in found
                if f"Nothing to show: no {run.task}/" not in panel.body
            ]
            == []
        )
    empty = replace(read_runs([vqa[0]])[0], path=tmp_path)
    assert "has no weights yet" in panels([empty])[0].body
    assert panels([replace(empty, task="unheard_of")]) == []
