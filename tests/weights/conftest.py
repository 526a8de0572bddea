"""Tokenizers and a released state dict that several tests of weights read."""

import pytest

from beit3.tokenizer.text import TextTokenizer
from beit3.weights.release_format import to_released_state
from tests.weights.states import State, make_backbone


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    words = "a red cube left of the blue ball and one green cone near two small boxes on top"
    return TextTokenizer.train([words, words.title()], vocab_size=60)


@pytest.fixture(scope="module")
def other_tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many rings are under this great yellow lamp"], vocab_size=60)


@pytest.fixture(scope="module")
def backbone_state() -> State:
    """Returns the state dict of a small backbone under released names."""
    return to_released_state(make_backbone())
