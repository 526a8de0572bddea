"""Masking: exact counts, bounds, seeds, a slow reference implementation, statistics."""

import math

import numpy as np
import pytest

from beit3.data.views.masking import (
    IGNORE_INDEX,
    NUM_SPECIAL_IDS,
    _add_block,
    draw_block_mask,
    mask_text,
)
from beit3.seeding import make_rng

MASK = 64001


def make_rngs(count, seed=0):
    return [make_rng(seed, 0, key) for key in range(count)]


SIZES = [((14, 14), 75), ((14, 14), 78), ((16, 16), 102), ((4, 4), 6), ((8, 8), 25), ((5, 9), 20)]


@pytest.mark.parametrize("grid, masked", SIZES)
def test_masks_have_the_exact_count(grid, masked):
    for rng in make_rngs(200):
        mask = draw_block_mask(grid, masked, rng)
        assert mask.shape == grid and mask.dtype == bool and mask.sum() == masked


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (3, 3), (14, 14)])
def test_every_count_is_possible(grid):
    for masked in range(grid[0] * grid[1] + 1):
        assert draw_block_mask(grid, masked, make_rng(0, 0, masked)).sum() == masked
    with pytest.raises(ValueError, match="num_masked"):
        draw_block_mask(grid, grid[0] * grid[1] + 1, make_rng(0, 0, 0))


def test_masks_depend_only_on_the_seed():
    mask = draw_block_mask((14, 14), 78, make_rng(3, 1, "a/b.jpg"))
    assert (mask == draw_block_mask((14, 14), 78, make_rng(3, 1, "a/b.jpg"))).all()
    for other in (make_rng(4, 1, "a/b.jpg"), make_rng(3, 2, "a/b.jpg"), make_rng(3, 1, "a/c.jpg")):
        assert (mask != draw_block_mask((14, 14), 78, other)).any()


def add_block_slowly(mask, max_added, min_area, rng):
    """Adds a block cell by cell with sets, from the same random numbers."""
    height, width = mask.shape
    for _ in range(10):
        if max_added >= min_area:
            area = rng.uniform(min_area, max_added)
        else:
            area = min_area - (min_area - max_added) * rng.random()
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
        if rows >= height or columns >= width:
            continue
        top = math.floor(rng.random() * (height - rows + 1))
        left = math.floor(rng.random() * (width - columns + 1))
        cells = {(y, x) for y in range(top, top + rows) for x in range(left, left + columns)}
        assert all(0 <= y < height and 0 <= x < width for y, x in cells)
        new = {cell for cell in cells if not mask[cell]}
        if new and len(new) <= max_added:
            for cell in new:
                mask[cell] = True
            return len(new)
    return 0


BLOCKS = [((14, 14), 75, 16), ((14, 14), 9, 16), ((5, 5), 20, 2), ((4, 9), 30, 3)]


@pytest.mark.parametrize("grid, max_added, min_area", BLOCKS)
def test_blocks_equal_a_slow_second_implementation(grid, max_added, min_area):
    outcomes = set()
    for key in range(300):
        start = np.random.default_rng(key).random(grid) < 0.3
        fast, slow = start.copy(), start.copy()
        added = _add_block(fast, max_added, min_area, (0.3, 1 / 0.3), make_rng(1, 0, key))
        assert added == add_block_slowly(slow, max_added, min_area, make_rng(1, 0, key))
        assert (
            (fast == slow).all() and 0 <= added <= max_added and added == fast.sum() - start.sum()
        )
        outcomes.add(added)
    assert len(outcomes) > 3


def test_a_block_never_spans_the_grid():
    # Every block should have 25 cells of 5 x 5, so a side of 5 or more is drawn and refused.
    for rng in make_rngs(300):
        mask = np.zeros((5, 5), dtype=bool)
        _add_block(mask, 25, 25, (0.9, 1.1), rng)
        assert not mask.all(0).any() and not mask.all(1).any()


def test_cells_are_masked_about_equally_often():
    rates = np.mean([draw_block_mask((14, 14), 78, rng) for rng in make_rngs(2000)], axis=0)
    assert abs(rates.mean() - 78 / 196) < 1e-9
    # Blocks lie inside the grid, so they cover a corner far less often than the middle.
    corner, middle = rates[0, 0], rates[5:9, 5:9]
    assert 0.02 < corner < 0.1 and middle.min() > 0.5 and middle.max() < 0.8
    assert np.abs(rates - rates[::-1]).max() < 0.06 and np.abs(rates - rates[:, ::-1]).max() < 0.06
    assert np.abs(rates - rates.T).max() < 0.06


@pytest.mark.parametrize("grid, masked", [((14, 14), 78), ((8, 8), 25), ((4, 4), 6)])
def test_masks_are_block_wise(grid, masked):
    def compare_neighbors(mask):
        return np.concatenate(
            [(mask[1:] == mask[:-1]).ravel(), (mask[:, 1:] == mask[:, :-1]).ravel()]
        ).mean()

    def draw_scattered_mask(rng):
        return rng.permutation(np.arange(grid[0] * grid[1]) < masked).reshape(grid)

    blocks = np.mean([compare_neighbors(draw_block_mask(grid, masked, g)) for g in make_rngs(200)])
    scattered = np.mean([compare_neighbors(draw_scattered_mask(g)) for g in make_rngs(200)])
    assert blocks > scattered + 0.09


def test_masked_tokens_are_counted_and_never_special():
    ids = np.array([0, 10, 11, 3, 12, 13, 14, 15, 16, 17, 18, 19, 2, 1, 1], dtype=np.int64)
    for rate, count in ((0.15, 2), (0.5, 5), (0.01, 1), (1.0, 10)):
        for key in range(50):
            masked_ids, targets = mask_text(ids, make_rng(0, 0, key), rate=rate, mask_id=MASK)
            chosen = targets != IGNORE_INDEX
            assert chosen.sum() == count == max(1, round(rate * 10))
            assert (ids[chosen] >= 4).all() and (targets[chosen] == ids[chosen]).all()
            assert (
                masked_ids[~chosen] == ids[~chosen]
            ).all() and masked_ids.dtype == targets.dtype == np.int64
    assert (ids == [0, 10, 11, 3, 12, 13, 14, 15, 16, 17, 18, 19, 2, 1, 1]).all()


def test_kept_tokens_and_texts_without_maskable_tokens():
    ids = np.array([0, 10, 11, 2])
    _, targets = mask_text(
        ids, make_rng(0, 0, 0), rate=1.0, mask_id=MASK, keep=np.array([True, True, False, True])
    )
    assert targets.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 11, IGNORE_INDEX]
    masked_ids, targets = mask_text(np.array([0, 3, 2]), make_rng(0, 0, 0), rate=0.5, mask_id=MASK)
    assert masked_ids.tolist() == [0, 3, 2] and (targets == IGNORE_INDEX).all()


def test_eighty_percent_are_masked_and_ten_replaced_at_random():
    ids = np.full(40_000, 7, dtype=np.int64)
    masked_ids, targets = mask_text(ids, make_rng(0, 0, "fates"), rate=0.5, mask_id=MASK)
    seen = masked_ids[targets != IGNORE_INDEX]
    masked, random = seen == MASK, (seen != MASK) & (seen != 7)
    assert len(seen) == 20_000
    # Standard deviations are 0.0028 and 0.0021.
    assert abs(masked.mean() - 0.8) < 0.012 and abs(random.mean() - 0.1) < 0.009
    assert seen[random].min() >= 4 and seen[random].max() <= MASK - 1
    assert seen[random].min() < 400 and seen[random].max() > MASK - 400
    narrow, _ = mask_text(ids, make_rng(0, 0, "fates"), rate=0.5, mask_id=MASK, vocab=(100, 103))
    assert set(narrow.tolist()) == {7, MASK, 100, 101, 102}


def test_all_masked_tokens_can_become_the_mask_token():
    ids = np.arange(10, 1010)
    masked_ids, targets = mask_text(
        ids, np.random.default_rng(0), mask_id=2000, rate=0.5, mask_token_rate=1.0
    )
    assert ((targets >= 0) == (masked_ids == 2000)).all() and (targets >= 0).sum() == 500
    assert (masked_ids[targets < 0] == ids[targets < 0]).all()


def test_without_blocks_patches_are_masked_one_by_one():
    """Neighbors are then masked independently: 26/64 * 25/63 of all pairs of them, .161."""
    rng = np.random.default_rng(0)
    masks = np.stack([draw_block_mask((8, 8), 26, rng, min_block=0) for _ in range(400)])
    assert (masks.sum((1, 2)) == 26).all() and masks.any(0).all()
    both_masked = (masks[:, :, 1:] & masks[:, :, :-1]).mean()
    assert abs(both_masked - 26 / 64 * 25 / 63) < 0.01
    blocks = np.stack([draw_block_mask((8, 8), 26, rng, min_block=4) for _ in range(400)])
    assert (blocks[:, :, 1:] & blocks[:, :, :-1]).mean() > 0.2


@pytest.mark.parametrize("min_block", [4, 16, 30])
def test_the_first_block_has_at_least_the_smallest_area(min_block):
    """Sides are rounded, so that an area may be a little smaller than the one that was drawn."""
    areas = []
    for seed in range(60):
        mask = np.zeros((14, 14), dtype=bool)
        added = _add_block(mask, 75, min_block, (0.3, 1 / 0.3), np.random.default_rng(seed))
        areas.append(added)
    assert min(areas) > 0.7 * min_block and min(areas) < 1.6 * min_block
    assert 60 < max(areas) <= 75


def test_random_tokens_are_pieces_and_the_first_piece_is_masked():
    """Ids 0 to 3 are special and ids from the mask token on are none of the text's."""
    ids, mask_id = np.full(4000, NUM_SPECIAL_IDS), 9
    masked, targets = mask_text(ids, np.random.default_rng(0), mask_id=mask_id, rate=1.0)
    assert (targets == NUM_SPECIAL_IDS).all(), "the first piece is masked like others"
    assert set(masked.tolist()) == set(range(NUM_SPECIAL_IDS, mask_id + 1))
    random_ids = masked[(masked != mask_id) & (masked != NUM_SPECIAL_IDS)]
    assert 0.06 < len(random_ids) / 4000 < 0.1, "four of five random pieces are others"
    within = mask_text(ids, np.random.default_rng(0), mask_id=mask_id, rate=1.0, vocab=(6, 8))[0]
    assert set(within.tolist()) == {NUM_SPECIAL_IDS, 6, 7, mask_id}
