"""Batches as tasks make them: texts as long as the longest, and nothing else changed by that."""

import torch

from beit3.model.config import TINY
from beit3.task import trim_padding
from beit3.tasks.retrieval import Retrieval, RetrievalConfig


def batch(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    padding = torch.arange(width) >= torch.tensor(lengths)[:, None]
    text = torch.randint(4, 90, (len(lengths), width)).masked_fill(padding, 1)
    return {
        "text": text,
        "text_padding": padding,
        "text_target": text.clone(),
        "other": torch.zeros(len(lengths), width),
    }


def test_texts_end_with_the_longest_in_steps_of_eight():
    for lengths, width, expected in (
        ([3, 9, 5], 20, 16),
        ([8, 2], 20, 8),
        ([17], 20, 20),
        ([1], 5, 5),
    ):
        given = batch(lengths, width)
        found = trim_padding(given)
        assert {key: value.shape[1] for key, value in found.items()} == {
            "text": expected,
            "text_padding": expected,
            "text_target": expected,
            "other": width,
        }
        assert (
            torch.equal(found["text"], given["text"][:, :expected])
            and given["text"].shape[1] == width
        )
    assert trim_padding({"image": torch.zeros(2)}).keys() == {"image"}


@torch.no_grad()
def test_what_is_cut_off_changes_no_feature():
    task = Retrieval(RetrievalConfig(model=TINY)).double().eval()
    task.init_weights()
    given = {
        key: value for key, value in batch([3, 9, 5], 20).items() if key in ("text", "text_padding")
    }
    whole, cut = (task.outputs(each)["text_features"] for each in (given, trim_padding(given)))
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
