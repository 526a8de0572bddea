"""Jobs whose results are kept in files, as many at a time as there are cores."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from beit3.files import write_text
from beit3.machine import count_cores


@dataclass(frozen=True)
class Job:
    """A function whose result is kept in a JSON file."""

    path: Path
    function: Callable[..., dict[str, float]]
    arguments: tuple[Any, ...]
    needs: tuple[Path, ...] = ()
    """Files of the jobs that must be done before."""


def execute(job: Job) -> None:
    """Calls the job's function and writes what it returns."""
    result = job.function(*job.arguments)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(job.path, json.dumps(result, indent=1) + "\n")


def execute_all(jobs: Mapping[Path, Job]) -> None:
    """Executes the jobs whose file is not there, each as soon as what it needs is done.

    As many at a time as there are cores, each in a process of one thread: networks this small use
    two cores badly. Of the jobs that can be executed, the first comes first.
    """
    left = {path: job for path, job in jobs.items() if not path.exists()}
    if not left:
        return
    running: dict[Future[None], Path] = {}
    num_workers = min(count_cores(), len(left))
    with ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        try:
            while left or running:
                pending = {*left, *running.values()}
                ready = [path for path, job in left.items() if pending.isdisjoint(job.needs)]
                for path in ready[: num_workers - len(running)]:
                    running[pool.submit(execute, left.pop(path))] = path
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
