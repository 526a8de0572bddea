"""Predictions over a split, and their score."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

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
def predict(task: Task, source: Iterable[Record], *, batch_size: int, limit: int = 0) -> list[Prediction]:
    """One prediction per record, in the records' order, in evaluation mode."""
    was_training, device = task.training, next(task.parameters()).device
    task.eval()
    records = islice(source, limit or None)
    predictions = [p for batch in batches(task, records, batch_size) for p in task.predict(to_device(batch, device))]
    task.train(was_training)
    return predictions


def predict_sources(task: Task, sources: Mapping[str, Source], *, batch_size: int, limit: int = 0) -> dict[str, list[Prediction]]:
    """`predict` over every source of a split."""
    return {name: predict(task, source, batch_size=batch_size, limit=limit) for name, source in sources.items()}


def score_sources(
    task: type[Task], predictions: Mapping[str, list[Prediction]], sources: Mapping[str, Source], *, limit: int = 0
) -> dict[str, float]:
    """Scores of a split. With several sources each score is also given as `source/name`; the plain name is their mean."""
    scores = {name: task.score(rows, list(islice(sources[name], limit or None))) for name, rows in predictions.items()}
    if len(scores) == 1:
        return next(iter(scores.values()))
    means = {}
    for key in sorted({key for score in scores.values() for key in score}):
        values = [score[key] for score in scores.values() if key in score]
        means[key] = sum(values) / len(values)
    return means | {f"{source}/{key}": value for source, score in scores.items() for key, value in score.items()}


def evaluate(task: Task, sources: Mapping[str, Source], *, batch_size: int, limit: int = 0) -> dict[str, float]:
    """Predict and score a split; `limit` > 0 takes the first so many records of each source."""
    return score_sources(type(task), predict_sources(task, sources, batch_size=batch_size, limit=limit), sources, limit=limit)
