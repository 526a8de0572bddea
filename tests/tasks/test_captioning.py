"""Tests of captioning: masks, losses and scores. Decoding is in tests/model/test_generation.py."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.data.prepare.formats.captions import split_by_caption
from beit3.task import grow_vocabulary
from beit3.tasks.captioning import Captioning
from beit3.tokenizer.text import TextTokenizer
from tests.world_root import make_finetuning_recipe


@pytest.fixture(scope="module")
def task(root) -> Captioning:
    tokenizer = TextTokenizer(root / "text.model")
    config = make_finetuning_recipe("captioning", root).task
    task = Captioning(grow_vocabulary(config, tokenizer), tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


def test_captions_are_masked_as_in_the_release(task):
    """Of n tokens int(.7 n + .5) are masked: BOS never, EOS as often as any other token.

    Of them 80 % become <mask>, and 10 % stay.
    """
    token_ids = np.array([0, 9, 8, 7, 6, 5, 4, 2, 1, 1, 1])
    length, num_draws = 8, 4000
    outcomes: Counter[str] = Counter()
    mask_counts = np.zeros(len(token_ids))
    for seed in range(num_draws):
        masked_ids, target = task.mask_caption(token_ids, length, np.random.default_rng(seed))
        is_masked = target != -100
        mask_counts += is_masked
        assert is_masked.sum() == 6
        assert (target[is_masked] == token_ids[is_masked]).all()
        assert (masked_ids[~is_masked] == token_ids[~is_masked]).all()
        for old, new in zip(token_ids[is_masked], masked_ids[is_masked], strict=True):
            if new == task.tokenizer.mask:
                outcomes["mask"] += 1
            elif new == old:
                outcomes["same"] += 1
            else:
                outcomes["random"] += 1
                assert 3 <= new < task.tokenizer.mask
    assert mask_counts[0] == 0 and not mask_counts[length:].any()
    # Each of 7 tokens is masked in 6 of 7 draws: 4 deviations of a binomial of 4,000.
    max_error = 4 * (6 / 49 / num_draws) ** 0.5
    assert abs(mask_counts[1:length] / num_draws - 6 / 7).max() < max_error
    total = outcomes.total()
    assert abs(outcomes["mask"] / total - 0.8) < 0.012
    assert abs(outcomes["same"] / total - 0.1) < 0.01


@pytest.mark.parametrize(
    ("mask_rate", "length", "num_masked"),
    [(0.7, 3, 2), (0.7, 2, 1), (0.01, 9, 1), (1.0, 6, 5), (0.6, 5, 3)],
)
def test_at_least_one_token_is_masked_and_never_bos(task, mask_rate, length, num_masked):
    config = replace(task.config, mask_rate=mask_rate)
    other_task = Captioning(config, tokenizer=task.tokenizer)
    token_ids = np.arange(4, 4 + 12)
    _, target = other_task.mask_caption(token_ids, length, np.random.default_rng(0))
    assert (target != -100).sum() == num_masked


def test_token_ids_of_padding_have_no_effect(task, root):
    record = RecordDataset(root / "captioning/main/train.jsonl", root)[0]
    batch = task.collate([task.example(record, False)]) | {"step": 0}
    other_batch = batch | {"text": torch.where(batch["text_padding"], 7, batch["text"])}
    with torch.no_grad():
        loss, other_loss = (task(inputs)["losses"]["loss"] for inputs in (batch, other_batch))
    assert torch.equal(loss, other_loss)


def test_evaluation_needs_no_text_in_the_records(task, root):
    records = list(RecordDataset(root / "captioning/main/val.jsonl", root))[:3]
    assert len(records[0]["captions"]) == 3 and "text" not in records[0]
    batch = task.collate([task.example(record, False) for record in records])
    predictions = task.predict(batch)
    scores = Captioning.score(predictions, records)
    assert {"cider", "cider_d", "bleu1", "bleu4", "rouge_l"} <= scores.keys()
    perfect = [{"id": str(record["id"]), "caption": record["captions"][0]} for record in records]
    assert Captioning.score(perfect, records)["bleu4"] > scores["bleu4"]
    results = Captioning.submission(predictions, records)
    assert len(results) == 3
    for result in results:
        assert result.keys() == {"image_id", "caption"}
        assert isinstance(result["image_id"], int)


def test_domains_are_scored_separately():
    records, predictions = [], []
    for id, domain, caption in (
        ("0", "in", "a red cube"),
        ("1", "in", "a red cube"),
        ("2", "out", "dogs"),
        ("3", "out", "dogs"),
    ):
        records.append({"id": id, "captions": ["a red cube", "a cube"], "domain": domain})
        predictions.append({"id": id, "caption": caption})
    scores = Captioning.score(predictions, records)
    assert {"cider/in", "cider/out"} <= scores.keys()
    assert scores["cider/out"] == 0


def test_records_without_references_are_refused():
    with pytest.raises(ValueError, match="record 7 holds no captions"):
        Captioning.score([{"id": "7", "caption": "a"}], [{"id": "7", "captions": []}])
    with pytest.raises(ValueError, match="record 7 are ids"):
        Captioning.score([{"id": "7", "caption": "a"}], [{"id": "7", "captions": [[5, 6]]}])
    with pytest.raises(ValueError, match=r"image_id 'a.jpg' is no number"):
        Captioning.submission([{"id": "7", "caption": "a"}], [{"id": "7", "image_id": "a.jpg"}])


def test_training_has_a_record_per_caption():
    images = [
        ("train", {"id": "5", "image": "a", "captions": ["x", "y"]}),
        ("val", {"id": "6", "image": "b", "captions": ["z"]}),
    ]
    assert list(split_by_caption(iter(images))) == [
        ("train", {"id": "5#0", "image": "a", "text": "x"}),
        ("train", {"id": "5#1", "image": "a", "text": "y"}),
        images[1],
    ]


def test_texts_may_be_token_ids(task):
    """Upstream's index files hold ids of pieces, to which BOS and EOS are added."""
    text, padding = task.tokenize_text([9, 8, 7], 6)
    assert text.tolist() == [0, 9, 8, 7, 2, 1] and padding.tolist() == [False] * 5 + [True]
    assert task.tokenize_text(list(range(4, 40)), 6)[0].tolist() == [0, 4, 5, 6, 7, 2]
    for wrong in ([], [task.config.model.vocab_size]):
        with pytest.raises(ValueError, match="holds no ids"):
            task.tokenize_text(wrong, 6)
