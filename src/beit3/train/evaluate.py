"""Predictions over a split, and their score."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from beit3.data.loader import Source
from beit3.task import Batch, Prediction, Record, Task


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def batches(task: Task, records: Iterator[Record], size: int) -> Iterator[Batch]:
    """Examples of `records` in order, stacked `size` at a time."""
    while chunk := list(islice(records, size)):
        yield task.collate([task.example(record, False) for record in chunk])


@torch.no_grad()
def predict(task: Task, source: Source, *, batch_size: int, limit: int = 0) -> list[Prediction]:
    """One prediction per record, in the records' order, in evaluation mode."""
    was_training, device = task.training, next(task.parameters()).device
    task.eval()
    records = islice(source, limit or None)
    predictions = [p for batch in batches(task, records, batch_size) for p in task.predict(to_device(batch, device))]
    task.train(was_training)
    return predictions


def evaluate(task: Task, sources: Mapping[str, Source], *, batch_size: int, limit: int = 0) -> dict[str, Any]:
    """Scores of a split. With several sources, each score is also given as `source/name`; the plain name is their mean."""
    scores = {}
    for name, source in sources.items():
        predictions = predict(task, source, batch_size=batch_size, limit=limit)
        scores[name] = task.score(predictions, list(islice(source, limit or None)))
    if len(scores) == 1:
        return next(iter(scores.values()))
    names = {key for score in scores.values() for key in score}
    means = {key: sum(s[key] for s in scores.values() if key in s) / sum(key in s for s in scores.values()) for key in sorted(names)}
    return means | {f"{source}/{key}": value for source, score in scores.items() for key, value in score.items()}
