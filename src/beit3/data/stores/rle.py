"""Masks as run lengths: COCO's compressed form, its polygons and plain runs, and masks of uint8 [H, W] made from them.

A segmentation, as in records, is a list of polygons [x1, y1, x2, y2, ...] in pixels, or an RLE {"size": [H, W], "counts"}
whose counts are a list of numbers or COCO's string. What this file gives for JSON has counts as str.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RLE = dict[str, Any]
Segmentation = list[list[float]] | RLE

FARTHEST = 100_000
"""Largest coordinate of a polygon, in pixels: drawing one takes memory along its outline."""


def encode(mask: Tensor) -> RLE:
    """uint8 (0 and 1) or bool [H, W] -> {"size": [H, W], "counts": str}."""
    return _plain(mask_api().encode(np.asfortranarray(mask.cpu().numpy().view(np.uint8))))


def encode_window(window: Tensor, top: int, left: int, *, height: int, width: int) -> RLE:
    """`encode` of a picture of `height` x `width` that is 0 but for a window [h, w] from (`top`, `left`) on.

    Time and memory go with the window's columns, not with the picture.
    """
    columns = torch.zeros(height, window.shape[1], dtype=torch.bool)
    columns[top : top + window.shape[0]] = window
    edges = (
        np.flatnonzero(np.diff(columns.T.flatten().numpy(), prepend=False, append=False))
        + left * height
    )
    counts = np.diff(edges, prepend=0, append=height * width)
    counts = counts[: len(counts) - int(len(counts) > 1 and counts[-1] == 0)]
    return _plain(
        mask_api().frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    )


def rasterise(segmentation: Segmentation, height: int, width: int) -> Tensor:
    """Polygons or an RLE of a picture of that size -> uint8 [H, W]; ValueError where malformed or of another size."""
    if isinstance(segmentation, list):
        return decode(united(segmentation, height, width))
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(
            f"the segmentation {_shown(segmentation)} is neither polygons nor an RLE of size [{height}, {width}]"
        )
    try:
        runs = isinstance(segmentation["counts"], list)
        return decode(mask_api().frPyObjects(segmentation, height, width) if runs else segmentation)
    except (KeyError, ValueError, RuntimeError, TypeError):
        raise ValueError(
            f"the RLE {_shown(segmentation)} is malformed: its runs must fill {height} x {width} pixels"
        ) from None


def united(polygons: Sequence[Sequence[float]], height: int, width: int) -> RLE:
    """Polygons -> one RLE of a picture of that size. What lies outside is cut off, and fewer than three points have no area.

    ValueError for an odd count of numbers, and for one that is not finite or beyond `FARTHEST`.
    """
    for polygon in polygons:
        if len(polygon) % 2 or not all(
            math.isfinite(number) and abs(number) <= FARTHEST for number in polygon
        ):
            raise ValueError(
                f"the polygon {_shown(polygon)} is not x1, y1, x2, y2, ... within {FARTHEST} pixels: correct the segmentation"
            )
    drawn = [list(map(float, polygon)) for polygon in polygons if len(polygon) >= 6]
    if not drawn or not height * width:
        return encode(torch.zeros(height, width, dtype=torch.uint8))
    api = mask_api()
    return _plain(api.merge(api.frPyObjects(drawn, height, width)))


def decode(rle: RLE) -> Tensor:
    """A compressed RLE that `encode` or `united` made -> uint8 [H, W]."""
    return torch.from_numpy(np.ascontiguousarray(mask_api().decode(rle)))


def extent(rle: RLE) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around a compressed RLE's pixels, x2 and y2 beyond the last; all 0 for an empty mask."""
    left, top, width, height = map(int, mask_api().toBbox(rle))
    return left, top, left + width, top + height


def area(rle: RLE) -> int:
    """Pixels in a compressed RLE."""
    return int(mask_api().area(rle))


def mask_api() -> Any:
    """faster_coco_eval's functions on run lengths; ValueError with the remedy where it is not installed."""
    try:
        from faster_coco_eval import mask
    except ImportError:
        raise ValueError(
            "masks need faster-coco-eval, which is not there: pip install faster-coco-eval"
        ) from None
    return mask


def _plain(rle: RLE) -> RLE:
    """As JSON holds it."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:60]}..."
