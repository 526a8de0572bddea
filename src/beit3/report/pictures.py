"""Pixels on their way into a page: from tensors to patches and grids, and from there to an `<img>`
that carries them.

Pictures are uint8 [H, W, 3]; patches of s x s are [P, s, s, 3], row by row.
"""

import base64
import io
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

SMALL, LARGEST = 96, 320
"""Pixels: pictures up to the first wide are shown with sharp pixels, those beyond the second are
shrunk to it."""


def pixels(images: Tensor) -> np.ndarray:
    """A batch's images, uint8 [..., 3, H, W] -> [..., H, W, 3]."""
    return images.movedim(-3, -1).numpy()


def cut(image: np.ndarray, side: int) -> np.ndarray:
    """[H, W, 3] -> patches [P, side, side, 3], row by row."""
    height, width, channels = image.shape
    tiles = image.reshape(height // side, side, width // side, side, channels)
    return tiles.swapaxes(1, 2).reshape(-1, side, side, channels)


def assemble(patches: np.ndarray, grid: tuple[int, int], *, gap: int = 0) -> np.ndarray:
    """Patches [P, s, s, 3] -> [H, W, 3], row by row; with a gap [H, W, 4], clear between patches
    and past the last."""
    (rows, columns), side = grid, patches.shape[1] + gap
    canvas = np.zeros((rows * side, columns * side, 4), dtype=np.uint8)
    for place, patch in enumerate(patches):
        top, left = place // columns * side, place % columns * side
        window = canvas[top : top + side - gap, left : left + side - gap]
        window[..., :3], window[..., 3] = patch, 255
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap] if gap else canvas[..., :3]


def hatch(height: int, width: int) -> np.ndarray:
    """[H, W, 3] of grey diagonal stripes: what is hidden or was never seen, unlike any plain grey
    in a picture."""
    rows, columns = np.indices((height, width))
    stripes = np.where((rows + columns) // 2 % 2, 112, 148).astype(np.uint8)
    return np.repeat(stripes[..., None], 3, axis=-1)


def picture(image: np.ndarray, alt: str, *, mosaic: bool = False, largest: int = LARGEST) -> str:
    """An `<img>` that carries its pixels [H, W, 3 or 4] itself, shrunk to at most `largest` on a
    side."""
    written = io.BytesIO()
    drawn = Image.fromarray(np.ascontiguousarray(image))
    drawn.thumbnail((largest, largest))
    drawn.save(written, format="PNG", optimize=True)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    kind = "sharp" if mosaic or drawn.width <= SMALL else "smooth"
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'
