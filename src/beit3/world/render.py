"""Renders scenes of the embedded world, and their exact labels.

For an image of S x S pixels and a scene of n objects these are: image PIL RGB [S, S]; instance
masks bool [n, S, S]; boxes float [n, 4] as xywh in pixels; semantic map uint8 [S, S]; outline of an
object float [V, 2] as fractions of the image.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3.world.scene import COLORS, RGB, SHAPES, Object, Scene

SEMANTIC_CLASSES = ("background", *SHAPES)
"""The label is 1 + index; 0 would be "ignore", which rendered scenes do not need."""
SUPERSAMPLING = 4
PERIODS = {"striped": 0.16, "dotted": 0.125}
"""5 and 4 pixels of a 32-pixel image, the finest patterns that remain visible at that size."""


def render(scene: Scene, image_size: int = 32) -> Image.Image:
    """Returns the image. Objects are rendered at 4 times its size and averaged.

    Raises ValueError for an `image_size` below 8.
    """
    side = _get_canvas_size(image_size)
    # The background has one value per pixel: it is smooth, and its horizon lies between two rows.
    background = _render_background(scene, image_size)
    canvas = background.repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    for item in scene.objects:
        rows, columns, inside = _rasterize(item, side)
        has_texture = inside & _render_texture(item, rows, columns, side)
        window = canvas[rows, columns]
        window[inside] = COLORS[item.color]
        window[has_texture] = _choose_shade(COLORS[item.color])
    return Image.fromarray(canvas).reduce(SUPERSAMPLING)


def render_instance_masks(scene: Scene, image_size: int = 32) -> NDArray[np.bool_]:
    """Returns [n, S, S], True where the pixel's center is in object n.

    Unlike "half covered", this has no bias toward large masks.
    """
    _get_canvas_size(image_size)
    masks = np.zeros((len(scene.objects), image_size, image_size), dtype=bool)
    for mask, item in zip(masks, scene.objects, strict=True):
        rows, columns, inside = _rasterize(item, image_size)
        mask[rows, columns] = inside
    return masks


def compute_boxes(scene: Scene, image_size: int = 32) -> NDArray[np.float64]:
    """Returns [n, 4], the tight x, y, width, height of each instance mask in pixels."""
    boxes = []
    for mask in render_instance_masks(scene, image_size):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1))
    return np.array(boxes, dtype=np.float64)


def render_semantic_map(scene: Scene, image_size: int = 32) -> NDArray[np.uint8]:
    """Returns [S, S], 1 + index into `SEMANTIC_CLASSES`."""
    labels = np.ones((image_size, image_size), dtype=np.uint8)
    for mask, item in zip(render_instance_masks(scene, image_size), scene.objects, strict=True):
        labels[mask] = 1 + SEMANTIC_CLASSES.index(item.shape)
    return labels


def compute_outline(item: Object) -> NDArray[np.float64]:
    """Returns [V, 2], the corners of an object's outline as x, y fractions of the image.

    A circle has 24 corners.
    """
    return np.array([item.x, item.y]) + item.radius * _UNIT_OUTLINES[item.shape]


def _make_unit_outlines() -> dict[str, NDArray[np.float64]]:
    """Returns outlines in the square from -1 to 1, distinct enough for a few pixels.

    They cover 1.0 (square), .79, .46, .44 and .32 (bar) of that square.
    """
    angles = np.arange(24) * np.pi / 12
    arm = 0.25  # half the width of the cross's arms
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return {
        "circle": np.stack([np.cos(angles), np.sin(angles)], axis=1),
        "square": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "triangle": np.array([(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]),
        "cross": np.array(cross, dtype=np.float64),
        "bar": np.array([(-1.0, -0.32), (1.0, -0.32), (1.0, 0.32), (-1.0, 0.32)]),
    }


_UNIT_OUTLINES = _make_unit_outlines()


def _get_canvas_size(image_size: int) -> int:
    """Returns the width in pixels of the canvas on which an image is rendered."""
    if image_size < 8:
        raise ValueError(f"image_size: {image_size} shows nothing; give 8 or more")
    return image_size * SUPERSAMPLING


def _render_background(scene: Scene, side: int) -> NDArray[np.uint8]:
    """Returns [side, side, 3]: the gradient, and below the horizon the ground, darkest far away."""
    background = scene.background
    centers = (np.arange(side, dtype=np.float32) + 0.5) / side
    dx, dy = np.cos(background.angle), np.sin(background.angle)
    offsets = dx * (centers[None, :] - 0.5) + dy * (centers[:, None] - 0.5)
    progress = offsets / (abs(dx) + abs(dy)) + 0.5  # 0 to 1 along the gradient
    start = np.array(background.start, dtype=np.float32)
    end = np.array(background.end, dtype=np.float32)
    canvas = start + progress[..., None].astype(np.float32) * (end - start)
    horizon = background.horizon
    if horizon is not None:
        first = round(horizon * side)
        nearness = ((centers[first:] - horizon) / (1 - horizon))[:, None, None]
        canvas[first:] = np.array(background.ground, dtype=np.float32) * (0.75 + 0.25 * nearness)
    return canvas.round().astype(np.uint8)


def _rasterize(item: Object, side: int) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Returns the rows and columns of the object's window, and which pixel centers are inside."""
    left, right = int((item.x - item.radius) * side), int((item.x + item.radius) * side) + 1
    top, bottom = int((item.y - item.radius) * side), int((item.y + item.radius) * side) + 1
    x = (np.arange(left, right) + 0.5) / side
    y = ((np.arange(top, bottom) + 0.5) / side)[:, None]
    if item.shape == "circle":
        inside = (x - item.x) ** 2 + (y - item.y) ** 2 <= item.radius**2
    else:
        inside = _find_inside(compute_outline(item), x, y)
    return slice(top, bottom), slice(left, right), inside


def _find_inside(
    corners: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Returns [rows, columns], which points are inside a polygon.

    By the even-odd rule, an odd number of edges crosses a point's row on its left.
    """
    inside = np.zeros((len(y), len(x)), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            crossing = x1 + (y - y1) * ((x2 - x1) / (y2 - y1))  # [rows, 1]
            inside ^= ((y > min(y1, y2)) & (y <= max(y1, y2))) & (x > crossing)
    return inside


def _render_texture(item: Object, rows: slice, columns: slice, side: int) -> NDArray[np.bool_]:
    """Returns [rows, columns], where the shade replaces the color; the center is the object's."""
    if item.texture == "plain":
        return np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=bool)
    period = PERIODS[item.texture]
    x = ((np.arange(columns.start, columns.stop) + 0.5) / side - item.x) / period
    y = (((np.arange(rows.start, rows.stop) + 0.5) / side - item.y) / period)[:, None]
    if item.texture == "striped":
        # Half a period off the center, so that even a small object shows two stripes and a cross
        # keeps its bar.
        return np.broadcast_to(abs(y % 1 - 0.5) < 0.18, (len(y), len(x)))
    return (x - x.round()) ** 2 + (y - y.round()) ** 2 < 0.3**2


def _choose_shade(color: RGB) -> RGB:
    """Returns the second tone of a textured object, beyond the tones of all backgrounds.

    It is dark for a bright color and light for a dark one.
    """
    brightness = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    target = 0 if brightness > 100 else 255
    red, green, blue = (round(0.12 * channel + 0.88 * target) for channel in color)
    return red, green, blue
