"""A pool of processes for work on many files. No process is left behind, however the work ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Key = TypeVar("Key")


def run_jobs(
    call: Callable[..., Any], jobs: Mapping[Key, tuple], workers: int, *, module: str
) -> Iterator[tuple[Key, Any]]:
    """Calls `call(*arguments)` for each job; yields (key, result) as the jobs end.

    With one worker, or one job, they run in this process and in order. The first error ends all.

    Args:
        call: The function; it can be pickled.
        jobs: Arguments of each call by key.
        workers: Number of processes.
        module: Name of the module that workers need; it is imported once for all of them.

    Raises:
        OSError: A process was killed, for example because memory ran out.
    """
    num_workers = min(workers, len(jobs))
    if num_workers <= 1:
        for key, arguments in jobs.items():
            yield key, call(*arguments)
        return
    # Not fork: this process has threads, those of its progress bar and of torch.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([module])
    with ProcessPoolExecutor(num_workers, context, _end_with_parent) as pool:
        futures = {pool.submit(call, *arguments): key for key, arguments in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that read files was ended from outside: run the same command again, "
                "it continues from here; fewer --workers need less memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Makes a worker ignore Ctrl-C and end as soon as its parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()
