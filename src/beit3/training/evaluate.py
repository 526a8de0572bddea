"""Predictions for the records of a split, and their scores.

Processes share the records and every record counts once. Sharded weights are gathered for every
forward pass, so all processes must take the same number of batches: a process without a batch of
its own repeats an earlier one, and its predictions are dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from beit3.data.loader import (
    MAX_LISTED_RECORDS,
    EvaluationBatches,
    RecordDataset,
    load_evaluation_batches,
)
from beit3.ops.collectives import all_gather_objects, rank, world_size
from beit3.task import Batch, Prediction, Record, Task
from beit3.training.sources import check_tokenizer, has_raw_text

Progress = Callable[[int, int], None]
"""Receives (records done, records in all)."""

SourcePredictions = dict[str, tuple[list[Prediction], list[Record]]]
"""Source -> its predictions, and the records that they belong to."""


def ignore_progress(done: int, total: int) -> None:
    """Shows no progress: a training run shows its own."""


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    """Returns the batch with its tensors on `device` and its floating-point tensors in `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        new_dtype = dtype if value.is_floating_point() else value.dtype
        return value.to(device, new_dtype, non_blocking=True)

    return {key: move(value) for key, value in batch.items()}


# Batches ------------------------------------------------------------------------------------------


def iterate_batches(task: Task, records: Iterable[Record], size: int) -> Iterator[Batch]:
    """Yields the examples of `records`, in order, in batches of `size`.

    Raises ValueError for a record that cannot be read.
    """
    for batch in split_records(list(records), size):
        yield task.collate([task.example(record, False) for record in batch])


def split_records(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    """Splits records into batches of `size`; the last may be smaller."""
    return [records[start : start + size] for start in range(0, len(records), size)]


def load_example_batches(
    task: Task, batches: Sequence[Sequence[Record]], workers: int
) -> Iterator[tuple[Batch | None, list[str]]]:
    """Yields (examples, descriptions of unreadable records) of each batch of records."""
    maker = task.without_network() if workers else task
    examples = EvaluationBatches(batches, maker.example, maker.collate)
    return load_evaluation_batches(examples, workers=workers)


@dataclass
class RankBatch:
    """One of this process's turns in an evaluation."""

    index: int
    """Which batch of all processes' batches it is."""
    batch: Batch | None
    """None if a single process can read none of the batch's records."""
    is_own: bool
    """False for a batch that only keeps the process in step with the others."""
    unreadable: list[str] = field(default_factory=list)
    """Descriptions of records that cannot be read."""


def iterate_rank_batches(
    task: Task, records: Sequence[Record], size: int, *, workers: int
) -> Iterator[RankBatch]:
    """Yields this process's batches; processes take turns and all get the same number.

    One of several processes that has no batch in a round, or none that can be read, repeats the
    first that can be read.
    """
    batches = split_records(records, size)
    num_rounds = -(-len(batches) // world_size())
    own_batches = load_example_batches(task, batches[rank() :: world_size()], workers)
    for index in range(rank(), num_rounds * world_size(), world_size()):
        batch, unreadable = next(own_batches, (None, []))
        turn = RankBatch(index, batch, batch is not None, unreadable)
        if turn.batch is None and world_size() > 1:
            turn.batch = _find_readable_batch(task, batches)
        yield turn


def _find_readable_batch(task: Task, batches: Sequence[Sequence[Record]]) -> Batch:
    """Returns the first batch that can be read. Raises ValueError if there is none."""
    all_unreadable: list[str] = []
    for batch, unreadable in load_example_batches(task, batches, workers=0):
        if batch is not None:
            return batch
        all_unreadable += unreadable
    raise ValueError(
        f"none of {len(all_unreadable)} records can be read; the first: {all_unreadable[0]}"
    )


# Predictions --------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    task: Task,
    records: Iterable[Record],
    *,
    batch_size: int,
    unreadable: list[str] | None = None,
    workers: int = 0,
    autocast: torch.autocast | None = None,
    progress: Progress = ignore_progress,
) -> list[Prediction]:
    """Predicts in evaluation mode; every process returns the predictions of all.

    Args:
        task: The task; its mode is restored afterwards.
        records: The records, the same on every process.
        batch_size: Records of a batch on one process.
        unreadable: Receives a description of each record that cannot be read; without it such a
            record raises ValueError.
        workers: Processes that read and preprocess images; 0 = this one.
        autocast: The training's precision, which sharded weights need because they are gathered
            for it; without it the precision is that of the weights.
        progress: Receives the progress.

    Returns:
        One prediction per readable record, in the order of the records.
    """
    records = list(records)
    was_training, weights = task.training, next(task.parameters())
    task.eval()
    results: list[tuple[int, list[Prediction], list[str]]] = []
    for turn in iterate_rank_batches(task, records, batch_size, workers=workers):
        if turn.unreadable and unreadable is None:
            raise ValueError(turn.unreadable[0])
        predictions: list[Prediction] = []
        if turn.batch is not None:
            with autocast or nullcontext():
                predictions = task.predict(to_device(turn.batch, weights.device, weights.dtype))
        results.append((turn.index, predictions if turn.is_own else [], turn.unreadable))
        progress(min(len(records), (turn.index + 1) * batch_size), len(records))
    task.train(was_training)

    all_results = [
        result for rank_results in all_gather_objects(results) for result in rank_results
    ]
    all_results.sort(key=lambda result: result[0])
    if unreadable is not None:
        unreadable += [line for _, _, lines in all_results for line in lines]
    return [prediction for _, predictions, _ in all_results for prediction in predictions]


def predict_sources(
    task: Task,
    sources: Mapping[str, RecordDataset],
    *,
    batch_size: int,
    bad_share: float = 0.0,
    workers: int = 0,
    autocast: torch.autocast | None = None,
    progress: Progress = ignore_progress,
) -> SourcePredictions:
    """Predicts the records of every source of a split.

    Args:
        task: The task.
        sources: Source -> its records.
        batch_size: Records of a batch on one process.
        bad_share: The fraction of a source's records that may be unreadable; they are skipped.
        workers: As for `predict`.
        autocast: As for `predict`.
        progress: Receives the progress of each source.

    Raises:
        ValueError: More records of a source are unreadable; the message lists them.
    """
    results: SourcePredictions = {}
    check_tokenizer(task, sources)
    for name, source in sources.items():
        unreadable: list[str] = []
        records = list(source)
        if has_raw_text(records[0]):
            # Raises without a tokenizer, which is the caller's error and not that of each record.
            task.tokenizer  # noqa: B018
        predictions = predict(
            task,
            records,
            batch_size=batch_size,
            unreadable=unreadable,
            workers=workers,
            autocast=autocast,
            progress=progress,
        )
        if len(unreadable) > bad_share * len(records):
            raise ValueError(
                f"{len(unreadable)} of {len(records)} records of {source.path} cannot be read: "
                f"{'; '.join(unreadable[:MAX_LISTED_RECORDS])}"
            )
        predicted_ids = {str(prediction["id"]) for prediction in predictions}
        readable_records = [record for record in records if str(record["id"]) in predicted_ids]
        results[name] = (predictions, readable_records)
    return results


# Scores -------------------------------------------------------------------------------------------


def score_sources(task: type[Task], results: SourcePredictions) -> dict[str, float]:
    """Returns the scores of a split.

    With several sources each score is also given as `source/name`; the plain name is their mean.
    """
    source_scores = {
        source: task.score(predictions, records)
        for source, (predictions, records) in results.items()
    }
    if len(source_scores) == 1:
        return next(iter(source_scores.values()))
    names = sorted({name for scores in source_scores.values() for name in scores})
    combined: dict[str, float] = {}
    for name in names:
        values = [scores[name] for scores in source_scores.values() if name in scores]
        combined[name] = sum(values) / len(values)
    for source, scores in source_scores.items():
        combined |= {f"{source}/{name}": value for name, value in scores.items()}
    return combined


def evaluate(
    task: Task,
    sources: Mapping[str, RecordDataset],
    *,
    batch_size: int,
    bad_share: float = 0.0,
    workers: int = 0,
    autocast: torch.autocast | None = None,
) -> dict[str, float]:
    """Predicts and scores a split; the arguments are those of `predict_sources`."""
    results = predict_sources(
        task,
        sources,
        batch_size=batch_size,
        bad_share=bad_share,
        workers=workers,
        autocast=autocast,
    )
    return score_sources(type(task), results)
