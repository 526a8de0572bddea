"""Runs training jobs side by side, as many at a time as there are cores."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from beit3.machine import count_cores

Job = tuple[Callable[..., dict], tuple]
"""A function and its arguments."""


def run_in_parallel(jobs: Sequence[Job]) -> list[dict]:
    """Runs jobs, as many at a time as there are cores, each on one thread; returns their results in
    order.

    Networks this small use two cores badly: two runs in parallel were measured to train on 700
    records a second, one run on two threads on 400 to 550.
    """
    num_workers = min(count_cores(), len(jobs))
    with ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        return [future.result() for future in futures]
