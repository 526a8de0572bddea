"""Work on many files by several processes, which leave nothing behind however they or the first process end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Key = TypeVar("Key")


def finished(
    call: Callable[..., Any], jobs: Mapping[Key, tuple], workers: int, *, module: str
) -> Iterator[tuple[Key, Any]]:
    """(key, what `call` returned) of each job as it ends; jobs: key -> arguments. With one worker, here and in order.

    module: what workers need, imported once for all. The first error ends all. OSError where a process was ended from
    outside, as for want of memory.
    """
    if min(workers, len(jobs)) <= 1:
        for key, arguments in jobs.items():
            yield key, call(*arguments)
        return
    # Not by fork: this process has threads, those of its progress bar and of torch.
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    context.set_forkserver_preload([module])
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _end_with_parent) as pool:
        futures = {pool.submit(call, *arguments): key for key, arguments in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            remedy = "the same command goes on from here; fewer --workers need less memory"
            raise OSError(f"a process that read files was ended from outside: {remedy}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker leaves Ctrl-C to the first process, and ends when that is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
