"""Embeds images and captions into a folder of vectors, or brings such a folder up to date.

The first process surveys the inputs and writes a worklist, all processes encode its shards, and the
first one writes the manifest. Each step can be repeated: a run that was killed goes on with the
same command, and its files are the same bytes.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from beit3.ops.collectives import compute_on_rank_zero, rank, world_size
from beit3.predict import Predictor
from beit3.progress import show_progress
from beit3.recipe import RunConfig
from beit3.search.encoding import encode_duplicates, encode_shards
from beit3.search.finishing import EmbedReport, finish, make_report
from beit3.search.folder import lock_for_writing
from beit3.search.inputs import InputOptions
from beit3.search.preparing import (
    EmbedOptions,
    check_options,
    check_out,
    load_predictor,
    prepare,
    read_inputs,
)
from beit3.search.worklist import Worklist
from beit3.training.launch import init_device

POLL_INTERVAL = 0.2
"""Seconds between two looks for shards of other processes."""

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def embed(
    weights: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    reading: InputOptions | None = None,
    options: EmbedOptions | None = None,
) -> EmbedReport:
    """Embeds inputs into a folder of vectors.

    Under torchrun all processes call it together, with the same arguments and a folder that all of
    them see; they share the shards.

    Args:
        weights: Weights of a task with features of single inputs, such as retrieval.
        inputs: What to embed, see `list_items`.
        out: The folder of vectors.
        reading: How inputs are read.
        options: How to work.

    Raises:
        ValueError: Inputs, weights or folder cannot be used, or inputs, weights or preprocessing
            are not those of the folder. The folder stays as it was.
    """
    weights, out = str(weights), Path(out)
    options = options or EmbedOptions()
    check_options(options)
    # A survey may take long, and other processes wait for it.
    device = init_device(RunConfig(device=options.device), timeout=timedelta(days=30))
    predictors: list[Predictor] = []

    def prepare_first(stack: ExitStack) -> tuple[bool, str, str]:
        """Returns whether there is work, the precision, and what has changed."""
        check_out(out)
        items, settings, predictor = read_inputs(
            weights, inputs, out, reading or InputOptions(), options, device
        )
        predictors.append(predictor)
        stack.enter_context(lock_for_writing(out))
        has_work, changes = prepare(out, settings, items, options)
        return has_work, predictor.precision, changes

    with ExitStack() as stack, _explain_full_disk(out):
        has_work, precision, changes = compute_on_rank_zero(lambda: prepare_first(stack))
        if has_work:
            worklist = Worklist(out)
            if options.engine == "ray":
                from beit3.search.ray_engine import encode_with_ray

                encode_with_ray(worklist, weights, options, device)
            else:
                _encode(worklist, weights, precision, options, device, predictors)
            compute_on_rank_zero(lambda: finish(worklist))
        return make_report(out, changes, is_unchanged=not has_work)


@contextmanager
def _explain_full_disk(out: Path) -> Iterator[None]:
    """Raises ValueError in place of the system's error when nothing more can be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise ValueError(
            f"{out} cannot be written ({error.strerror or error}): make room and repeat the command"
        ) from None


def _encode(
    worklist: Worklist,
    weights: str,
    precision: str,
    options: EmbedOptions,
    device: torch.device,
    predictors: list[Predictor],
) -> None:
    """Encodes this process's part of the open shards, and waits for the other processes."""
    launcher = os.getppid()
    distinct = worklist.list_shards(duplicates=False)
    duplicates = worklist.list_shards(duplicates=True)
    # Every process has to see the same open shards.
    open_shards = set(compute_on_rank_zero(lambda: worklist.list_open(distinct + duplicates)))
    if not predictors:
        predictors.append(load_predictor(weights, precision, options, device))
    predictor = predictors[0]
    own = [number for number in distinct if number in open_shards][rank() :: world_size()]
    with _show_images(worklist, own) as advance:
        encode_shards(
            predictor,
            worklist,
            own,
            workers=options.workers,
            threads=options.threads,
            advance=advance,
        )
    own = [number for number in duplicates if number in open_shards][rank() :: world_size()]
    if own:
        _wait_for(worklist, distinct, launcher)
        encode_duplicates(predictor, worklist, own, threads=options.threads)
    # The first process writes the manifest and removes the marks; the others wait for that.
    if rank() == 0:
        _wait_for(worklist, [*distinct, *duplicates], launcher)


def _wait_for(worklist: Worklist, numbers: Sequence[int], launcher: int) -> None:
    """Waits until all of these shards are complete, whichever process encodes them.

    Were another process dead, torchrun, the process `launcher`, would end this one. Raises
    ValueError when torchrun itself is dead.
    """
    while worklist.list_open(numbers):
        if world_size() > 1 and os.getppid() != launcher:
            raise ValueError("torchrun has ended before its processes: repeat the command")
        time.sleep(POLL_INTERVAL)


@contextmanager
def _show_images(worklist: Worklist, numbers: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Shows the images of this process's shards, per second and with the time left."""
    total = sum(len(worklist.get_rows(number)) for number in numbers)
    done = 0
    with show_progress("embedding", unit="images") as advance:

        def count(images: int) -> None:
            nonlocal done
            done += images
            if rank() == 0:
                advance(done, total)

        yield count
