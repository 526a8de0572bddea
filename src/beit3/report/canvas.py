"""The image below a drawing: its scale, and line widths and font sizes that grow with it."""

import math
from typing import Any

import numpy as np
from PIL import Image

MIN_SIDE = 400
"""Longest side in pixels below which an image is enlarged, so that names can be read."""

SIDE_PER_LINE_WIDTH, SIDE_PER_FONT_SIZE = 400, 48
"""Longest side divided by a line's width and by the font size: 3 and 27 pixels at 1280."""

MIN_LINE_WIDTH, MIN_FONT_SIZE = 2, 13
"""Lower bounds in pixels."""


def scale_image(image: np.ndarray, side: int = 0) -> tuple[Image.Image, float]:
    """Returns an image [H, W, 3] uint8 at the size of its drawing, and the factor to that size.

    Args:
        image: The image. Pixels stay sharp squares if it is enlarged twofold or more.
        side: Longest side of the drawing in pixels. By default an image keeps its size unless it
            is below `MIN_SIDE`, from where it is enlarged by a whole factor.
    """
    original = Image.fromarray(np.ascontiguousarray(image))
    longest = max(original.size)
    scale = side / longest if side else float(max(1, math.ceil(MIN_SIDE / longest)))
    if scale == 1:
        return original, scale
    width = max(1, round(original.width * scale))
    height = max(1, round(original.height * scale))
    resampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return original.resize((width, height), resampling), scale


def get_line_width(canvas: Image.Image) -> int:
    """Returns the width of lines on a canvas, in pixels."""
    return max(MIN_LINE_WIDTH, round(max(canvas.size) / SIDE_PER_LINE_WIDTH))


def get_font_size(canvas: Image.Image) -> int:
    """Returns the size of text on a canvas, in pixels."""
    return max(MIN_FONT_SIZE, round(max(canvas.size) / SIDE_PER_FONT_SIZE))


def blend(pixels: np.ndarray, color: Any, alpha: float) -> np.ndarray:
    """Mixes pixels [N, 3] uint8 with one color, or with one per pixel [N, 3].

    `alpha` is the fraction of the color, 0 to 1.
    """
    return (pixels * (1 - alpha) + np.asarray(color) * alpha).round().astype(np.uint8)
