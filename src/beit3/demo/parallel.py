"""Runs jobs side by side, as many at a time as there are cores, each after those that it needs."""

import signal
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

import torch

from beit3.log_filters import hide_enum_warnings
from beit3.machine import count_cores
from beit3.training.stop import Interrupted

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Job:
    """A function that is called in a process of its own."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[Hashable, ...] = ()
    """Keys of the jobs that must be done before."""


def run_jobs(jobs: Mapping[Key, Job]) -> dict[Key, Any]:
    """Runs jobs, each on one thread; returns their results by key.

    Of the jobs whose needs are done the first comes first. Networks as small as the demo's use two
    cores badly: two runs side by side were measured to train on 700 records a second, one run on
    two threads on 400 to 550.

    Raises:
        ValueError: Jobs need each other.
        Interrupted: Ctrl-C stopped the jobs, of which training runs have saved a checkpoint.
    """
    left, results = dict(jobs), {}
    running: dict[Future[Any], Key] = {}
    num_workers = min(count_cores(), len(left))
    if not num_workers:
        return {}
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=prepare_worker
    )
    try:
        while left or running:
            pending = {*left, *running.values()}
            ready = [key for key, job in left.items() if pending.isdisjoint(job.needs)]
            for key in ready[: num_workers - len(running)]:
                job = left.pop(key)
                running[pool.submit(job.function, *job.arguments)] = key
            if not running:
                raise ValueError(f"jobs that need each other: {', '.join(map(str, left))}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future)] = future.result()
    except KeyboardInterrupt:
        stop_workers()
        raise Interrupted("stopped; the same command resumes it", signal.SIGINT) from None
    except BaseException:
        stop_workers()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {key: results[key] for key in jobs}


def prepare_worker() -> None:
    """Leaves Ctrl-C to training and to the parent, and takes one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    hide_enum_warnings()


def stop_workers() -> None:
    """Asks all workers to stop; one that trains saves a checkpoint first."""
    for worker in active_children():
        worker.terminate()
