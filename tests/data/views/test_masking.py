"""Masks: exact counts, bounds, seeds, the generator's rules against a slow second implementation, statistics."""

import math

import numpy as np
import pytest

from beit3.data.views.masking import IGNORE, _add_block, block_mask, text_mask
from beit3.seeding import make_rng

MASK = 64001


def generators(count, seed=0):
    return [make_rng(seed, 0, key) for key in range(count)]


SIZES = [((14, 14), 75), ((14, 14), 78), ((16, 16), 102), ((4, 4), 6), ((8, 8), 25), ((5, 9), 20)]


@pytest.mark.parametrize("grid, masked", SIZES)
def test_exact_count(grid, masked):
    for generator in generators(200):
        mask = block_mask(grid, masked, generator)
        assert mask.shape == grid and mask.dtype == bool and mask.sum() == masked


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (3, 3), (14, 14)])
def test_every_possible_count(grid):
    for masked in range(grid[0] * grid[1] + 1):
        assert block_mask(grid, masked, make_rng(0, 0, masked)).sum() == masked
    with pytest.raises(ValueError, match="num_masked"):
        block_mask(grid, grid[0] * grid[1] + 1, make_rng(0, 0, 0))


def test_seeds():
    one = block_mask((14, 14), 78, make_rng(3, 1, "a/b.jpg"))
    assert (one == block_mask((14, 14), 78, make_rng(3, 1, "a/b.jpg"))).all()
    for other in (make_rng(4, 1, "a/b.jpg"), make_rng(3, 2, "a/b.jpg"), make_rng(3, 1, "a/c.jpg")):
        assert (one != block_mask((14, 14), 78, other)).any()
    # Written down once: a mask must never depend on the process (PYTHONHASHSEED) or the machine.
    assert make_rng(0, 0, "x").integers(1 << 30) == 71608040


def obvious_block(mask, cap, smallest, generator):
    """Section 3 of the generator's rules, cell by cell, with sets; consumes the same draws."""
    height, width = mask.shape
    for _ in range(10):
        area = (
            generator.uniform(smallest, cap)
            if cap >= smallest
            else smallest - (smallest - cap) * generator.random()
        )
        ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
        if rows >= height or columns >= width:
            continue
        top = math.floor(generator.random() * (height - rows + 1))
        left = math.floor(generator.random() * (width - columns + 1))
        cells = {(y, x) for y in range(top, top + rows) for x in range(left, left + columns)}
        assert all(0 <= y < height and 0 <= x < width for y, x in cells)
        new = {cell for cell in cells if not mask[cell]}
        if new and len(new) <= cap:
            for cell in new:
                mask[cell] = True
            return len(new)
    return 0


BLOCKS = [((14, 14), 75, 16), ((14, 14), 9, 16), ((5, 5), 20, 2), ((4, 9), 30, 3)]


@pytest.mark.parametrize("grid, cap, smallest", BLOCKS)
def test_blocks_equal_the_obvious_rules(grid, cap, smallest):
    outcomes = set()
    for key in range(300):
        start = np.random.default_rng(key).random(grid) < 0.3
        fast, slow = start.copy(), start.copy()
        added = _add_block(fast, cap, smallest, (0.3, 1 / 0.3), make_rng(1, 0, key))
        assert added == obvious_block(slow, cap, smallest, make_rng(1, 0, key))
        assert (fast == slow).all() and 0 <= added <= cap and added == fast.sum() - start.sum()
        outcomes.add(added)
    assert len(outcomes) > 3


def test_a_block_never_spans_the_grid():
    # Strict <: every draw asks for 25 cells on 5 x 5, so a side of 5 or more is drawn and must be refused.
    for generator in generators(300):
        mask = np.zeros((5, 5), dtype=bool)
        _add_block(mask, 25, 25, (0.9, 1.1), generator)
        assert not mask.all(0).any() and not mask.all(1).any()


def test_cells_are_masked_about_equally_often():
    often = np.mean([block_mask((14, 14), 78, generator) for generator in generators(2000)], axis=0)
    assert abs(often.mean() - 78 / 196) < 1e-9
    # Blocks lie whole inside the grid, so they cover a corner far less often than the middle, but every cell sometimes.
    corner, middle = often[0, 0], often[5:9, 5:9]
    assert 0.02 < corner < 0.1 and middle.min() > 0.5 and middle.max() < 0.8
    assert np.abs(often - often[::-1]).max() < 0.06 and np.abs(often - often[:, ::-1]).max() < 0.06
    assert np.abs(often - often.T).max() < 0.06


@pytest.mark.parametrize("grid, masked", [((14, 14), 78), ((8, 8), 25), ((4, 4), 6)])
def test_masks_are_block_wise(grid, masked):
    def neighbours_alike(mask):
        return np.concatenate(
            [(mask[1:] == mask[:-1]).ravel(), (mask[:, 1:] == mask[:, :-1]).ravel()]
        ).mean()

    def scattered(generator):
        return generator.permutation(np.arange(grid[0] * grid[1]) < masked).reshape(grid)

    blocks = np.mean([neighbours_alike(block_mask(grid, masked, g)) for g in generators(200)])
    chance = np.mean([neighbours_alike(scattered(g)) for g in generators(200)])
    assert blocks > chance + 0.09


def test_text_mask_counts_and_positions():
    ids = np.array([0, 10, 11, 3, 12, 13, 14, 15, 16, 17, 18, 19, 2, 1, 1], dtype=np.int64)
    for rate, count in ((0.15, 2), (0.5, 5), (0.01, 1), (1.0, 10)):
        for key in range(50):
            corrupted, targets = text_mask(ids, make_rng(0, 0, key), rate=rate, mask_id=MASK)
            chosen = targets != IGNORE
            assert chosen.sum() == count == max(1, round(rate * 10))
            assert (ids[chosen] >= 4).all() and (targets[chosen] == ids[chosen]).all()
            assert (
                corrupted[~chosen] == ids[~chosen]
            ).all() and corrupted.dtype == targets.dtype == np.int64
    assert (ids == [0, 10, 11, 3, 12, 13, 14, 15, 16, 17, 18, 19, 2, 1, 1]).all()


def test_text_mask_keep_and_nothing_to_mask():
    ids = np.array([0, 10, 11, 2])
    _, targets = text_mask(
        ids, make_rng(0, 0, 0), rate=1.0, mask_id=MASK, keep=np.array([True, True, False, True])
    )
    assert targets.tolist() == [IGNORE, IGNORE, 11, IGNORE]
    corrupted, targets = text_mask(np.array([0, 3, 2]), make_rng(0, 0, 0), rate=0.5, mask_id=MASK)
    assert corrupted.tolist() == [0, 3, 2] and (targets == IGNORE).all()


def test_text_mask_fates():
    ids = np.full(40_000, 7, dtype=np.int64)
    corrupted, targets = text_mask(ids, make_rng(0, 0, "fates"), rate=0.5, mask_id=MASK)
    seen = corrupted[targets != IGNORE]
    masked, random = seen == MASK, (seen != MASK) & (seen != 7)
    assert len(seen) == 20_000
    # Standard deviations are 0.0028 and 0.0021.
    assert abs(masked.mean() - 0.8) < 0.012 and abs(random.mean() - 0.1) < 0.009
    assert seen[random].min() >= 4 and seen[random].max() <= MASK - 1
    assert seen[random].min() < 400 and seen[random].max() > MASK - 400
    narrow, _ = text_mask(ids, make_rng(0, 0, "fates"), rate=0.5, mask_id=MASK, vocab=(100, 103))
    assert set(narrow.tolist()) == {7, MASK, 100, 101, 102}
