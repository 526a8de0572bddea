"""The order of reading, against lists that are shuffled and dealt out step by step."""

import random
from fractions import Fraction

import numpy as np
import pytest

from beit3.data.sampling import Mix, Windows
from beit3.seeding import make_rng

RUNS = np.array([5, 1, 9, 4, 0, 7])


def draw(name: str, epoch: int = 0) -> np.random.Generator:
    return make_rng(0, epoch, name)


def slow(runs: np.ndarray, window: int) -> list[int]:
    """The same order with everything in memory: runs laid one after the other, cut, each piece shuffled."""
    starts = np.cumsum(runs) - runs
    laid = [
        start
        for run in draw("runs").permutation(len(runs))
        for start in range(starts[run], starts[run] + runs[run])
    ]
    pieces = [laid[start : start + window] for start in range(0, len(laid), window)]
    return [
        piece[i]
        for number, piece in enumerate(pieces)
        for i in draw(f"window {number}").permutation(len(piece))
    ]


@pytest.mark.parametrize("window", [1, 3, 10, 26, 1000])
def test_windows_equal_shuffled_pieces(window):
    wanted = slow(RUNS, window)
    assert sorted(wanted) == list(range(26))
    order = Windows(RUNS, window, draw)
    assert [order[offset] for offset in range(26)] == wanted
    for offset in random.Random(0).sample(range(26), 26):
        assert Windows(RUNS, window, draw)[offset] == wanted[offset], "entered anywhere"


def test_windows_stay_near_and_differ_by_epoch():
    runs = np.full(200, 50)
    one, two = (
        [Windows(runs, 100, lambda name, e=epoch: draw(name, e))[i] for i in range(0, 10_000, 7)]
        for epoch in (0, 1)
    )
    assert one != two
    order = Windows(runs, 100, draw)
    for start in range(0, 10_000, 100):
        assert len({order[offset] // 50 for offset in range(start, start + 100)}) == 2, (
            "a window of 100 reads two runs of 50"
        )
    assert np.mean([order[offset + 1] - order[offset] == 1 for offset in range(9_999)]) < 0.05


def test_windows_of_a_hundred_million_records_take_little_memory():
    order = Windows(np.full(10_000, 10_000), 1000, draw)
    assert 0 <= order[99_999_999] < 10**8
    assert (
        sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
        < 200_000
    )


def dealt(weights: list[float], count: int) -> list[tuple[int, int]]:
    mix = Mix(weights)
    return [mix(position) for position in range(count)]


WEIGHTS = [
    [1],
    [1, 1],
    [2, 1],
    [3, 5],
    [1, 2, 3],
    [0.5, 0.3, 0.2],
    [1, 1000],
    [7, 1, 1, 1],
    [0.1, 0.25, 12],
    [5, 4, 3, 2, 1],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_set_is_read_in_its_own_order_and_by_its_weight(weights):
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * 100) for weight in exact]
    period = sum(whole) // int(np.gcd.reduce(whole))
    found = dealt(weights, 3 * period)
    counts = [0] * len(weights)
    for position, (number, place) in enumerate(found, 1):
        assert place == counts[number], "no record of a set is left out or read twice"
        counts[number] += 1
        assert Mix(weights).counts(position) == counts
        wanted = [position * weight / sum(exact) for weight in exact]
        assert all(
            abs(count - want) <= len(weights) / 2
            for count, want in zip(counts, wanted, strict=True)
        )
        if position % period == 0:
            assert counts == wanted


def test_far_positions_are_as_exact():
    mix = Mix([123_456_789, 5_000, 1])
    assert mix.counts(123_461_790 * 50) == [123_456_789 * 50, 5_000 * 50, 50]
    number, place = mix(123_461_790 * 50)
    assert place == [123_456_789 * 50, 5_000 * 50, 50][number]
