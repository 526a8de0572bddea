"""Objects drawn onto an image: boxes, instance masks, and names with scores.

Objects have the keys of predictions: `box` [x, y, width, height] in pixels, `label`, and where
they have them `name`, `score` and `mask`, an RLE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from beit3.data.stores.rle import RLE, compute_box, decode_rle, encode_rle, rasterize
from beit3.report.canvas import blend, get_font_size, get_line_width, scale_image
from beit3.report.lettering import choose_font, get_label_name
from beit3.report.palette import EDGE_COLOR, Color, choose_text_color, get_color
from beit3.task import Record

Corners = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle on the canvas, in pixels."""

MASK_ALPHA = 0.4
"""Fraction of an object's color in the pixels of its mask."""


def draw_objects(
    image: np.ndarray, objects: Sequence[Mapping[str, Any]], *, side: int = 0
) -> Image.Image:
    """Draws masks, boxes and names of objects onto a copy of an image.

    Args:
        image: Pixels [H, W, 3] uint8.
        objects: The objects, the most important first: it is drawn on top of the others, and its
            name is placed first. A name that would cover an earlier one is left out.
        side: Longest side of the drawing in pixels; by default that of the image, enlarged to at
            least `canvas.MIN_SIDE`.
    """
    canvas, scale = scale_image(image, side)
    pixels = np.array(canvas)
    line_width, font_size = get_line_width(canvas), get_font_size(canvas)
    for item in reversed(objects):
        if "mask" in item:
            _draw_mask(pixels, item["mask"], scale, get_color(item["label"]), line_width)
    canvas = Image.fromarray(pixels)
    pen = ImageDraw.Draw(canvas)
    for item in reversed(objects):
        _draw_box(pen, _scale_box(item["box"], scale), get_color(item["label"]), line_width)
    taken: list[Corners] = []
    for item in objects:
        score = f" {item['score']:.0%}" if "score" in item else ""
        text = get_label_name(item["label"], [], item.get("name", "")) + score
        box = tuple(number * scale for number in item["box"])
        tag = _place_tag(pen, text, box, canvas.size, font_size, taken)
        if tag is not None:
            _draw_tag(pen, text, tag, get_color(item["label"]), font_size)
            taken.append(tag)
    return canvas


def list_true_objects(record: Record, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the annotated objects of a record as `draw_objects` takes them, the largest first."""
    true_objects = []
    for annotation in sorted(record.get("objects", ()), key=lambda item: -item["area"]):
        name = get_label_name(annotation["label"], class_names)
        item = {
            "box": annotation["box"],
            "label": annotation["label"],
            "name": f"{name} (crowd)" if annotation["crowd"] else name,
        }
        outline = annotation.get("segmentation")
        if outline:
            item["mask"] = encode_rle(rasterize(outline, record["height"], record["width"]))
        true_objects.append(item)
    return true_objects


# Masks --------------------------------------------------------------------------------------------


def _draw_mask(pixels: np.ndarray, mask: RLE, scale: float, color: Color, line_width: int) -> None:
    """Tints the pixels of a mask and draws its outline, in place.

    Only the part of a large image in which the mask lies is computed.
    """
    left, top, right, bottom = compute_box(mask)
    if right <= left or bottom <= top:
        return
    cropped_mask = decode_rle(mask).numpy()[top:bottom, left:right]
    x, y = round(left * scale), round(top * scale)
    width, height = max(1, round(right * scale) - x), max(1, round(bottom * scale) - y)
    scaled_mask = Image.fromarray(cropped_mask * 255).resize(
        (width, height), Image.Resampling.NEAREST
    )
    inside = np.array(scaled_mask)[: pixels.shape[0] - y, : pixels.shape[1] - x] > 0
    window = pixels[y : y + inside.shape[0], x : x + inside.shape[1]]
    window[inside] = blend(window[inside], color, MASK_ALPHA)
    window[inside & ~_erode(inside, line_width)] = color


def _erode(mask: np.ndarray, distance: int) -> np.ndarray:
    """Removes pixels of a bool mask [H, W] within `distance` of its edge along rows or columns."""
    height, width = mask.shape
    padded = np.pad(mask, distance)
    offsets = [
        (2 * distance, distance),
        (distance, 2 * distance),
        (0, distance),
        (distance, 0),
    ]
    shifted = [padded[row : row + height, column : column + width] for row, column in offsets]
    return np.logical_and.reduce(shifted)


# Boxes and names ----------------------------------------------------------------------------------


def _scale_box(box: Sequence[float], scale: float) -> Corners:
    """Converts [x, y, width, height] on the image to corners on the canvas."""
    x, y, width, height = (number * scale for number in box)
    return x, y, x + width, y + height


def _draw_box(pen: ImageDraw.ImageDraw, box: Corners, color: Color, line_width: int) -> None:
    """Draws a box's lines between dark ones of half their width; an empty box becomes a point."""
    left, top = box[0], box[1]
    right, bottom = max(left, box[2] - 1), max(top, box[3] - 1)
    edge_width = max(1, line_width // 2)
    pen.rectangle(
        (left - edge_width, top - edge_width, right + edge_width, bottom + edge_width),
        outline=EDGE_COLOR,
        width=line_width + 2 * edge_width,
    )
    pen.rectangle((left, top, right, bottom), outline=color, width=line_width)


def _get_tag_margin(font_size: int) -> int:
    return max(2, font_size // 5)


def _place_tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Sequence[float],
    canvas_size: tuple[int, int],
    font_size: int,
    taken: Sequence[Corners],
) -> Corners | None:
    """Returns a rectangle for a name at a corner of its box [x, y, width, height], on the canvas.

    None where every corner overlaps one of the `taken` rectangles.
    """
    left, _, right, _ = pen.textbbox((0, 0), text, font=choose_font(text, font_size))
    margin = _get_tag_margin(font_size)
    width, height = right - left + 2 * margin, font_size + 2 * margin
    box_x, box_y, box_width, box_height = box
    for y in (box_y - height, box_y, box_y + box_height, box_y + box_height - height):
        for x in (box_x, box_x + box_width - width):
            tag = _move_inside((x, y, x + width, y + height), canvas_size)
            if not any(_overlap(tag, other_tag) for other_tag in taken):
                return tag
    return None


def _draw_tag(
    pen: ImageDraw.ImageDraw, text: str, tag: Corners, color: Color, font_size: int
) -> None:
    """Writes a name into its rectangle."""
    font, margin = choose_font(text, font_size), _get_tag_margin(font_size)
    text_left = pen.textbbox((0, 0), text, font=font)[0]
    left, top, right, bottom = tag
    pen.rectangle((left, top, right - 1, bottom - 1), fill=color, outline=EDGE_COLOR)
    # The baseline is at the same height in all tags, whatever the height of their characters.
    baseline = bottom - margin - font_size * 0.14
    pen.text(
        (left + margin - text_left, baseline),
        text,
        font=font,
        fill=choose_text_color(color),
        anchor="ls",
    )


def _move_inside(rectangle: Corners, canvas_size: tuple[int, int]) -> Corners:
    """Moves a rectangle into a canvas of this (width, height), as far as it fits."""
    width, height = rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]
    left = max(0.0, min(rectangle[0], canvas_size[0] - width))
    top = max(0.0, min(rectangle[1], canvas_size[1] - height))
    return left, top, left + width, top + height


def _overlap(first: Corners, second: Corners) -> bool:
    overlap_x = first[0] < second[2] and second[0] < first[2]
    overlap_y = first[1] < second[3] and second[1] < first[3]
    return overlap_x and overlap_y
