"""Photographs of the embedded world and their exact labels: Scene -> picture, instance masks,
boxes, semantic map.

Shapes cross the border as: picture PIL RGB [S, S]; masks bool [n, S, S]; boxes float [n, 4] xywh
pixels;
semantic map uint8 [S, S]; outline float [V, 2], fractions of the picture.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3.world.scene import COLORS, RGB, SHAPES, Object, Scene

SEMANTIC_CLASSES = (
    "background",
    *SHAPES,
)  # label = 1 + index; 0 would be "ignore", which a drawn world never needs
SUPERSAMPLING = 4
PERIODS = {
    "striped": 0.16,
    "dotted": 0.125,
}  # 5 and 4 pixels of a 32-pixel picture, the finest that survive there


def render(scene: Scene, image_size: int = 32) -> Image.Image:
    """The picture, drawn 4 times too large and averaged down. ValueError: image_size below 8."""
    side = _side(image_size)
    canvas = _background(scene, side)
    for item in scene.objects:
        rows, columns, inside = _coverage(item, side)
        marked = inside & _texture(item, rows, columns, side)
        window = canvas[rows, columns]
        window[inside] = COLORS[item.color]
        window[marked] = _shade(COLORS[item.color])
    return Image.fromarray(canvas).reduce(SUPERSAMPLING)


def render_instance_masks(scene: Scene, image_size: int = 32) -> NDArray[np.bool_]:
    """[n, S, S]: True where the pixel's centre lies in object n; unlike "half covered", no bias
    toward large masks."""
    _side(image_size)
    masks = np.zeros((len(scene.objects), image_size, image_size), dtype=bool)
    for mask, item in zip(masks, scene.objects, strict=True):
        rows, columns, inside = _coverage(item, image_size)
        mask[rows, columns] = inside
    return masks


def compute_boxes(scene: Scene, image_size: int = 32) -> NDArray[np.float64]:
    """[n, 4]: the tight x, y, width, height of each instance mask, in pixels."""
    found = []
    for mask in render_instance_masks(scene, image_size):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        found.append((columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1))
    return np.array(found, dtype=np.float64)


def render_semantic_map(scene: Scene, image_size: int = 32) -> NDArray[np.uint8]:
    """[S, S]: 1 + index into SEMANTIC_CLASSES."""
    labels = np.ones((image_size, image_size), dtype=np.uint8)
    for mask, item in zip(render_instance_masks(scene, image_size), scene.objects, strict=True):
        labels[mask] = 1 + SEMANTIC_CLASSES.index(item.shape)
    return labels


def compute_outline(item: Object) -> NDArray[np.float64]:
    """[V, 2]: the corners of the object's outline (a circle as 24 of them), as x, y fractions of
    the picture."""
    return np.array([item.x, item.y]) + item.radius * _UNIT[item.shape]


def _unit_outlines() -> dict[str, NDArray[np.float64]]:
    """Outlines in the square from -1 to 1: five that a few pixels tell apart."""
    turns = np.arange(24) * np.pi / 12
    arm = 0.3  # half the width of the cross's arms
    cross = [
        (-arm, -1),
        (arm, -1),
        (arm, -arm),
        (1, -arm),
        (1, arm),
        (arm, arm),
        (arm, 1),
        (-arm, 1),
    ]
    cross += [(-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return {
        "circle": np.stack([np.cos(turns), np.sin(turns)], axis=1),
        "square": 0.9 * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "triangle": np.array([(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]),
        "cross": np.array(cross, dtype=np.float64),
        "bar": np.array([(-1.0, -0.42), (1.0, -0.42), (1.0, 0.42), (-1.0, 0.42)]),
    }


_UNIT = _unit_outlines()


def _side(image_size: int) -> int:
    if image_size < 8:
        raise ValueError(f"image_size: {image_size} shows nothing; give 8 or more")
    return image_size * SUPERSAMPLING


def _background(scene: Scene, side: int) -> NDArray[np.uint8]:
    """[side, side, 3]: the gradient, and from the horizon downward the ground, darkest far away."""
    look = scene.background
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    dx, dy = np.cos(look.angle), np.sin(look.angle)
    along = (dx * (centres[None, :] - 0.5) + dy * (centres[:, None] - 0.5)) / (
        abs(dx) + abs(dy)
    ) + 0.5  # 0 to 1
    start, end = np.array(look.start, dtype=np.float32), np.array(look.end, dtype=np.float32)
    canvas = start + along[..., None].astype(np.float32) * (end - start)
    if look.horizon is not None:
        first = round(look.horizon * side)
        near = ((centres[first:] - look.horizon) / (1 - look.horizon))[:, None, None]
        canvas[first:] = np.array(look.ground, dtype=np.float32) * (0.75 + 0.25 * near)
    return canvas.round().astype(np.uint8)


def _coverage(item: Object, side: int) -> tuple[slice, slice, NDArray[np.bool_]]:
    """The object's window on the canvas as rows and columns, and which pixel centres in it lie
    inside the object."""
    left, right = int((item.x - item.radius) * side), int((item.x + item.radius) * side) + 1
    top, bottom = int((item.y - item.radius) * side), int((item.y + item.radius) * side) + 1
    x = (np.arange(left, right) + 0.5) / side
    y = ((np.arange(top, bottom) + 0.5) / side)[:, None]
    if item.shape == "circle":
        inside = (x - item.x) ** 2 + (y - item.y) ** 2 <= item.radius**2
    else:
        inside = _inside(compute_outline(item), x, y)
    return slice(top, bottom), slice(left, right), inside


def _inside(
    corners: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Even-odd rule: a point lies inside when an odd number of edges crosses its row on its
    left."""
    inside = np.zeros((len(y), len(x)), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            crossing = x1 + (y - y1) * ((x2 - x1) / (y2 - y1))  # [rows, 1]
            inside ^= ((y > min(y1, y2)) & (y <= max(y1, y2))) & (x > crossing)
    return inside


def _texture(item: Object, rows: slice, columns: slice, side: int) -> NDArray[np.bool_]:
    """[rows, columns]: where the shade replaces the color; the pattern is centred on the object."""
    if item.texture == "plain":
        return np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=bool)
    across = ((np.arange(columns.start, columns.stop) + 0.5) / side - item.x) / PERIODS[
        item.texture
    ]
    down = (((np.arange(rows.start, rows.stop) + 0.5) / side - item.y) / PERIODS[item.texture])[
        :, None
    ]
    if item.texture == "striped":
        # Half a period off the centre, so that even a small object shows two stripes and a cross
        # keeps its bar.
        return np.broadcast_to(abs(down % 1 - 0.5) < 0.18, (len(down), len(across)))
    return (across - across.round()) ** 2 + (down - down.round()) ** 2 < 0.3**2


def _shade(color: RGB) -> RGB:
    """The second tone of a textured object: dark for a bright color, light for a dark one, beyond
    every background."""
    brightness = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    target = 0 if brightness > 100 else 255
    red, green, blue = (round(0.12 * channel + 0.88 * target) for channel in color)
    return red, green, blue
