"""Texts of a batch are cut to the longest one, which changes no feature."""

import pytest
import torch
from torch import Tensor

from beit3.data.batches import trim_padding
from beit3.model.config import TINY
from beit3.tasks.retrieval import Retrieval, RetrievalConfig


def make_batch(lengths: list[int], max_length: int) -> dict[str, Tensor]:
    """Makes texts of these lengths with padding up to `max_length`, and another field."""
    torch.manual_seed(0)
    padding = torch.arange(max_length) >= torch.tensor(lengths)[:, None]
    text = torch.randint(4, 90, (len(lengths), max_length)).masked_fill(padding, 1)
    return {
        "text": text,
        "text_padding": padding,
        "text_target": text.clone(),
        "other": torch.zeros(len(lengths), max_length),
    }


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [([3, 9, 5], 20, 16), ([8, 2], 20, 8), ([17], 20, 20), ([1], 5, 5)],
)
def test_texts_are_cut_to_the_longest_in_multiples_of_eight(lengths, max_length, expected):
    batch = make_batch(lengths, max_length)
    trimmed = trim_padding(batch)
    for key in ("text", "text_padding", "text_target"):
        assert torch.equal(trimmed[key], batch[key][:, :expected])
    assert trimmed["other"] is batch["other"]
    assert batch["text"].shape[1] == max_length, "the given batch stays as it is"


def test_batches_without_text_stay_as_they_are():
    assert trim_padding({"image": torch.zeros(2)}).keys() == {"image"}


@torch.no_grad()
def test_trimmed_padding_changes_no_feature():
    task = Retrieval(RetrievalConfig(model=TINY)).double().eval()
    task.init_weights()
    padded = make_batch([3, 9, 5], 20)
    del padded["text_target"], padded["other"]
    expected = task.outputs(padded)["text_features"]
    trimmed = task.outputs(trim_padding(padded))["text_features"]
    torch.testing.assert_close(trimmed, expected, rtol=0, atol=1e-12)
