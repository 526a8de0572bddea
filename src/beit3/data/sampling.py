"""The order in which records are read, as pure functions of a position.

Nothing is saved, so a resumed run reads exactly what it would have read. `WindowShuffle` is an
epoch of a large dataset: shuffled within bounds, so that it can be entered anywhere at low cost.
`DatasetMixture` assigns positions to several datasets by weight. `spread_indices` says which
records a limit keeps.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


def spread_indices(size: int, count: int) -> range | np.ndarray:
    """Returns `count` of the indices below `size`, spread evenly over them, in ascending order.

    All of them are a range, fewer an int64 array [count]. A smaller count's are among those of a
    larger one. They are the multiples of a Fibonacci number modulo the next one, as far as they lie
    below `size`: multiples of the golden section leave even gaps at every count, and follow no
    period of the records, as every tenth record would. So a file sorted by class gives each class
    its fraction.
    """
    if count >= size:
        return range(size)
    step, modulus = 1, 2
    while modulus < size:
        step, modulus = modulus, step + modulus
    # A fraction of .618 to 1 of the multiples lies below `size`: twice `count` are enough.
    multiples = np.arange(min(modulus, 2 * count + 64)) * step % modulus
    return np.sort(multiples[multiples < size][:count])


class WindowShuffle:
    """The order of one epoch: offset in the epoch -> index of a record.

    Runs of neighboring records (shards) come in random order; then the records within each window
    of the result are shuffled. Memory is needed for the runs and two windows, however many records
    there are.

    Args:
        run_lengths: Number of records in each run, int [runs].
        window: Number of consecutive records, from any number of runs, that are shuffled together.
        get_rng: Returns the random generator that belongs to a name.
    """

    def __init__(
        self, run_lengths: np.ndarray, window: int, get_rng: Callable[[str], np.random.Generator]
    ) -> None:
        self.size, self.window, self.get_rng = int(run_lengths.sum()), window, get_rng
        order = get_rng("runs").permutation(len(run_lengths))
        first_records = (np.cumsum(run_lengths) - run_lengths)[order]
        self.run_ends = np.cumsum(run_lengths[order])  # in this epoch
        run_starts = self.run_ends - run_lengths[order]
        self.shifts = first_records - run_starts  # from an offset in the epoch to a record
        self.permute_window = lru_cache(maxsize=2)(self._permute_window)

    def __getitem__(self, offset: int) -> int:
        window, offset = divmod(offset, self.window)
        offset = window * self.window + int(self.permute_window(window)[offset])
        run = np.searchsorted(self.run_ends, offset, side="right")
        return offset + int(self.shifts[run])

    def _permute_window(self, window: int) -> np.ndarray:
        size = min(self.window, self.size - window * self.window)
        return self.get_rng(f"window {window}").permutation(size)


class DatasetMixture:
    """Assigns positions to datasets by weight, evenly.

    Of the first n positions each dataset has its fraction, rounded. This is exact wherever the
    fractions of n are whole, as at every multiple of the sum of whole weights; in between it is off
    by at most half the number of datasets. The first dataset takes its fraction of all positions,
    the second one its fraction of the remaining ones, and so on.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is exactly a tenth
        self.fractions = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        """Fraction that each dataset takes of what the ones before it leave."""

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (dataset, position in its own endless sequence)."""
        for dataset, fraction in enumerate(self.fractions[:-1]):
            taken = _round_half_up(position * fraction)
            if _round_half_up((position + 1) * fraction) > taken:
                return dataset, taken
            position -= taken
        return len(self.fractions) - 1, position

    def count(self, num_positions: int) -> list[int]:
        """Returns how many of the first `num_positions` each dataset has."""
        counts = []
        for fraction in self.fractions:
            counts.append(_round_half_up(num_positions * fraction))
            num_positions -= counts[-1]
        return counts


def _round_half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
