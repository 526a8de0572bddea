"""The guesses that learning is compared with, against slow second implementations."""

import math

import numpy as np
import pytest
import torch

from beit3.demo import probes
from beit3.demo.comparison import markdown, row, spread
from beit3.tokenizer.text import TextTokenizer


@pytest.mark.parametrize("seed", range(5))
def test_nearest_visible_patch(seed):
    mask = np.random.default_rng(seed).random((4, 5)) < 0.6
    mask[2, 3] = False
    found = probes.nearest_visible(mask)
    for place in range(20):
        y, x = divmod(place, 5)
        best = min((((y - v) ** 2 + (x - u) ** 2), v * 5 + u) for v in range(4) for u in range(5) if not mask[v, u])
        assert found[place] == best[1]


class Coded:
    """Stands for a pretraining task whose codes are known: every patch of image i has code i % 3, and 1 in 4 is odd."""

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
    # The hidden patch's nearest visible one has code 0; counts beside it: code 0 three times, code 3 once, plus a half each.
    assert guess == pytest.approx(-math.log(3.5 / (4 + 4 * 0.5)))


def test_attribute_words_must_be_whole_tokens():
    text = "a large red circle and a small blue square " * 20
    others = "green yellow purple orange white black triangle cross bar " * 20
    whole = TextTokenizer.train([text + others], vocab_size=300, model_type="bpe")
    ids = probes.attribute_ids(whole)
    assert {kind: len(words) for kind, words in ids.items()} == {"color": 8, "shape": 5, "size": 2}
    assert [whole.word(token).strip() for token in ids["size"]] == ["small", "large"]
    cut = TextTokenizer.train([text], vocab_size=25, model_type="bpe")
    with pytest.raises(ValueError, match="larger vocabulary"):
        probes.attribute_ids(cut)


def test_rows_of_the_comparison():
    assert spread([0.5, 0.7, 0.6]) == "60.0% (50.0% to 70.0%)"
    assert markdown([row("a", "1", "b")]).splitlines()[-1] == "| a | 1 | b |"
