"""From a mask's probabilities within its box to the picture's pixels. Probabilities [n, m, m] and
boxes [n, 4] -> RLE.

A mask is laid over its box as it is, not over whole pixels: rounding the box first, as
torchvision's paste does, leaves a
mean IoU of .91 with this for boxes of 20 to 60 pixels. A pixel is in if its centre is in the box
and reads at least .5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.stores.rle import RLE, encode_window
from beit3.ops.precision import promote_to_float32

THRESHOLD = 0.5
STRIP = 1 << 21
"""Pixels that are read at once, at 12 bytes each."""


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> list[RLE]:
    """Masks [n, m, m] at float boxes [n, 4] (x1 y1 x2 y2) of a picture of that size -> one RLE
    each.

    One mask is held at a time, and of the picture no more than the columns that its box reaches.
    """
    assert len(probabilities) == len(boxes), (probabilities.shape, boxes.shape)
    probabilities, boxes = promote_to_float32(probabilities), promote_to_float32(boxes)
    pasted = []
    for probability, box, (left, top, right, bottom) in zip(
        probabilities, boxes, boxes.tolist(), strict=True
    ):
        # Pixel i has its centre at i + .5; a box reaches from its left edge up to, not including,
        # its right one.
        rows = range(_first(top, height), _first(bottom, height))
        columns = range(_first(left, width), _first(right, width))
        window = torch.empty(len(rows), len(columns), dtype=torch.bool)
        step = max(1, STRIP // max(1, len(columns)))
        for start in range(0, len(rows) if len(columns) else 0, step):
            window[start : start + step] = _read(
                probability, box, rows[start : start + step], columns
            ).cpu()
        pasted.append(encode_window(window, rows.start, columns.start, height=height, width=width))
    return pasted


def _read(probability: Tensor, box: Tensor, rows: range, columns: range) -> Tensor:
    """Which of these pixels are in: bool [rows, columns].

    Beyond the centres of the outermost cells their values hold on up to the box's edge. Fading to
    zero there, as detectron2
    does, would cut off the corners of a full mask, and a share of every edge.
    """
    x = (torch.arange(columns.start, columns.stop, device=box.device) + 0.5 - box[0]) / (
        box[2] - box[0]
    ) * 2 - 1
    y = (torch.arange(rows.start, rows.stop, device=box.device) + 0.5 - box[1]) / (
        box[3] - box[1]
    ) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(
        probability.dtype
    )  # [rows, columns, 2]
    return (
        F.grid_sample(
            probability[None, None], grid[None], padding_mode="border", align_corners=False
        )[0, 0]
        >= THRESHOLD
    )


def _first(edge: float, size: int) -> int:
    """The first pixel of `size` whose centre is not before an edge."""
    return min(max(math.ceil(edge - 0.5), 0), size)
