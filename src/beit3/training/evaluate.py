"""Predictions over a split, and their score. Processes share the records; every record counts once.

Sharded weights are gathered for every forward, so all processes take the same number of batches: one that has no more of
its own goes along with its last, and what that gives is thrown away.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from beit3.data.loader import Source
from beit3.data.stores.tokens import Tokens
from beit3.ops.collectives import all_gather_objects, rank, world_size
from beit3.task import Batch, Example, Prediction, Record, Task


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch with its tensors on `device`, those of floats in `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(
            device, dtype if value.is_floating_point() else value.dtype, non_blocking=True
        )

    return {key: move(value) for key, value in batch.items()}


Progress = Callable[[int, int], None]
"""Told how many records of how many are done."""


def silent(done: int, total: int) -> None:
    """Tells nobody: a training run shows its own progress."""


Predicted = dict[str, tuple[list[Prediction], list[Record]]]
"""Per source, predictions and the records that they belong to."""


def batches(
    task: Task, records: Iterable[Record], size: int, broken: list[str] | None = None
) -> Iterator[Batch]:
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
def predict(
    task: Task,
    records: Iterable[Record],
    *,
    batch_size: int,
    broken: list[str] | None = None,
    precision: torch.autocast | None = None,
    progress: Progress = silent,
) -> list[Prediction]:
    """One prediction per record, in their order and on every process, in evaluation mode. `broken` as for `batches`.

    `precision`: the training's, which sharded weights need, because they are gathered for it; else that of the weights.
    """
    was_training, weights = task.training, next(task.parameters())
    task.eval()
    found: list[tuple[int, list[Prediction], list[str]]] = []
    records = list(records)
    for place, batch, mine, faults in shared_batches(
        task, records, batch_size, skip=broken is not None
    ):
        with precision or nullcontext():
            predictions = (
                task.predict(to_device(batch, weights.device, weights.dtype)) if batch else []
            )
        found.append((place, predictions if mine else [], faults))
        progress(min(len(records), (place + 1) * batch_size), len(records))
    task.train(was_training)
    everyone = sorted(
        (part for parts in all_gather_objects(found) for part in parts), key=lambda part: part[0]
    )
    if broken is not None:
        broken += [line for *_, faults in everyone for line in faults]
    return [prediction for _, predictions, _ in everyone for prediction in predictions]


def shared_batches(
    task: Task, records: list[Record], size: int, *, skip: bool
) -> Iterator[tuple[int, Batch | None, bool, list[str]]]:
    """This process's share of the batches: (place, batch, whether it counts, records that cannot be read).

    Processes take turns. One of several that has no batch in a round, or none that can be read, repeats the first that can.
    """
    pieces = [records[start : start + size] for start in range(0, len(records), size)]
    world = world_size()
    for place in range(rank(), -(-len(pieces) // world) * world, world):
        faults: list[str] = []
        own = (
            list(batches(task, pieces[place], size, faults if skip else None))
            if place < len(pieces)
            else []
        )
        yield (
            place,
            own[0] if own else spare(task, pieces, size) if world > 1 else None,
            bool(own),
            faults,
        )


def spare(task: Task, pieces: list[list[Record]], size: int) -> Batch:
    """The first batch that can be read; ValueError where there is none."""
    faults: list[str] = []
    for piece in pieces:
        for batch in batches(task, piece, size, faults):
            return batch
    raise ValueError(f"none of {len(faults)} records can be read; the first: {faults[0]}")


def predict_sources(
    task: Task,
    sources: Mapping[str, Source],
    *,
    batch_size: int,
    limit: int = 0,
    bad_share: float = 0.0,
    precision: torch.autocast | None = None,
    progress: Progress = silent,
) -> Predicted:
    """Predictions for every source of a split, at most `limit` (0 = all) of each.

    Unreadable records are passed over up to `bad_share` of a source; beyond it, ValueError with the list.
    """
    found = {}
    refuse_other_ids(task, sources)
    for name, source in sources.items():
        broken: list[str] = []
        records = list(islice(source, limit or None))
        if holds_words(records[0]):
            task.tokenizer  # noqa: B018  # its absence is the caller's fault, not each record's
        predictions = predict(
            task,
            records,
            batch_size=batch_size,
            broken=broken,
            precision=precision,
            progress=progress,
        )
        if len(broken) > bad_share * len(records):
            raise ValueError(
                f"{len(broken)} of {len(records)} records of {source.path} cannot be read: {'; '.join(broken[:20])}"
            )
        there = {str(prediction["id"]) for prediction in predictions}
        found[name] = (predictions, [record for record in records if str(record["id"]) in there])
    return found


def holds_words(record: Record) -> bool:
    """Whether a record's texts need the text tokenizer; index files hold ids."""
    return any(isinstance(text, str) for text in (record.get("text"), *record.get("captions", ())))


def refuse_other_ids(task: Task, sources: Mapping[str, Source]) -> None:
    """ValueError for records that hold the ids of another text tokenizer than the task's."""
    for store in (store for source in sources.values() for store in source.stores):
        if isinstance(store, Tokens) and store.tokenizer != task.tokenizer.digest:
            remedy = "give --data.text_model the one that wrote them, or run beit3 prepare again"
            raise ValueError(
                f"{store.path} holds ids of another text tokenizer than the one in use: {remedy}"
            )


def score_sources(task: type[Task], found: Predicted) -> dict[str, float]:
    """Scores of a split. With several sources each score is also given as `source/name`; the plain name is their mean."""
    scores = {
        name: task.score(predictions, records) for name, (predictions, records) in found.items()
    }
    if len(scores) == 1:
        return next(iter(scores.values()))
    means = {}
    for key in sorted({key for score in scores.values() for key in score}):
        values = [score[key] for score in scores.values() if key in score]
        means[key] = sum(values) / len(values)
    return means | {
        f"{source}/{key}": value for source, score in scores.items() for key, value in score.items()
    }


def evaluate(
    task: Task,
    sources: Mapping[str, Source],
    *,
    batch_size: int,
    limit: int = 0,
    bad_share: float = 0.0,
    precision: torch.autocast | None = None,
) -> dict[str, float]:
    """Predict and score a split."""
    found = predict_sources(
        task, sources, batch_size=batch_size, limit=limit, bad_share=bad_share, precision=precision
    )
    return score_sources(type(task), found)
