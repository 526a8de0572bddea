"""In which order records are read: pure functions of a position, so that nothing is saved and a resume is exact.

`Windows` is an epoch of a large set, random within bounds and cheap to enter anywhere; `Mix` deals positions out to sets.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


class Windows:
    """Offset in an epoch -> record. Runs of neighbouring records (shards) come in random order, and then windows are shuffled.

    runs: records of each run. window: consecutive records, of as many runs as they take, that are shuffled among each
    other. draw: the generator of a name. Takes memory for the runs and for two windows, however many records there are.
    """

    def __init__(self, runs: np.ndarray, window: int, draw: Callable[[str], np.random.Generator]):
        self.size, self.window, self.draw = int(runs.sum()), window, draw
        order = draw("runs").permutation(len(runs))
        self.ends = np.cumsum(runs[order])  # where a run ends in this epoch
        self.shifts = (np.cumsum(runs) - runs)[order] - (
            self.ends - runs[order]
        )  # from a place in the epoch to the record
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, offset: int) -> int:
        window, place = divmod(offset, self.window)
        place = window * self.window + int(self.shuffled(window)[place])
        return place + int(self.shifts[np.searchsorted(self.ends, place, side="right")])

    def _shuffled(self, window: int) -> np.ndarray:
        return self.draw(f"window {window}").permutation(
            min(self.window, self.size - window * self.window)
        )


class Mix:
    """Positions dealt out to sets by weight, evenly: of the first n each set has its share, rounded.

    Exact wherever the shares are whole, as after every sum of whole weights; in between at most half the number of sets off.
    The first set takes its share of all positions, the second its share of what is left, and so on.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
        self.shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def __call__(self, position: int) -> tuple[int, int]:
        """(set, place in its own endless sequence)."""
        for number, share in enumerate(self.shares[:-1]):
            taken = _rounded(position * share)
            if _rounded((position + 1) * share) > taken:
                return number, taken
            position -= taken
        return len(self.shares) - 1, position

    def counts(self, positions: int) -> list[int]:
        """How many of the first `positions` each set has."""
        counts = []
        for share in self.shares:
            counts.append(_rounded(positions * share))
            positions -= counts[-1]
        return counts


def _rounded(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
