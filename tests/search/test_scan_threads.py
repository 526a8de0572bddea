"""Threads of search: in order, several searches at once, in forked processes, right products."""

import multiprocessing
import os
import sys
import threading

import numpy as np
import pytest
import torch

from beit3.search.stores import passes, scan
from beit3.search.stores.threads import map_in_threads, run_in_thread


def make_vectors(number: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, 32)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_results_come_in_order_and_errors_reach_the_caller():
    assert map_in_threads(lambda value: value * 2, range(100)) == list(range(0, 200, 2))
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda value: 1 / value, [1, 0])


def test_threads_compute_alone_and_others_as_before():
    before = torch.get_num_threads()
    assert {*map_in_threads(lambda _: torch.get_num_threads(), range(50))} == {1}
    assert torch.get_num_threads() == before
    numbers: list[int] = []
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert numbers == [before]


def test_searches_at_once_find_what_each_finds_alone():
    vectors = [make_vectors(3000, seed=0)]
    queries = [make_vectors(3, seed) for seed in range(1, 9)]
    expected = [scan.find_best_rows(vectors, part, 5)[0] for part in queries]
    found: dict[int, list[np.ndarray]] = {}

    def search(number: int) -> None:
        found[number] = scan.find_best_rows(vectors, queries[number], 5)[0]

    threads = [threading.Thread(target=search, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert np.array_equal(found[number], expected[number])


def search_in_child(connection) -> None:
    connection.send(scan.find_best_rows([make_vectors(3000, 0)], make_vectors(1, 1), 5)[0][0])
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_starts_its_own_threads():
    expected = scan.find_best_rows([make_vectors(3000, 0)], make_vectors(1, 1), 5)[0][0]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=search_in_child, args=(sender,))
    process.start()
    assert receiver.poll(20), "the forked process hangs"
    assert np.array_equal(receiver.recv(), expected)
    process.join()


def add_in_16_bits(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Multiplies as processors do that add two products of 8 bits, one unsigned, to 16 bits."""
    first, second = first.int() + 128, second.int()
    products = first[:, :, None] * second[None]
    pairs = products.view(len(first), -1, 2, second.shape[1]).sum(2)
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * second.sum(0)).int()


@pytest.mark.parametrize("multiply", [add_in_16_bits, None, "absent"])
def test_codes_are_not_multiplied_where_products_are_wrong(monkeypatch, multiply):
    def refuse(*_):
        raise RuntimeError("not implemented")

    if multiply == "absent":
        monkeypatch.delattr(torch, "_int_mm")
    else:
        monkeypatch.setattr(torch, "_int_mm", multiply or refuse)
    assert not passes.can_multiply_codes.__wrapped__()


def test_what_is_measured_runs_in_a_thread_of_search():
    assert run_in_thread(torch.get_num_threads) == 1


def test_rows_that_are_scored_first_spare_most_others(monkeypatch):
    num_reached: list[int] = []
    find_reached = scan.find_reached

    def count_reached(products, limits):
        reached = find_reached(products, limits)
        num_reached.append(len(reached[0]))
        return reached

    monkeypatch.setattr(scan, "find_reached", count_reached)
    scan.find_best_rows([make_vectors(4000, 0)], make_vectors(10, 1), 1)
    assert sum(num_reached) < 0.05 * 4000 * 10


def test_rows_scored_first_are_distinct_and_sorted():
    for num_rows in (0, 1, 255, 256, 600, 20_000, 1_000_003):
        rows = scan.sample_rows(num_rows)
        assert len(rows) <= min(scan.SAMPLE_ROWS, num_rows / 8)
        assert (np.diff(rows) > 0).all()
        assert len(rows) == 0 or (rows[0] >= 0 and rows[-1] < num_rows)
    assert len(rows) == scan.SAMPLE_ROWS
