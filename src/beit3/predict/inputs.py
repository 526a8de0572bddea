"""Raw inputs, one or many: aligned to records, prepared ahead in threads, batched, put in order."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from beit3.images import open_image
from beit3.task import Example, Record

OnError = Literal["raise", "skip"] | Callable[[int, str], None]
"""What becomes of an input of a list that cannot be read: `raise` raises ValueError; `skip` logs a
line as a warning of the logger `beit3.predict`; a function receives the index and the line instead.
The last two leave the input's place in the results empty."""

LOGGER = logging.getLogger("beit3.predict")

Results = list[Any]
"""One result per record, in the order of the records; None for a record that cannot be read."""


# One or many --------------------------------------------------------------------------------------


def is_list(value: Any) -> bool:
    """Returns whether a value is many inputs: a text, path, image or open file is one.

    An array or tensor of four axes is a list of images, and one of strings is a list of texts.
    """
    if isinstance(value, np.ndarray | torch.Tensor):
        holds_objects = isinstance(value, np.ndarray) and value.dtype.kind in "OUS" and value.ndim
        return value.ndim == 4 or bool(holds_objects)
    is_one = isinstance(value, str | bytes | bytearray | memoryview | Mapping | Image.Image)
    return isinstance(value, Iterable) and not is_one and not hasattr(value, "read")


def list_inputs(inputs: Any) -> list[Any]:
    """Returns one input or many as a list; None stands for no inputs."""
    if inputs is None:
        return []
    return list(inputs) if is_list(inputs) else [inputs]


def align_inputs(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the inputs of each record by name.

    An input that is no list is repeated for every record.

    Raises:
        ValueError: Lists have different lengths, or an image to repeat cannot be read.
    """
    lists = {name: list(value) for name, value in inputs.items() if is_list(value)}
    if not lists:
        return [dict(inputs)]
    lengths = {name: len(values) for name, values in lists.items()}
    length = next(iter(lengths.values()))
    if set(lengths.values()) != {length}:
        described = ", ".join(f"{count} of {name}" for name, count in lengths.items())
        raise ValueError(
            f"lists of different lengths: {described}: give as many of each, or one that is no "
            "list for all"
        )
    for name, value in inputs.items():
        if name not in lists:
            lists[name] = [_make_repeatable(value) if length > 1 else value] * length
    return [{name: lists[name][index] for name in inputs} for index in range(length)]


def _make_repeatable(value: Any) -> Any:
    """Reads an image that can be read only once, or by one thread only."""
    can_be_shared = not isinstance(value, Image.Image) and not hasattr(value, "read")
    return value if can_be_shared else open_image(value)


# Batches ------------------------------------------------------------------------------------------


def run_in_batches(
    records: Sequence[Record],
    prepare: Callable[[Record], Example],
    run: Callable[[list[Example]], Iterable[Any]],
    *,
    batch_size: int,
    workers: int,
    on_error: OnError,
    label: str,
) -> Results:
    """Prepares records ahead and runs the network on batches of them.

    A batch holds records with the same fields and texts of similar length, so that there is little
    padding.

    Args:
        records: The records.
        prepare: Makes an example of a record; ValueError where it cannot be read. Several threads
            call it at once.
        run: Returns one result per example.
        batch_size: Largest number of examples in a batch.
        workers: Threads that prepare records while the network computes; 0 prepares in this thread.
        on_error: What becomes of a record that cannot be read.
        label: What the records are in messages, which name `label[index]`; "" for the only one.

    Raises:
        ValueError: An option has no sense, or a record cannot be read and `on_error` is "raise".
    """
    _check_options(batch_size, workers, on_error)
    batches = plan_batches(records, batch_size)
    results: Results = [None] * len(records)
    order = [records[index] for batch in batches for index in batch]
    with closing(_prepare_ahead(prepare, order, workers, 2 * batch_size)) as attempts:
        for batch in batches:
            examples: dict[int, Example] = {}
            for index, attempt in zip(batch, islice(attempts, len(batch)), strict=True):
                if isinstance(attempt, ValueError):
                    _report(attempt, index, label, on_error)
                else:
                    examples[index] = attempt
            if examples:
                for index, result in zip(examples, run(list(examples.values())), strict=True):
                    results[index] = result
    return results


def plan_batches(records: Sequence[Record], batch_size: int) -> list[list[int]]:
    """Returns the indices of the records of each batch."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(tuple(sorted(record)), []).append(index)
    batches = []
    for group in groups.values():
        group.sort(key=lambda index: len(str(records[index].get("text", ""))))
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


def _check_options(batch_size: int, workers: int, on_error: OnError) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is no size of a batch: give 1 or more")
    if workers < 0:
        raise ValueError(f"workers {workers} is no number of threads: give 0 or more")
    if not callable(on_error) and on_error not in ("raise", "skip"):
        raise ValueError(f"on_error {on_error!r} is unknown: give raise, skip or a function")


def _report(error: ValueError, index: int, label: str, on_error: OnError) -> None:
    """Raises, logs or hands over that a record cannot be read."""
    message = f"{label}[{index}]: {error}" if label else str(error)
    if callable(on_error):
        on_error(index, message)
    elif on_error == "skip":
        LOGGER.warning("%s", message)
    else:
        raise ValueError(message) from error


def _attempt(prepare: Callable[[Record], Example], record: Record) -> Example | ValueError:
    try:
        return prepare(record)
    except ValueError as error:
        return error


def _prepare_ahead(
    prepare: Callable[[Record], Example], records: Sequence[Record], workers: int, ahead: int
) -> Generator[Example | ValueError, None, None]:
    """Yields the example of each record, or why there is none; up to `ahead` are made in advance.

    Threads suffice: decoding and resizing leave Python's lock to others, and inputs need not be
    copied to processes.
    """
    if not workers:
        for record in records:
            yield _attempt(prepare, record)
        return
    executor = ThreadPoolExecutor(workers, thread_name_prefix="beit3-prepare")
    waiting = iter(records)
    pending: deque[Future[Example | ValueError]] = deque()
    try:
        for record in islice(waiting, max(ahead, workers)):
            pending.append(executor.submit(_attempt, prepare, record))
        while pending:
            attempt = pending.popleft().result()
            for record in islice(waiting, 1):
                pending.append(executor.submit(_attempt, prepare, record))
            yield attempt
    finally:
        executor.shutdown(cancel_futures=True)
