"""What captioning hides, what it predicts, and what it scores; decoding is in
tests/model/test_generation.py."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.data.prepare.formats import one_per_caption
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


def test_hidden_words_follow_the_release(task):
    """Of n tokens int(.7 n + .5), the begin mark never, the end mark as often as any; of them 80 %
    become <mask>, 10 % stay."""
    ids = np.array([0, 9, 8, 7, 6, 5, 4, 2, 1, 1, 1])
    count, draws = 8, 4000
    fates: Counter[str] = Counter()
    places = np.zeros(len(ids))
    for seed in range(draws):
        hidden, target = task.mask_caption(ids, count, np.random.default_rng(seed))
        chosen = target != -100
        places += chosen
        assert (
            chosen.sum() == 6
            and (target[chosen] == ids[chosen]).all()
            and (hidden[~chosen] == ids[~chosen]).all()
        )
        for old, new in zip(ids[chosen], hidden[chosen], strict=True):
            fates["mask" if new == task.tokenizer.mask else "same" if new == old else "other"] += 1
            assert 3 <= new <= task.tokenizer.mask or new == old
    assert places[0] == 0 and not places[count:].any()
    # 6 of 7 places each: 4 deviations of a binomial of 4,000.
    assert abs(places[1:count] / draws - 6 / 7).max() < 4 * (6 / 49 / draws) ** 0.5
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.012 and abs(fates["same"] / total - 0.1) < 0.01


@pytest.mark.parametrize(
    ("rate", "count", "wanted"), [(0.7, 3, 2), (0.7, 2, 1), (0.01, 9, 1), (1.0, 6, 5), (0.6, 5, 3)]
)
def test_how_many_are_hidden(task, rate, count, wanted):
    """At least one, at most all but the begin mark."""
    other = Captioning(replace(task.config, mask_rate=rate), tokenizer=task.tokenizer)
    ids = np.arange(4, 4 + 12)
    _, target = other.mask_caption(ids, count, np.random.default_rng(0))
    assert (target != -100).sum() == wanted


def test_what_is_padded_changes_nothing(task, root):
    row = RecordDataset(root / "captioning/main/train.jsonl", root)[0]
    batch = task.collate([task.example(row, False)])
    other = batch | {"text": torch.where(batch["text_padding"], 7, batch["text"])}
    with torch.no_grad():
        assert torch.equal(
            task(batch | {"step": 0})["losses"]["loss"], task(other | {"step": 0})["losses"]["loss"]
        )


def test_evaluation_needs_no_caption(task, root):
    rows = list(RecordDataset(root / "captioning/main/val.jsonl", root))[:3]
    assert len(rows[0]["captions"]) == 3 and "text" not in rows[0]
    predictions = task.predict(task.collate([task.example(row, False) for row in rows]))
    scores = Captioning.score(predictions, rows)
    assert {"cider", "cider_d", "bleu1", "bleu4", "rouge_l"} <= scores.keys()
    perfect = [{"id": str(row["id"]), "caption": row["captions"][0]} for row in rows]
    assert Captioning.score(perfect, rows)["bleu4"] > scores["bleu4"]
    lines = Captioning.submission(predictions, rows)
    assert [line.keys() for line in lines] == [{"image_id", "caption"}] * 3 and all(
        isinstance(line["image_id"], int) for line in lines
    )


def test_domains_are_scored_apart():
    rows = [
        {"id": str(i), "captions": ["a red cube", "a cube"], "domain": "in" if i < 2 else "out"}
        for i in range(4)
    ]
    said = [{"id": str(i), "caption": "a red cube" if i < 2 else "dogs"} for i in range(4)]
    scores = Captioning.score(said, rows)
    assert {"cider/in", "cider/out"} <= scores.keys() and scores["cider/out"] == 0


def test_records_without_references_are_refused():
    with pytest.raises(ValueError, match="record 7 holds no captions"):
        Captioning.score([{"id": "7", "caption": "a"}], [{"id": "7", "captions": []}])
    with pytest.raises(ValueError, match="record 7 are ids"):
        Captioning.score([{"id": "7", "caption": "a"}], [{"id": "7", "captions": [[5, 6]]}])
    with pytest.raises(ValueError, match=r"image_id 'a.jpg' is no number"):
        Captioning.submission([{"id": "7", "caption": "a"}], [{"id": "7", "image_id": "a.jpg"}])


def test_one_record_per_training_caption():
    images = [
        ("train", {"id": "5", "image": "a", "captions": ["x", "y"]}),
        ("val", {"id": "6", "image": "b", "captions": ["z"]}),
    ]
    assert list(one_per_caption(iter(images))) == [
        ("train", {"id": "5#0", "image": "a", "text": "x"}),
        ("train", {"id": "5#1", "image": "a", "text": "y"}),
        images[1],
    ]


def test_ids_of_index_files_are_read(task):
    """Upstream's files hold piece ids; marks are added here."""
    text, padding = task.tokenize_text([9, 8, 7], 6)
    assert text.tolist() == [0, 9, 8, 7, 2, 1] and padding.tolist() == [False] * 5 + [True]
    assert task.tokenize_text(list(range(4, 40)), 6)[0].tolist() == [0, 4, 5, 6, 7, 2]
    for wrong in ([], [task.config.model.vocab_size]):
        with pytest.raises(ValueError, match="holds no ids"):
            task.tokenize_text(wrong, 6)
