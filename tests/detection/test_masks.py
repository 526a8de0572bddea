"""Pasted masks against interpolation pixel by pixel; full masks, strips, dtypes and RLEs."""

import math

import pytest
import torch

from beit3.data.stores.rle import decode_rle
from beit3.detection import masks


def paste(probabilities, boxes, height, width):
    """Pasted masks as uint8 [n, H, W]."""
    rles = masks.paste_masks(probabilities, boxes, height, width)
    return torch.stack([decode_rle(rle) for rle in rles])


def paste_with_loop(probability, box, height, width):
    """A pixel is in the mask if its center is in the box and the four cells around it give half.

    The values of the outermost cells extend to the edge of the box.
    """
    num_rows, num_columns = probability.shape
    x1, y1, x2, y2 = box.tolist()
    mask = torch.zeros(height, width, dtype=torch.uint8)
    for row in range(height):
        for column in range(width):
            if not (x1 <= column + 0.5 < x2 and y1 <= row + 0.5 < y2):
                continue
            x = min(max((column + 0.5 - x1) / (x2 - x1) * num_columns - 0.5, 0), num_columns - 1)
            y = min(max((row + 0.5 - y1) / (y2 - y1) * num_rows - 0.5, 0), num_rows - 1)
            i, j = min(math.floor(y), num_rows - 2), min(math.floor(x), num_columns - 2)
            v, u = y - i, x - j
            upper = probability[i, j] * (1 - u) + probability[i, j + 1] * u
            lower = probability[i + 1, j] * (1 - u) + probability[i + 1, j + 1] * u
            mask[row, column] = float(upper * (1 - v) + lower * v) >= 0.5
    return mask


BOXES = torch.tensor(
    [
        [3.3, 2.7, 20.1, 15.9],
        [0, 0, 32, 24],
        [-7.5, -3.2, 11.4, 40],  # beyond three edges
        [25.5, 20.5, 90, 21.6],  # one row, beyond the right edge
        [4.4, 4.4, 4.9, 9],  # one column with the centers of pixels
        [4.6, 4, 5.4, 9],  # between two columns of centers
        [7, 7, 8, 8],  # one pixel
        [40, 40, 50, 50],  # outside
    ]
)


def make_probabilities(count, side=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, side, side, generator=generator, dtype=torch.float64)


def test_pasted_masks_equal_a_loop_over_pixels():
    probabilities, boxes = make_probabilities(len(BOXES)), BOXES.double()
    pasted = paste(probabilities, boxes, 24, 32)
    assert pasted.shape == (8, 24, 32)
    for mask, probability, box in zip(pasted, probabilities, boxes, strict=True):
        assert torch.equal(mask, paste_with_loop(probability, box, 24, 32)), box
    assert pasted[:5].flatten(1).any(1).all() and not pasted[[5, 7]].any()


def test_a_full_mask_fills_its_box():
    pasted = paste(torch.ones(len(BOXES), 28, 28), BOXES, 24, 32)
    rows, columns = torch.arange(24)[:, None] + 0.5, torch.arange(32) + 0.5
    for mask, (x1, y1, x2, y2) in zip(pasted, BOXES.tolist(), strict=True):
        inside = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
        assert torch.equal(mask.bool(), inside)
    assert not paste(torch.full((1, 28, 28), 0.49), BOXES[:1], 24, 32).any()


def test_boxes_are_not_rounded():
    """The left half of a mask ends in the middle of the box, at any subpixel position."""
    left_half = torch.zeros(1, 28, 28)
    left_half[..., :14] = 1
    for shift in (0.0, 0.3, 0.6, 0.9):
        mask = paste(left_half, torch.tensor([[2 + shift, 2.0, 12 + shift, 12.0]]), 16, 16)[0]
        expected = [i for i in range(16) if 2 + shift <= i + 0.5 <= 7 + shift]
        assert mask[5].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("pixels_per_strip", [1, 40, 100])
def test_strips_do_not_change_masks(pixels_per_strip, monkeypatch):
    probabilities = make_probabilities(len(BOXES), seed=1)
    expected = paste(probabilities, BOXES, 24, 32)
    monkeypatch.setattr(masks, "PIXELS_PER_STRIP", pixels_per_strip)
    assert torch.equal(paste(probabilities, BOXES, 24, 32), expected)


def test_large_masks_are_sampled_in_strips(monkeypatch):
    sample, strip_sizes = masks._sample, []

    def record_size(*arguments):
        strip = sample(*arguments)
        strip_sizes.append(strip.numel())
        return strip

    monkeypatch.setattr(masks, "_sample", record_size)
    masks.paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 10, 3000, 2000]]), 2100, 3100)
    assert len(strip_sizes) == 3 and max(strip_sizes) <= masks.PIXELS_PER_STRIP


def test_bfloat16_and_no_masks_are_accepted():
    probabilities = make_probabilities(len(BOXES), seed=2).bfloat16()
    rles = masks.paste_masks(probabilities, BOXES.bfloat16(), 24, 32)
    assert all(rle["size"] == [24, 32] and isinstance(rle["counts"], str) for rle in rles)
    expected = paste(probabilities.float(), BOXES.bfloat16().float(), 24, 32)
    assert torch.equal(torch.stack([decode_rle(rle) for rle in rles]), expected)
    assert masks.paste_masks(probabilities[:0], BOXES[:0], 24, 32) == []
