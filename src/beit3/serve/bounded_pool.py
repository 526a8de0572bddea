"""Threads for work beside the networks: bodies that are read, files on disks that may be slow."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from beit3.serve.refusal import Refusal

T = TypeVar("T")


class BoundedPool:
    """A pool of threads with a bounded queue and a deadline.

    Args:
        name: Prefix of the threads' names.
        num_threads: How many there are.
        max_calls: Largest number of calls that run or wait.
        timeout: Seconds after which a call is given up. Its thread is busy until it returns.
    """

    def __init__(self, name: str, num_threads: int, max_calls: int, timeout: float) -> None:
        self.executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self.max_calls = max_calls
        self.timeout = timeout
        self.count = 0
        """Calls that run or wait."""

    async def run(self, call: Callable[[], T]) -> T:
        """Returns the result of a call. Raises Refusal: 503 where too many wait, 504 when late."""
        if self.count >= self.max_calls:
            raise Refusal(503, f"{self.count} such requests wait already", retry_after=1)
        self.count += 1
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.get_running_loop().run_in_executor(self.executor, call)
        except TimeoutError:
            raise Refusal(504, "the answer was not ready in time: try again") from None
        finally:
            self.count -= 1

    def stop(self) -> None:
        """Drops the calls that wait. Those that run are not waited for: a disk may hang."""
        self.executor.shutdown(wait=False, cancel_futures=True)
