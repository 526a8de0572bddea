"""Pasting against pixel-by-pixel interpolation, whole boxes, sizes, strips, and the way into
RLE."""

import math

import pytest
import torch

from beit3.data.stores.rle import decode_rle
from beit3.detection import masks


def paste(probabilities, boxes, height, width):
    """Drawn: uint8 [n, H, W]."""
    return torch.stack(
        [decode_rle(rle) for rle in masks.paste_masks(probabilities, boxes, height, width)]
    )


def slow(probability, box, height, width):
    """A pixel is in if its centre is in the box, and the four cells around it, the outermost going
    on to the edge, give half."""
    rows, columns = probability.shape
    x1, y1, x2, y2 = box.tolist()
    mask = torch.zeros(height, width, dtype=torch.uint8)
    for row in range(height):
        for column in range(width):
            if not (x1 <= column + 0.5 < x2 and y1 <= row + 0.5 < y2):
                continue
            x = min(max((column + 0.5 - x1) / (x2 - x1) * columns - 0.5, 0), columns - 1)
            y = min(max((row + 0.5 - y1) / (y2 - y1) * rows - 0.5, 0), rows - 1)
            i, j = min(math.floor(y), rows - 2), min(math.floor(x), columns - 2)
            v, u = y - i, x - j
            upper = probability[i, j] * (1 - u) + probability[i, j + 1] * u
            lower = probability[i + 1, j] * (1 - u) + probability[i + 1, j + 1] * u
            mask[row, column] = float(upper * (1 - v) + lower * v) >= 0.5
    return mask


BOXES = torch.tensor(
    [
        [3.3, 2.7, 20.1, 15.9],
        [0, 0, 32, 24],
        [-7.5, -3.2, 11.4, 40],  # over three edges
        [25.5, 20.5, 90, 21.6],  # a row, over the right edge
        [4.4, 4.4, 4.9, 9],  # a column with its centres
        [4.6, 4, 5.4, 9],  # between two columns of centres
        [7, 7, 8, 8],  # one pixel
        [40, 40, 50, 50],  # outside
    ]
)


def probabilities(count, side=7, seed=0):
    return torch.rand(
        count, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_equals_pixel_by_pixel():
    values, boxes = probabilities(len(BOXES)), BOXES.double()
    found = paste(values, boxes, 24, 32)
    assert found.shape == (8, 24, 32)
    for mask, value, box in zip(found, values, boxes, strict=True):
        assert torch.equal(mask, slow(value, box, 24, 32)), box
    assert found[:5].flatten(1).any(1).all() and not found[[5, 7]].any()


def test_a_full_mask_is_its_box():
    found = paste(torch.ones(len(BOXES), 28, 28), BOXES, 24, 32)
    rows, columns = torch.arange(24)[:, None] + 0.5, torch.arange(32) + 0.5
    for mask, (x1, y1, x2, y2) in zip(found, BOXES.tolist(), strict=True):
        assert torch.equal(
            mask.bool(), (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
        )
    assert not paste(torch.full((1, 28, 28), 0.49), BOXES[:1], 24, 32).any()


def test_the_box_is_not_rounded():
    """The left half of a mask ends in the middle of the float box, wherever that is."""
    half = torch.zeros(1, 28, 28)
    half[..., :14] = 1
    for shift in (0.0, 0.3, 0.6, 0.9):
        mask = paste(half, torch.tensor([[2 + shift, 2.0, 12 + shift, 12.0]]), 16, 16)[0]
        assert mask[5].nonzero().flatten().tolist() == [
            i for i in range(16) if 2 + shift <= i + 0.5 <= 7 + shift
        ]


@pytest.mark.parametrize("strip", [1, 40, 100])
def test_strips_change_nothing(strip, monkeypatch):
    values = probabilities(len(BOXES), seed=1)
    whole = paste(values, BOXES, 24, 32)
    monkeypatch.setattr(masks, "STRIP", strip)
    assert torch.equal(paste(values, BOXES, 24, 32), whole)


def test_a_large_picture_is_read_in_strips(monkeypatch):
    read, shapes = masks._read, []
    monkeypatch.setattr(
        masks, "_read", lambda *arguments: shapes.append(read(*arguments)) or shapes[-1]
    )
    masks.paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 10, 3000, 2000]]), 2100, 3100)
    assert len(shapes) == 3 and max(part.numel() for part in shapes) <= masks.STRIP


def test_types_and_nothing():
    values = probabilities(len(BOXES), seed=2).bfloat16()
    encoded = masks.paste_masks(values, BOXES.bfloat16(), 24, 32)
    assert all(rle["size"] == [24, 32] and isinstance(rle["counts"], str) for rle in encoded)
    assert torch.equal(
        torch.stack([decode_rle(rle) for rle in encoded]),
        paste(values.float(), BOXES.bfloat16().float(), 24, 32),
    )
    assert masks.paste_masks(values[:0], BOXES[:0], 24, 32) == []
