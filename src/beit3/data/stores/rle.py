"""Masks as run lengths (RLE): COCO's compressed form, its polygons and its uncompressed runs.

A segmentation, as in records, is either a list of polygons [x1, y1, x2, y2, ...] in pixels or an
RLE {"size": [H, W], "counts": ...} whose counts are a list of numbers or COCO's string. The RLEs
that these functions return have counts of type str and can be written as JSON. Masks are tensors
of uint8 [H, W] with values 0 and 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RLE = dict[str, Any]
Segmentation = list[list[float]] | RLE

MAX_COORDINATE = 100_000
"""Largest coordinate of a polygon in pixels: drawing takes memory along the polygon's outline."""


def encode_rle(mask: Tensor) -> RLE:
    """Compresses a mask [H, W] of bool or uint8 (0 and 1)."""
    pixels = np.asfortranarray(mask.cpu().numpy().view(np.uint8))
    return _to_json(load_mask_api().encode(pixels))


def encode_window(window: Tensor, top: int, left: int, *, height: int, width: int) -> RLE:
    """Compresses a mask that is zero outside a window.

    Time and memory grow with the columns of the window, not with the size of the image.

    Args:
        window: The mask's pixels [h, w] in the window, bool.
        top: Row of the window's upper left corner.
        left: Column of that corner.
        height: Height of the whole mask.
        width: Width of the whole mask.
    """
    columns = torch.zeros(height, window.shape[1], dtype=torch.bool)
    columns[top : top + window.shape[0]] = window
    pixels = columns.T.flatten().numpy()  # RLE goes down the columns
    edges = np.flatnonzero(np.diff(pixels, prepend=False, append=False)) + left * height
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    runs = {"size": [height, width], "counts": counts.tolist()}
    return _to_json(load_mask_api().frPyObjects(runs, height, width))


def rasterize(segmentation: Segmentation, height: int, width: int) -> Tensor:
    """Draws polygons or an RLE as a mask, uint8 [height, width].

    Raises ValueError when the segmentation is malformed or an RLE of another size.
    """
    if isinstance(segmentation, list):
        return decode_rle(merge_polygons(segmentation, height, width))
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(
            f"the segmentation {_abbreviate(segmentation)} is neither polygons "
            f"nor an RLE of size [{height}, {width}]"
        )
    try:
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = load_mask_api().frPyObjects(rle, height, width)
        return decode_rle(rle)
    except (KeyError, ValueError, RuntimeError, TypeError):
        raise ValueError(
            f"the RLE {_abbreviate(segmentation)} is malformed: "
            f"its runs must fill {height} x {width} pixels"
        ) from None


def merge_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> RLE:
    """Draws the union of polygons as one RLE of size [height, width].

    Parts outside the image are cut off. Polygons of fewer than three points have no area. Raises
    ValueError for an odd count of coordinates, and for one that is not finite or whose absolute
    value exceeds `MAX_COORDINATE`.
    """
    for polygon in polygons:
        valid = all(math.isfinite(value) and abs(value) <= MAX_COORDINATE for value in polygon)
        if len(polygon) % 2 or not valid:
            raise ValueError(
                f"the polygon {_abbreviate(polygon)} is not x1, y1, x2, y2, ... "
                f"within {MAX_COORDINATE} pixels: correct the segmentation"
            )
    areas = [list(map(float, polygon)) for polygon in polygons if len(polygon) >= 6]
    if not areas or not height * width:
        return encode_rle(torch.zeros(height, width, dtype=torch.uint8))
    api = load_mask_api()
    return _to_json(api.merge(api.frPyObjects(areas, height, width)))


def decode_rle(rle: RLE) -> Tensor:
    """Decompresses an RLE whose counts are a string: uint8 [H, W]."""
    return torch.from_numpy(np.ascontiguousarray(load_mask_api().decode(rle)))


def compute_box(rle: RLE) -> tuple[int, int, int, int]:
    """Returns the box x1, y1, x2, y2 around the pixels of a compressed RLE; all 0 if it is empty.

    x2 and y2 lie one beyond the last pixel.
    """
    left, top, width, height = map(int, load_mask_api().toBbox(rle))
    return left, top, left + width, top + height


def compute_area(rle: RLE) -> int:
    """Returns the number of pixels in a compressed RLE."""
    return int(load_mask_api().area(rle))


def load_mask_api() -> Any:
    """Imports the RLE functions of faster_coco_eval; raises ValueError if it is not installed."""
    try:
        from faster_coco_eval import mask
    except ImportError:
        raise ValueError(
            "masks need faster-coco-eval, which is not installed: pip install faster-coco-eval"
        ) from None
    return mask


def _to_json(rle: RLE) -> RLE:
    """Converts an RLE of the API into types that JSON knows."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _abbreviate(value: Any) -> str:
    """Returns the beginning of a value as text, for messages."""
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:60]}..."
