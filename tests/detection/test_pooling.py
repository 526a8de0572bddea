"""RoI pooling: the map each box is pooled from, and the features against a loop over samples."""

import math

import pytest
import torch
from torch import Tensor

from beit3.detection.pooling import RoIPooler

PATCH_SIZE = 8


def make_maps(side: int, seed: int = 0) -> list[Tensor]:
    """Five random maps [2, 8, *, *] for images of `side` pixels and patches of 8."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 8, side // stride, side // stride, generator=generator)
        for stride in (2, 4, 8, 16, 32)
    ]


@pytest.mark.parametrize(
    ("patch_size", "sides"),
    [(16, (111, 112, 223, 224, 447, 448, 900)), (8, (55, 56, 111, 112, 223, 224, 450))],
)
def test_larger_boxes_are_pooled_from_coarser_maps(patch_size, sides):
    boxes = torch.tensor([[5.0, 5.0, 5.0 + side, 5.0 + side] for side in sides])
    expected = [0, 1, 1, 2, 2, 3, 3]
    assert RoIPooler(patch_size, 14).map_levels([boxes]).tolist() == expected
    assert RoIPooler(patch_size, 7).map_levels([boxes / 2]).tolist() == expected
    empty_box = torch.tensor([[3.0, 3, 3, 3]])
    assert RoIPooler(patch_size, 14).map_levels([empty_box]).tolist() == [0]


def test_pooling_equals_a_loop_over_samples():
    maps = make_maps(512)
    boxes = [
        torch.tensor([[10.3, 20.1, 31.7, 35.2], [100.0, 50, 400, 500]]),
        torch.tensor([[0.0, 0, 100, 90], [60, 5, 180, 200], [7, 7, 8, 8]]),
    ]
    pooler = RoIPooler(PATCH_SIZE, 14)
    expected = [
        pool_with_loop(maps, index, box, 3)
        for index, image_boxes in enumerate(boxes)
        for box in image_boxes.tolist()
    ]
    torch.testing.assert_close(pooler(maps, boxes, 3), torch.stack(expected), atol=1e-5, rtol=1e-4)
    no_boxes = boxes[0][:0]
    assert pooler(maps, [no_boxes, no_boxes], 3).shape == (0, 8, 3, 3)


def pool_with_loop(maps: list[Tensor], image: int, box: list[float], size: int) -> Tensor:
    """Features [C, size, size]: the level by the paper's formula, then the mean of samples."""
    width, height = box[2] - box[0], box[3] - box[1]
    level = math.floor(4 + math.log2(math.sqrt(width * height) / (14 * PATCH_SIZE)) + 1e-6)
    level = min(max(level, 2), 5) - 2
    stride = PATCH_SIZE * 2.0 ** (level - 2)
    return average_samples(maps[level][image], [value / stride for value in box], size)


def average_samples(features: Tensor, box: list[float], size: int) -> Tensor:
    """The mean of ceil(bin) x ceil(bin) samples in each of size x size bins.

    The centers of cells are at halves.
    """
    x1, y1, x2, y2 = box
    bin_width, bin_height = (x2 - x1) / size, (y2 - y1) / size
    num_columns, num_rows = math.ceil(bin_width), math.ceil(bin_height)
    pooled = torch.zeros(features.shape[0], size, size)
    for row in range(size):
        for column in range(size):
            for i in range(num_rows):
                for j in range(num_columns):
                    y = y1 + (row + (i + 0.5) / num_rows) * bin_height - 0.5
                    x = x1 + (column + (j + 0.5) / num_columns) * bin_width - 0.5
                    sample = interpolate(features, y, x)
                    pooled[:, row, column] += sample / (num_rows * num_columns)
    return pooled


def interpolate(features: Tensor, y: float, x: float) -> Tensor:
    """The bilinear value between cells; beyond the outer centers the value of the border."""
    y, x = min(max(y, 0), features.shape[1] - 1), min(max(x, 0), features.shape[2] - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, features.shape[1] - 1), min(left + 1, features.shape[2] - 1)
    upper = features[:, top, left] * (1 - (x - left)) + features[:, top, right] * (x - left)
    lower = features[:, bottom, left] * (1 - (x - left)) + features[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)
