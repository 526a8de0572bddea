"""Images in a report: from tensors to patches and grids of them, and to an `<img>` with its data.

Images are uint8 [H, W, 3]; square patches of s pixels are uint8 [P, s, s, 3], row by row.
"""

import base64
import io
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

MAX_SHARP_WIDTH = 96
"""Width in pixels up to which an image is shown with sharp pixels; wider ones are smoothed."""

MAX_SIDE = 320
"""Longest side in pixels of an image in a report; larger ones are shrunk."""


def to_channels_last(images: Tensor) -> np.ndarray:
    """Converts the images of a batch, uint8 [..., 3, H, W], to an array [..., H, W, 3]."""
    return images.movedim(-3, -1).numpy()


def cut_into_patches(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts an image [H, W, 3] into patches [P, s, s, 3], row by row; s is `patch_size`."""
    height, width, channels = image.shape
    num_rows, num_columns = height // patch_size, width // patch_size
    tiles = image.reshape(num_rows, patch_size, num_columns, patch_size, channels)
    return tiles.swapaxes(1, 2).reshape(-1, patch_size, patch_size, channels)


def assemble_patches(patches: np.ndarray, grid: tuple[int, int], *, gap: int = 0) -> np.ndarray:
    """Puts patches [P, s, s, 3] together, row by row.

    Args:
        patches: The patches, at most rows * columns.
        grid: (rows, columns).
        gap: Pixels between neighboring patches.

    Returns:
        The image [H, W, 3]; with a gap [H, W, 4], where the gaps and the cells after the last
        patch are transparent.
    """
    num_rows, num_columns = grid
    patch_size = patches.shape[1]
    cell_size = patch_size + gap
    canvas = np.zeros((num_rows * cell_size, num_columns * cell_size, 4), dtype=np.uint8)
    for index, patch in enumerate(patches):
        top, left = index // num_columns * cell_size, index % num_columns * cell_size
        window = canvas[top : top + patch_size, left : left + patch_size]
        window[..., :3], window[..., 3] = patch, 255
    if not gap:
        return canvas[..., :3]
    return canvas[:-gap, :-gap]


def draw_hatching(height: int, width: int) -> np.ndarray:
    """Returns gray diagonal stripes [H, W, 3] for what is masked or missing.

    No plain gray area of an image looks like them.
    """
    rows, columns = np.indices((height, width))
    stripes = np.where((rows + columns) // 2 % 2, 112, 148).astype(np.uint8)
    return np.repeat(stripes[..., None], 3, axis=-1)


def render_image(
    image: np.ndarray, alt: str, *, sharp: bool = False, max_side: int = MAX_SIDE
) -> str:
    """Returns an `<img>` tag that contains the pixels as PNG.

    Args:
        image: Pixels uint8 [H, W, 3], or [H, W, 4] with transparency.
        alt: Plain text that describes the image.
        sharp: Show sharp pixels at any width, not only up to `MAX_SHARP_WIDTH`.
        max_side: Longest side in pixels; a larger image is shrunk to it.
    """
    shrunk = Image.fromarray(np.ascontiguousarray(image))
    shrunk.thumbnail((max_side, max_side))
    png = io.BytesIO()
    shrunk.save(png, format="PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode("ascii")
    css_class = "sharp" if sharp or shrunk.width <= MAX_SHARP_WIDTH else "smooth"
    return f'<img class="{css_class}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'
