"""The micro-batcher: batches of one kind, deadlines, the bounded queue, clients that hang up."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from beit3.serve.batcher import Batcher, round_length
from beit3.serve.refusal import Refusal


class Network:
    """Doubles numbers in batches, and remembers the batches. It can be held up."""

    def __init__(self) -> None:
        self.batches: list[tuple[object, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def run(self, key: object, items: list[int]) -> list[int]:
        self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        self.batches.append((key, items))
        if -1 in items:
            raise ValueError("-1 cannot be doubled")
        return [2 * item for item in items]


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def make_batcher(network, pool, **options) -> Batcher:
    return Batcher(network.run, pool, **{"max_batch": 4, "max_wait": 0.02} | options)


def submit(batcher: Batcher, item: int, key: object = "a", **options):
    return batcher.submit(lambda: (key, item), **options)


def run(batcher: Batcher, coroutine):
    try:
        return asyncio.run(asyncio.wait_for(coroutine, 20))
    finally:
        batcher.close()


async def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in time")


def test_requests_that_wait_share_batches_in_the_order_of_arrival(network, pool):
    batcher = make_batcher(network, pool)

    async def main():
        network.gate.clear()
        first = asyncio.ensure_future(submit(batcher, 0))
        await wait_until(lambda: batcher.count == 1 and not batcher._queue)
        others = [asyncio.ensure_future(submit(batcher, item)) for item in range(1, 11)]
        await wait_until(lambda: len(batcher._queue.get("a", ())) == 10)
        network.gate.set()
        return await asyncio.gather(first, *others)

    assert run(batcher, main()) == [2 * item for item in range(11)]
    sizes = [len(items) for _, items in network.batches]
    assert sizes == [1, 4, 4, 2]
    assert sorted(item for _, items in network.batches for item in items) == list(range(11))
    assert network.threads == {"beit3-network"} and batcher.count == 0


def test_a_batch_holds_requests_of_one_kind(network, pool):
    batcher = make_batcher(network, pool, max_batch=100)

    async def main():
        network.gate.clear()
        calls = [submit(batcher, item, key=item % 3) for item in range(30)]
        gathered = asyncio.gather(*calls)
        await wait_until(lambda: batcher._num_preparing == 0 and batcher.count == 30)
        network.gate.set()
        return await gathered

    assert run(batcher, main()) == [2 * item for item in range(30)]
    assert all({item % 3 for item in items} == {key} for key, items in network.batches)
    assert len(network.batches) <= 4


def test_a_lone_request_does_not_wait_for_others(network, pool):
    batcher = make_batcher(network, pool, max_wait=5.0)
    started = time.monotonic()
    assert run(batcher, submit(batcher, 1)) == 2
    assert time.monotonic() - started < 2


def test_a_request_waits_for_one_that_is_being_prepared(network, pool):
    batcher = make_batcher(network, pool, max_wait=5.0)

    def prepare_slowly():
        time.sleep(0.2)
        return "a", 2

    async def main():
        slow = asyncio.ensure_future(batcher.submit(prepare_slowly))
        return await asyncio.gather(slow, submit(batcher, 1))

    assert run(batcher, main()) == [4, 2]
    assert [sorted(items) for _, items in network.batches] == [[1, 2]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(network, pool):
    batcher = make_batcher(network, pool, max_queue=3)

    async def main():
        network.gate.clear()
        accepted = [asyncio.ensure_future(submit(batcher, item)) for item in range(3)]
        await asyncio.sleep(0)
        started = time.monotonic()
        with pytest.raises(Refusal) as caught:
            await submit(batcher, 9)
        assert time.monotonic() - started < 0.05
        network.gate.set()
        return caught.value, await asyncio.gather(*accepted)

    refusal, results = run(batcher, main())
    assert refusal.status == 503 and int(refusal.headers["Retry-After"]) >= 1
    assert results == [0, 2, 4]


def test_one_who_hangs_up_frees_his_place_and_is_not_computed(network, pool):
    batcher = make_batcher(network, pool, max_queue=2, max_batch=1)

    async def main():
        network.gate.clear()
        first = asyncio.ensure_future(submit(batcher, 1))
        await wait_until(lambda: batcher.count == 1 and not batcher._queue)
        second = asyncio.ensure_future(submit(batcher, 2))
        await wait_until(lambda: batcher._queue)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert batcher.count == 1 and not batcher._queue
        third = asyncio.ensure_future(submit(batcher, 3))
        await wait_until(lambda: batcher._queue)
        network.gate.set()
        return await asyncio.gather(first, third)

    assert run(batcher, main()) == [2, 6]
    assert [items for _, items in network.batches] == [[1], [3]] and batcher.num_computed == 2


def test_late_requests_are_given_up(network, pool):
    batcher = make_batcher(network, pool, timeout=0.1, max_batch=1)

    async def main():
        network.gate.clear()
        calls = [submit(batcher, item) for item in range(2)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert not batcher._queue and batcher.count == 0
        network.gate.set()
        return results

    assert [refusal.status for refusal in run(batcher, main())] == [504, 504]
    assert network.batches == [("a", [0])], "the second one was never computed"


def test_an_error_is_of_the_request_that_caused_it(network, pool):
    batcher = make_batcher(network, pool)

    async def main():
        network.gate.clear()
        calls = [submit(batcher, item) for item in (1, -1, 2)]
        gathered = asyncio.gather(*calls, return_exceptions=True)
        await wait_until(lambda: batcher._num_preparing == 0 and batcher.count == 3)
        network.gate.set()
        return await gathered

    results = run(batcher, main())
    assert results[0] == 2 and results[2] == 4
    assert str(results[1]) == "-1 cannot be doubled"


def test_what_cannot_be_prepared_is_not_queued(network, pool):
    batcher = make_batcher(network, pool)

    def prepare():
        raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        run(batcher, batcher.submit(prepare))
    assert not network.batches and batcher.count == 0


def test_closing_computes_what_waits_and_refuses_what_comes(network, pool):
    batcher = make_batcher(network, pool)

    async def main():
        network.gate.clear()
        waiting = [asyncio.ensure_future(submit(batcher, item)) for item in range(6)]
        await wait_until(lambda: batcher._num_preparing == 0 and batcher.count == 6)
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal, match="shutting down"):
            await submit(batcher, 7)
        network.gate.set()
        await closing
        return await asyncio.gather(*waiting)

    assert run(batcher, main()) == [0, 2, 4, 6, 8, 10]


def test_the_event_loop_stays_free_while_a_network_computes(network, pool):
    batcher = make_batcher(network, pool)

    async def main():
        network.gate.clear()
        call = asyncio.ensure_future(submit(batcher, 1))
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.005)
            ticks += 1
        network.gate.set()
        return await call, ticks

    assert run(batcher, main()) == (2, 20)


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 64), (64, 64), (65, 128), (128, 128), (160, 256)]
)
def test_lengths_are_rounded_to_few_buckets(length, bucket):
    assert round_length(length) == bucket
