"""Micro-batches of requests: one thread per network, a bounded queue, deadlines.

A request is prepared (decoded, tokenized) by a pool of threads, waits in the queue, and is computed
together with others of its kind. The event loop computes nothing.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from beit3.serve.refusal import Refusal

LOGGER = logging.getLogger("beit3.serve")

MIN_BUCKET = 64
"""Texts up to this length share a batch; above it lengths are rounded up to powers of two.

Small batches cost more than padding does. For questions of 17 to 36 tokens TINY takes 1.6 ms of two
cores each in batches of 32 of all lengths, 1.5 ms in those of one length, and 2.1 ms in batches of
16, 2.6 ms in those of 8.
"""

RATE_SMOOTHING = 0.2
"""Weight of the newest batch in the mean time per request."""

Run = Callable[[Hashable, list[Any]], Sequence[Any]]
"""`run(key, items)` computes one result per item, in a thread of its own."""


def round_length(length: int) -> int:
    """Returns the bucket of a text of `length` tokens: 64, 128, 256, ..."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


@dataclass(eq=False)
class Entry:
    """A prepared request that waits for its result."""

    item: Any
    future: asyncio.Future[Any]
    arrival: float
    """When it was queued, in seconds of `time.monotonic`."""


class Batcher:
    """Computes requests in batches. All methods but `close` belong to the event loop's thread.

    Args:
        run: Computes a batch of items of one key.
        pool: Threads that prepare requests.
        max_batch: Largest number of items in a batch.
        max_wait: Seconds that a request waits at most for others that are being prepared.
        max_queue: Largest number of requests that are prepared, wait or are computed.
        timeout: Seconds after which a request is given up.
        observe: Called in the network's thread with each batch's size and its seconds.
    """

    def __init__(
        self,
        run: Run,
        pool: Executor,
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 256,
        timeout: float = 30.0,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.max_queue = max_queue
        self.timeout = timeout
        self.count = 0
        """Requests that are prepared, wait or are computed."""
        self.num_computed = 0
        """Items that were given to the network."""
        self._run = run
        self._pool = pool
        self._observe = observe
        self._num_preparing = 0
        self._seconds_per_item = 0.0
        self._queue: dict[Hashable, deque[Entry]] = {}
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="beit3-network", daemon=True)
        self._thread.start()

    # In the event loop ----------------------------------------------------------------------------

    async def submit(
        self,
        prepare: Callable[[], tuple[Hashable, Any]],
        *,
        timeout: float | None = None,
        pool: Executor | None = None,
    ) -> Any:
        """Prepares a request, queues it and returns its result.

        If the caller is canceled, because its client hung up, the request leaves the queue.

        Args:
            prepare: Returns the request's key and item. Only items of one key share a batch. It
                runs in the pool; what it raises is raised here.
            timeout: Seconds after which it is given up, by default those of the batcher.
            pool: Threads to prepare it in, by default those of the batcher.

        Raises:
            Refusal: 503 where the queue is full or closed, 504 after the timeout.
        """
        self.check_room(1)
        self.count += 1
        entry: Entry | None = None
        key: Hashable = None
        try:
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                key, item = await self._prepare(prepare, pool or self._pool)
                future = asyncio.get_running_loop().create_future()
                entry = Entry(item, future, time.monotonic())
                with self._changed:
                    if self._is_closing:
                        raise Refusal(503, "the server is shutting down", retry_after=1)
                    self._queue.setdefault(key, deque()).append(entry)
                    self._changed.notify()
                return await future
        except TimeoutError:
            raise Refusal(
                504, "the answer was not ready in time: try again, or ask for less"
            ) from None
        finally:
            self.count -= 1
            if entry is not None:
                self._discard(key, entry)

    def check_room(self, count: int) -> None:
        """Raises Refusal where there is no room for `count` more requests."""
        if self._is_closing:
            raise Refusal(503, "the server is shutting down", retry_after=1)
        if self.count + count > self.max_queue:
            wait = self._seconds_per_item * self.count
            raise Refusal(
                503, f"the queue is full ({self.count} requests)", retry_after=max(1.0, wait)
            )

    async def _prepare(
        self, prepare: Callable[[], tuple[Hashable, Any]], pool: Executor
    ) -> tuple[Hashable, Any]:
        """Runs `prepare` in the pool, and lets the network's thread know that one is under way."""
        with self._changed:
            self._num_preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, prepare)
        finally:
            with self._changed:
                self._num_preparing -= 1
                self._changed.notify()

    def _discard(self, key: Hashable, entry: Entry) -> None:
        """Takes a request that nobody waits for any more out of the queue."""
        with self._changed:
            waiting = self._queue.get(key)
            if waiting is not None and entry in waiting:
                waiting.remove(entry)
                if not waiting:
                    del self._queue[key]

    def close(self, *, wait: bool = True) -> None:
        """Takes no more requests, computes those that wait, and ends the thread.

        With `wait` it returns when the thread has ended.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if wait:
            self._thread.join()

    # In the network's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._take_batch():
            self._compute(*batch)

    def _take_batch(self) -> tuple[Hashable, list[Entry]] | None:
        """Waits for a batch that is due, oldest request first; returns None after `close`."""
        with self._changed:
            while True:
                if not self._queue:
                    if self._is_closing:
                        return None
                    self._changed.wait()
                    continue
                key = min(self._queue, key=lambda key: self._queue[key][0].arrival)
                waiting = self._queue[key]
                seconds = waiting[0].arrival + self.max_wait - time.monotonic()
                is_due = seconds <= 0 or len(waiting) >= self.max_batch or not self._num_preparing
                if not is_due and not self._is_closing:
                    self._changed.wait(seconds)
                    continue
                batch = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch))]
                if not waiting:
                    del self._queue[key]
                return key, batch

    def _compute(self, key: Hashable, batch: list[Entry]) -> None:
        """Computes a batch and hands the results to the event loop."""
        started = time.monotonic()
        results = self._run_safely(key, [entry.item for entry in batch])
        seconds = time.monotonic() - started
        rate = seconds / len(batch)
        previous = self._seconds_per_item or rate
        self._seconds_per_item = previous + RATE_SMOOTHING * (rate - previous)
        self.num_computed += len(batch)
        if self._observe is not None:
            self._observe(len(batch), seconds)
        try:
            batch[0].future.get_loop().call_soon_threadsafe(_deliver, batch, results)
        except RuntimeError:  # the event loop has ended, and nobody waits
            LOGGER.warning("%d results came after the end of the server", len(batch))

    def _run_safely(self, key: Hashable, items: list[Any]) -> Sequence[Any]:
        """Returns a result or an exception for each item.

        After an error of a batch each item is computed by itself: one request must not make those
        of others fail.
        """
        try:
            results = self._run(key, items)
            assert len(results) == len(items)
            return results
        except Exception as error:
            if len(items) == 1:
                return [error]
            if not isinstance(error, Refusal):
                LOGGER.warning("a batch of %d failed, each is computed alone", len(items))
            return [self._run_safely(key, [item])[0] for item in items]


def _deliver(batch: Sequence[Entry], results: Sequence[Any]) -> None:
    """Gives each request its result, in the event loop."""
    for entry, result in zip(batch, results, strict=True):
        if entry.future.done():
            continue
        if isinstance(result, Exception):
            entry.future.set_exception(result)
        else:
            entry.future.set_result(result)
