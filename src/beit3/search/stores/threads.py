"""Threads of search, each of which computes alone.

PyTorch's own threads share single operators, and wait for each other after each: chunks of vectors
are so small that this took most of the time.
"""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier, local
from typing import TypeVar

import torch

from beit3.machine import count_cores

Value = TypeVar("Value")
Result = TypeVar("Result")

_memory = local()


def map_in_threads(function: Callable[[Value], Result], values: Iterable[Value]) -> list[Result]:
    """Applies a function to values, in several threads, and returns the results in their order."""
    values = list(values)
    if len(values) <= 1:
        return [function(value) for value in values]
    return list(_start_threads().map(function, values))


def run_in_thread(function: Callable[[], Result]) -> Result:
    """Calls a function in one of the threads, and returns its result."""
    return _start_threads().submit(function).result()


def reuse_memory(*shape: int) -> torch.Tensor:
    """Returns an int8 tensor of a shape, whose memory the thread's next call uses again.

    Memory that is returned to the system after each chunk, and asked for again, took up to a third
    of the time of a search.
    """
    size = math.prod(shape)
    if getattr(_memory, "size", 0) < size:
        _memory.size, _memory.buffer = size, torch.empty(size, dtype=torch.int8)
    return _memory.buffer[:size].view(shape)


@lru_cache(maxsize=1)
def _start_threads() -> ThreadPoolExecutor:
    """Starts the threads, in which operators of PyTorch use no further threads."""
    num_threads = count_cores()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="beit3-search")
    started = Barrier(num_threads + 1)
    torch_threads = torch.get_num_threads()

    def prepare() -> None:
        torch.set_num_threads(1)
        started.wait()

    for _ in range(num_threads):
        pool.submit(prepare)
    started.wait()
    # The last number set is what threads that start later would use.
    torch.set_num_threads(torch_threads)
    return pool


if hasattr(os, "register_at_fork"):
    # Threads do not live on in a forked process: it starts its own.
    os.register_at_fork(after_in_child=_start_threads.cache_clear)
