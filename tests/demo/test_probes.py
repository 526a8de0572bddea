"""The guesses that learning is compared with, against slow second implementations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.demo import probes
from beit3.demo.comparison import markdown, row, spread
from beit3.images import open_image
from beit3.task import grow_vocabulary
from beit3.tasks.pretrain import Pretrain
from beit3.tokenizer.text import TextTokenizer
from beit3.training.sources import open_source
from tests.world_root import make_pretrain_recipe


@pytest.mark.parametrize("seed", range(5))
def test_nearest_visible_patch(seed):
    mask = np.random.default_rng(seed).random((4, 5)) < 0.6
    mask[2, 3] = False
    found = probes.nearest_visible(mask)
    for place in range(20):
        y, x = divmod(place, 5)
        best = min(
            (((y - v) ** 2 + (x - u) ** 2), v * 5 + u)
            for v in range(4)
            for u in range(5)
            if not mask[v, u]
        )
        assert found[place] == best[1]


class Coded:
    """Stands for a pretraining task whose codes are known: every patch of image i has code i % 3,
    and 1 in 4 is odd."""

    class config:
        num_codes = 4

        class model:
            grid = (2, 2)


def test_nearest_patch_guess_by_hand(monkeypatch):
    mask = torch.tensor([[True, False, False, False]])
    train = [(torch.tensor([[0, 0, 1, 2]]), mask)] * 3 + [(torch.tensor([[3, 0, 1, 2]]), mask)]
    held_out = [(torch.tensor([[0, 0, 1, 2]]), mask)]
    monkeypatch.setattr(probes, "hidden_patches", lambda task, source, limit: iter(source))
    guess = probes.nearest_patch_guess(Coded(), train, held_out)  # type: ignore[arg-type]
    # The hidden patch's nearest visible one has code 0; counts beside it: code 0 three times, code
    # 3 once, plus a half each.
    assert guess == pytest.approx(-math.log(3.5 / (4 + 4 * 0.5)))


def test_attribute_words_must_be_whole_tokens():
    text = "a large red circle and a small blue square " * 20
    others = "green yellow purple orange white black triangle cross bar " * 20
    whole = TextTokenizer.train([text + others], vocab_size=300, model_type="bpe")
    ids = probes.attribute_ids(whole)
    assert {kind: len(words) for kind, words in ids.items()} == {"color": 8, "shape": 5, "size": 2}
    assert [whole.id_to_piece(token).strip() for token in ids["size"]] == ["small", "large"]
    cut = TextTokenizer.train([text], vocab_size=25, model_type="bpe")
    with pytest.raises(ValueError, match="larger vocabulary"):
        probes.attribute_ids(cut)


def test_rows_of_the_comparison():
    assert spread([0.5, 0.7, 0.6]) == "60.0% (50.0% to 70.0%)"
    assert markdown([row("a", "1", "b")]).splitlines()[-1] == "| a | 1 | b |"


def test_single_words_equal_one_caption_at_a_time(root, vqkd_weights):
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
    found = probes.single_words(task, pairs, limit=10)
    records = [pairs[index] for index in range(10)]
    hits: dict[str, list[bool]] = {name: [] for name in found}
    kinds = {token: kind for kind, ids in probes.attribute_ids(tokenizer).items() for token in ids}
    for index, record in enumerate(records):
        ids = tokenizer.encode(record["text"], config.text_length)
        # A batch of ten rolls by five: the other picture is that of the record five before.
        for side, other in (("right", record), ("wrong", records[index - 5])):
            image = config.image(open_image(other["image"]))[None]
            for place, token in enumerate(ids):
                if token in kinds:
                    text = torch.tensor([ids[:place] + [tokenizer.mask] + ids[place + 1 :]])
                    with torch.no_grad():
                        logits = task.text_head(task.backbone(image, text).of("text"))[0, place]
                    hits[f"single_{side}/{kinds[token]}"].append(logits.argmax().item() == token)
    assert found == pytest.approx({name: float(np.mean(values)) for name, values in hits.items()})
