"""Masking of pretraining: block-wise masks of images (BEiT v2) and BERT-style masks of texts.

BEiT-3 paper, section 2.2: 40 % of the image patches are masked block-wise, 15 % of the tokens of a
text, and 50 % of those of an image-text pair's text. Everything is a numpy array.
"""

import math

import numpy as np

IGNORE_INDEX = -100
"""Target at positions that are not masked."""

NUM_SPECIAL_IDS = 4
"""Ids below it are special tokens."""

BLOCK_TRIES = 10


def draw_block_mask(
    grid: tuple[int, int],
    num_masked: int,
    rng: np.random.Generator,
    *,
    min_block: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Draws a mask of image patches that consists of rectangular blocks.

    Patches that blocks cannot cover without exceeding the number are drawn one by one, as in
    BEiT v2.

    Args:
        grid: Rows and columns of patches (h, w).
        num_masked: Number of masked patches.
        rng: Random generator.
        min_block: Smallest area of a block in patches, where it fits; 0 = no blocks, all patches
            are drawn one by one.
        aspect: Range of a block's height / width, which is drawn log-uniformly.

    Returns:
        bool [h, w] with exactly `num_masked` True values.

    Raises:
        ValueError: The grid has fewer patches.
    """
    height, width = grid
    if not 0 <= num_masked <= height * width:
        raise ValueError(
            f"num_masked {num_masked} does not fit a {height} x {width} grid: "
            f"use 0 to {height * width}"
        )
    mask = np.zeros(grid, dtype=bool)
    remaining = num_masked
    while remaining and min_block:
        num_added = _add_block(mask, remaining, min_block, aspect, rng)
        if not num_added:
            break
        remaining -= num_added
    if remaining:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, size=remaining, replace=False)] = True
    return mask


def mask_text(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    rate: float = 0.0,
    count: int = 0,
    vocab: tuple[int, int] | None = None,
    keep: np.ndarray | None = None,
    mask_token_rate: float = 0.8,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks tokens of a text: BERT's 80 % become the mask token, 10 % a random token, 10 % stay.

    Args:
        ids: Token ids, int64 [L].
        rng: Random generator.
        mask_id: Id of the mask token.
        rate: Fraction of the maskable tokens to mask, rounded, at least one.
        count: Number of tokens to mask instead.
        vocab: Range of random ids, without the upper one; by default all pieces.
        keep: bool [L], True where a token is never masked; by default special tokens.
        mask_token_rate: Fraction of the masked tokens that become the mask token. Of the others one
            half become a random token and one half stay.

    Returns:
        The masked ids [L], and the targets [L] with `IGNORE_INDEX` where nothing is masked. Without
        maskable tokens nothing is.
    """
    low, high = vocab or (NUM_SPECIAL_IDS, mask_id)
    is_maskable = ~keep if keep is not None else ids >= NUM_SPECIAL_IDS
    maskable = np.flatnonzero(is_maskable)
    masked_ids, targets = ids.copy(), np.full_like(ids, IGNORE_INDEX)
    if not len(maskable):
        return masked_ids, targets
    count = min(len(maskable), count or max(1, round(rate * len(maskable))))
    chosen = rng.choice(maskable, size=count, replace=False)
    targets[chosen] = ids[chosen]
    draw = rng.random(count)
    random_ids = rng.integers(low, high, size=count)
    replacement = np.where(draw < mask_token_rate, mask_id, random_ids)
    masked_ids[chosen] = np.where(draw < (1 + mask_token_rate) / 2, replacement, ids[chosen])
    return masked_ids, targets


def _add_block(
    mask: np.ndarray,
    max_added: int,
    min_area: int,
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> int:
    """Masks one block; returns how many patches it adds, 0 when no block fits after ten tries."""
    height, width = mask.shape
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(BLOCK_TRIES):
        # Where max_added is below min_area the interval is reversed, as in the release.
        area = min_area + (max_added - min_area) * rng.random()
        ratio = math.exp(low + (high - low) * rng.random())
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows >= height or columns >= width:
            continue
        top = int(rng.random() * (height - rows + 1))
        left = int(rng.random() * (width - columns + 1))
        block = mask[top : top + rows, left : left + columns]
        num_added = rows * columns - int(block.sum())
        if 0 < num_added <= max_added:
            block[:] = True
            return num_added
    return 0
