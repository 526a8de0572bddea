"""What masked data modelling hides: block-wise image masks (BEiT v2's generator) and BERT-style text masks.

BEiT-3 paper section 2.2: 40 % of the patches block-wise, 15 % of the tokens of a text, 50 % of those of a pair's text.
Shapes, numpy: mask [h, w] bool, True = masked; ids [L] int64 -> corrupted [L], targets [L] (-100 = ignore).
"""

import math

import numpy as np

IGNORE = -100
TRIES = 10


def block_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: np.random.Generator,
    *,
    min_block: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Mask [h, w] with exactly `num_masked` cells True, in rectangles of `min_block` cells or more where they fit.

    `aspect` bounds height / width, drawn log-uniformly. What blocks cannot reach is filled cell by cell (BEiT v2).
    ValueError when the grid has fewer than `num_masked` cells.
    """
    height, width = grid
    if not 0 <= num_masked <= height * width:
        raise ValueError(
            f"num_masked {num_masked} does not fit a {height} x {width} grid: use 0 to {height * width}"
        )
    mask = np.zeros(grid, dtype=bool)
    missing = num_masked
    while missing:
        added = _add_block(mask, missing, min_block, aspect, rng)
        if not added:
            break
        missing -= added
    if missing:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, size=missing, replace=False)] = True
    return mask


def text_mask(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    rate: float = 0.0,
    count: int = 0,
    vocab: tuple[int, int] | None = None,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt `ids` [L]; returns (corrupted [L], targets [L], -100 at positions not chosen).

    Of the n maskable positions exactly `count`, or max(1, round(rate * n)), are chosen (none when n is 0): 80 % of them become
    `mask_id`, 10 % a random id of `vocab` (low inclusive, high exclusive; default every real piece), 10 % stay.
    `keep` [L] bool marks positions never chosen; by default the specials, ids below 4.
    """
    low, high = vocab or (4, mask_id)
    maskable = np.flatnonzero(~keep if keep is not None else ids >= 4)
    corrupted, targets = ids.copy(), np.full_like(ids, IGNORE)
    if not len(maskable):
        return corrupted, targets
    count = min(len(maskable), count or max(1, round(rate * len(maskable))))
    chosen = rng.choice(maskable, size=count, replace=False)
    targets[chosen] = ids[chosen]
    fate = rng.random(count)
    replacement = np.where(fate < 0.8, mask_id, rng.integers(low, high, size=count))
    corrupted[chosen] = np.where(fate < 0.9, replacement, ids[chosen])
    return corrupted, targets


def _add_block(
    mask: np.ndarray, cap: int, smallest: int, aspect: tuple[float, float], rng: np.random.Generator
) -> int:
    """Add one block of at most `cap` new cells to `mask`; returns how many it added, 0 after ten failures."""
    height, width = mask.shape
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(TRIES):
        # With cap below the smallest block the interval is merely walked backwards, as in the release.
        area = smallest + (cap - smallest) * rng.random()
        ratio = math.exp(low + (high - low) * rng.random())
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (rows < height and columns < width):
            continue
        top, left = (
            int(rng.random() * (height - rows + 1)),
            int(rng.random() * (width - columns + 1)),
        )
        block = mask[top : top + rows, left : left + columns]
        added = rows * columns - int(block.sum())
        if 0 < added <= cap:
            block[:] = True
            return added
    return 0
