"""The order of reading equals lists that are shuffled and counted step by step."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from beit3.data.sampling import DatasetMixture, WindowShuffle, spread_indices
from beit3.seeding import make_rng

RUN_LENGTHS = np.array([5, 1, 9, 4, 0, 7])


def make_named_rng(name: str, epoch: int = 0) -> np.random.Generator:
    return make_rng(0, epoch, name)


def shuffle_slowly(runs: np.ndarray, window: int) -> list[int]:
    """Returns the order computed in memory: shuffled runs, cut to windows, each shuffled."""
    starts = np.cumsum(runs) - runs
    records = [
        start
        for run in make_named_rng("runs").permutation(len(runs))
        for start in range(starts[run], starts[run] + runs[run])
    ]
    windows = [records[start : start + window] for start in range(0, len(records), window)]
    return [
        piece[i]
        for number, piece in enumerate(windows)
        for i in make_named_rng(f"window {number}").permutation(len(piece))
    ]


@pytest.mark.parametrize("window", [1, 3, 10, 26, 1000])
def test_the_order_equals_a_slow_second_implementation(window):
    expected = shuffle_slowly(RUN_LENGTHS, window)
    assert sorted(expected) == list(range(26))
    order = WindowShuffle(RUN_LENGTHS, window, make_named_rng)
    assert [order[offset] for offset in range(26)] == expected
    for offset in random.Random(0).sample(range(26), 26):
        assert WindowShuffle(RUN_LENGTHS, window, make_named_rng)[offset] == expected[offset], (
            "it can be entered anywhere"
        )


def test_windows_read_few_runs_and_epochs_differ():
    runs = np.full(200, 50)
    first, second = (
        [
            WindowShuffle(runs, 100, lambda name, e=epoch: make_named_rng(name, e))[i]
            for i in range(0, 10_000, 7)
        ]
        for epoch in (0, 1)
    )
    assert first != second
    order = WindowShuffle(runs, 100, make_named_rng)
    for start in range(0, 10_000, 100):
        assert len({order[offset] // 50 for offset in range(start, start + 100)}) == 2, (
            "a window of 100 reads two runs of 50"
        )
    assert np.mean([order[offset + 1] - order[offset] == 1 for offset in range(9_999)]) < 0.05


def test_windows_of_a_hundred_million_records_take_little_memory():
    order = WindowShuffle(np.full(10_000, 10_000), 1000, make_named_rng)
    assert 0 <= order[99_999_999] < 10**8
    assert (
        sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
        < 200_000
    )


def locate_all(weights: list[float], count: int) -> list[tuple[int, int]]:
    mixture = DatasetMixture(weights)
    return [mixture.locate(position) for position in range(count)]


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
def test_every_dataset_is_read_in_order_and_by_its_weight(weights):
    exact = [Fraction(str(weight)) for weight in weights]
    scaled = [int(weight * 100) for weight in exact]
    period = sum(scaled) // int(np.gcd.reduce(scaled))
    positions = locate_all(weights, 3 * period)
    counts = [0] * len(weights)
    for position, (dataset, own_position) in enumerate(positions, 1):
        assert own_position == counts[dataset], "no record is left out or read twice"
        counts[dataset] += 1
        assert DatasetMixture(weights).count(position) == counts
        expected = [position * weight / sum(exact) for weight in exact]
        assert all(
            abs(count - want) <= len(weights) / 2
            for count, want in zip(counts, expected, strict=True)
        )
        if position % period == 0:
            assert counts == expected


def test_large_positions_are_exact():
    mixture = DatasetMixture([123_456_789, 5_000, 1])
    assert mixture.count(123_461_790 * 50) == [123_456_789 * 50, 5_000 * 50, 50]
    dataset, own_position = mixture.locate(123_461_790 * 50)
    assert own_position == [123_456_789 * 50, 5_000 * 50, 50][dataset]


# A part of the records ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 9, 10, 64, 600, 997])
def test_fewer_indices_are_some_of_more(size):
    previous: set[int] = set()
    for count in range(1, size + 2):
        indices = [int(index) for index in spread_indices(size, count)]
        assert indices == sorted(set(indices)) and len(indices) == min(count, size)
        assert previous <= set(indices) <= set(range(size))
        previous = set(indices)


@pytest.mark.parametrize(("size", "num_classes"), [(600, 12), (997, 7), (50_000, 1000)])
def test_indices_are_spread_over_classes_one_after_the_other_or_in_turn(size, num_classes):
    """Random numbers give a class of 5 expected records one to ten of them."""
    for count in (5 * num_classes, size // 7, size // 3, size // 2):
        indices = np.asarray(spread_indices(size, count))
        for classes in (indices * num_classes // size, indices % 2, indices % 3):
            counts = np.bincount(classes)
            assert abs(counts - count / len(counts)).max() <= 4, (count, counts)


def test_no_gap_is_much_wider_than_another():
    for size, count in ((10**6, 10), (10**6, 1000), (10**6, 12_345), (600, 60), (50_000, 1000)):
        gaps = np.diff(np.asarray(spread_indices(size, count)))
        assert gaps.max() <= 2.7 * gaps.min() + 1  # the golden section squared is 2.62


def test_indices_of_a_hundred_million_records_are_found_at_once():
    indices = np.asarray(spread_indices(10**8 + 7, 1000))
    assert len(indices) == 1000 and math.isclose(indices.mean(), 5e7, rel_tol=0.01)
    assert spread_indices(10**12, 10**12) == range(10**12)
