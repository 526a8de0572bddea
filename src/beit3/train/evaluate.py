"""Predictions over a split, and their score."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from beit3.data.loader import Source
from beit3.task import Batch, Example, Prediction, Record, Task


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch with its tensors on `device`, those of floats in `dtype`."""

    def move(value: Any) -> Any:
        return value.to(device, dtype if value.is_floating_point() else value.dtype) if isinstance(value, torch.Tensor) else value

    return {key: move(value) for key, value in batch.items()}


Predicted = dict[str, tuple[list[Prediction], list[Record]]]
"""Per source, predictions and the records that they belong to."""


def batches(task: Task, records: Iterable[Record], size: int, broken: list[str] | None = None) -> Iterator[Batch]:
    """Examples of `records` in order, stacked `size` at a time. With `broken`, unreadable records are named there."""
    examples: list[Example] = []
    for record in records:
        try:
            examples.append(task.example(record, False))
        except ValueError as error:
            if broken is None:
                raise
            broken.append(f"{record['id']}: {error}")
        if len(examples) == size:
            yield task.collate(examples)
            examples = []
    if examples:
        yield task.collate(examples)


@torch.no_grad()
def predict(task: Task, records: Iterable[Record], *, batch_size: int, broken: list[str] | None = None) -> list[Prediction]:
    """One prediction per record, in their order, in evaluation mode."""
    was_training, weights = task.training, next(task.parameters())
    task.eval()
    predictions = [
        prediction
        for batch in batches(task, records, batch_size, broken)
        for prediction in task.predict(to_device(batch, weights.device, weights.dtype))
    ]
    task.train(was_training)
    return predictions


def predict_sources(
    task: Task, sources: Mapping[str, Source], *, batch_size: int, limit: int = 0, bad_share: float = 0.0
) -> Predicted:
    """Predictions for every source of a split, at most `limit` (0 = all) of each.

    Unreadable records are passed over up to `bad_share` of a source; beyond it, ValueError with the list.
    """
    found = {}
    for name, source in sources.items():
        broken: list[str] = []
        records = list(islice(source, limit or None))
        if "text" in records[0]:
            task.tokenizer  # noqa: B018  # its absence is the caller's fault, not each record's
        predictions = predict(task, records, batch_size=batch_size, broken=broken)
        if len(broken) > bad_share * len(records):
            raise ValueError(f"{len(broken)} of {len(records)} records of {source.path} cannot be read: {'; '.join(broken[:20])}")
        there = {str(prediction["id"]) for prediction in predictions}
        found[name] = (predictions, [record for record in records if str(record["id"]) in there])
    return found


def score_sources(task: type[Task], found: Predicted) -> dict[str, float]:
    """Scores of a split. With several sources each score is also given as `source/name`; the plain name is their mean."""
    scores = {name: task.score(predictions, records) for name, (predictions, records) in found.items()}
    if len(scores) == 1:
        return next(iter(scores.values()))
    means = {}
    for key in sorted({key for score in scores.values() for key in score}):
        values = [score[key] for score in scores.values() if key in score]
        means[key] = sum(values) / len(values)
    return means | {f"{source}/{key}": value for source, score in scores.items() for key, value in score.items()}


def evaluate(
    task: Task, sources: Mapping[str, Source], *, batch_size: int, limit: int = 0, bad_share: float = 0.0
) -> dict[str, float]:
    """Predict and score a split."""
    return score_sources(type(task), predict_sources(task, sources, batch_size=batch_size, limit=limit, bad_share=bad_share))
