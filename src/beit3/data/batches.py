"""From examples (the tensors of one record) to batches: padding of texts, checks, trimming.

An example or batch is a dictionary. Its texts are `text` [L] or [B, L] int64, `text_padding` bool,
True = padding, and in masked language modeling `text_target`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TEXT_KEYS = ("text", "text_padding", "text_target")
LENGTH_MULTIPLE = 8
"""Trimmed texts are a multiple of it long. Multiples of 8 suit the hardware and leave few lengths
for `run.compile` to see."""


def pad_token_ids(ids: Sequence[int], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Returns `text` [length] int64 and `text_padding` [length] bool, True = padding."""
    text = torch.full((length,), pad, dtype=torch.int64)
    text[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return text, torch.arange(length) >= len(ids)


def trim_padding(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts texts [B, L] to the longest text of the batch, rounded up to a multiple of 8."""
    if "text_padding" not in batch:
        return dict(batch)
    max_length = int((~batch["text_padding"]).sum(1).max())
    length = -(-max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    trimmed = {key: batch[key][:, :length] for key in TEXT_KEYS if key in batch}
    return {**batch, **trimmed}


def check_same_fields(examples: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where one example of a batch has a field that another lacks."""
    first = examples[0]
    for example in examples[1:]:
        for key in first.keys() ^ example.keys():
            with_key, without_key = (first, example) if key in first else (example, first)
            raise ValueError(
                f"record {without_key.get('id')} gives no {key}, record {with_key.get('id')} "
                "does: give it to all records or to none"
            )


def count_examples(batch: Mapping[str, Any]) -> int:
    """Returns the number of examples in a batch."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))
