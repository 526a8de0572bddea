"""The guesses that learning is compared with, against slow second implementations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.demo import probes
from beit3.images import open_image
from beit3.task import grow_vocabulary
from beit3.tasks.pretrain import Pretrain
from beit3.tokenizer.text import TextTokenizer
from beit3.training.sources import open_source
from tests.world_root import make_pretrain_recipe


@pytest.mark.parametrize("seed", range(5))
def test_nearest_visible_patch_equals_a_search_over_all_patches(seed):
    mask = np.random.default_rng(seed).random((4, 5)) < 0.6
    mask[2, 3] = False
    nearest = probes.find_nearest_visible(mask)
    visible = [(row, column) for row in range(4) for column in range(5) if not mask[row, column]]
    for patch in range(20):
        y, x = divmod(patch, 5)
        distances = [
            ((y - row) ** 2 + (x - column) ** 2, row * 5 + column) for row, column in visible
        ]
        assert nearest[patch] == min(distances)[1]


class FourCodeTask:
    """Stands in for a pretraining task with four codes and a grid of 2 x 2 patches."""

    class config:
        num_codes = 4

        class model:
            grid = (2, 2)


def test_nearest_patch_loss_equals_one_computed_by_hand(monkeypatch):
    mask = torch.tensor([[True, False, False, False]])
    train = [(torch.tensor([[0, 0, 1, 2]]), mask)] * 3 + [(torch.tensor([[3, 0, 1, 2]]), mask)]
    held_out = [(torch.tensor([[0, 0, 1, 2]]), mask)]
    monkeypatch.setattr(probes, "iterate_codes", lambda task, source, limit: iter(source))
    loss = probes.compute_nearest_patch_loss(FourCodeTask(), train, held_out)  # type: ignore[arg-type]
    # The nearest visible patch of the masked one has code 0. In training, the masked code was 0
    # three times and 3 once; each of the four codes is smoothed by a half.
    assert loss == pytest.approx(-math.log(3.5 / (4 + 4 * 0.5)))


def test_attribute_words_must_be_single_tokens():
    text = "a large red circle and a small blue square " * 20
    other_words = "green yellow purple orange white black triangle cross bar " * 20
    tokenizer = TextTokenizer.train([text + other_words], vocab_size=300, model_type="bpe")
    ids = probes.find_attribute_ids(tokenizer)
    assert {kind: len(words) for kind, words in ids.items()} == {"color": 8, "shape": 5, "size": 2}
    assert [tokenizer.id_to_piece(token).strip() for token in ids["size"]] == ["small", "large"]
    small_tokenizer = TextTokenizer.train([text], vocab_size=25, model_type="bpe")
    with pytest.raises(ValueError, match="larger vocabulary"):
        probes.find_attribute_ids(small_tokenizer)


def test_single_attributes_equal_one_caption_at_a_time(root, vqkd_weights):
    recipe = make_pretrain_recipe(root, vqkd_weights)
    tokenizer = TextTokenizer(root / "text.model")
    config = replace(
        recipe.task,
        pair_masking="text_only",
        image_crop=(1.0, 1.0),
        pair_crop=(1.0, 1.0),
        color_jitter=0.0,
    )
    task = Pretrain(grow_vocabulary(config, tokenizer), tokenizer=tokenizer)
    task.init_weights(1)
    task.eval()
    pairs = open_source(root, Pretrain, "pairs", recipe, "val")
    accuracies = probes.measure_single_attributes(task, pairs, limit=10)
    records = [pairs[index] for index in range(10)]
    hits: dict[str, list[bool]] = {name: [] for name in accuracies}
    kind_of_id = {
        token: kind for kind, ids in probes.find_attribute_ids(tokenizer).items() for token in ids
    }
    for index, record in enumerate(records):
        ids = tokenizer.encode(record["text"], config.text_length)
        # A batch of ten is rolled by five: the other image is that of the record five before.
        for side, image_record in (("right", record), ("wrong", records[index - 5])):
            image = config.image(open_image(image_record["image"]))[None]
            for position, token in enumerate(ids):
                if token not in kind_of_id:
                    continue
                masked = [*ids[:position], tokenizer.mask, *ids[position + 1 :]]
                with torch.no_grad():
                    states = task.backbone(image, torch.tensor([masked])).of("text")
                    logits = task.text_head(states)[0, position]
                hits[f"single_{side}/{kind_of_id[token]}"].append(logits.argmax().item() == token)
    expected = {name: float(np.mean(values)) for name, values in hits.items()}
    assert accuracies == pytest.approx(expected)
