"""Label maps drawn over an image, and a legend of their classes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from beit3.report.canvas import blend, get_font_size, get_line_width, scale_image
from beit3.report.lettering import choose_font, format_percent, get_label_name, shorten_name
from beit3.report.palette import (
    BACKGROUND_COLOR,
    EDGE_COLOR,
    NUM_COLORS,
    TEXT_COLOR,
    Color,
    get_color,
)

LABEL_ALPHA = 0.65
"""Fraction of the label's color in a pixel."""

MAX_LEGEND_CLASSES = 24
"""Classes in a legend; it says how many more there are."""


def draw_label_map(
    image: np.ndarray, labels: np.ndarray, *, side: int = 0, ignore_index: int = -1
) -> Image.Image:
    """Draws every pixel in the color of its label, with dark lines between labels.

    Args:
        image: Pixels [H, W, 3] uint8.
        labels: Integers [h, w] in any resolution; resized to the drawing by nearest pixels.
        side: Longest side of the drawing in pixels; by default that of the image, enlarged to at
            least `canvas.MIN_SIDE`.
        ignore_index: Label of pixels that show the image alone.
    """
    canvas, _ = scale_image(image, side)
    labels = _resize_labels(labels, canvas.height, canvas.width)
    colors = np.array([get_color(label) for label in range(NUM_COLORS)], np.uint8)
    pixels = np.array(canvas)
    labeled = labels != ignore_index
    pixels[labeled] = blend(pixels[labeled], colors[labels[labeled] % NUM_COLORS], LABEL_ALPHA)
    _draw_edges(pixels, labels, get_line_width(canvas))
    return Image.fromarray(pixels)


def measure_classes(
    labels: np.ndarray, class_names: Sequence[str], *, ignore_index: int = -1
) -> list[dict[str, Any]]:
    """Returns the classes of a label map with their share of its pixels, the largest first.

    Each is {"label": int, "name": str, "share": 0 to 1}; ignored pixels count in the total.
    """
    present, counts = np.unique(labels[labels != ignore_index], return_counts=True)
    classes = []
    for index in np.argsort(-counts, kind="stable"):
        label = int(present[index])
        share = round(float(counts[index]) / labels.size, 4)
        name = get_label_name(label, class_names)
        classes.append({"label": label, "name": name, "share": share})
    return classes


def add_legend(drawing: Image.Image, classes: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Returns a drawing above the colors, names and percentages of its classes.

    Args:
        drawing: The drawn label map.
        classes: Classes as `measure_classes` returns them. The legend has as many columns as fit
            the drawing's width, and the result is wider than the drawing if one does not.
    """
    font_size = get_font_size(drawing)
    margin, line_height = font_size // 2, round(font_size * 1.6)
    entries = _list_legend_entries(classes)
    text_widths = [choose_font(text, font_size).getlength(text) for _, text in entries]
    column_width = math.ceil(max(text_widths, default=0)) + font_size + 3 * margin
    num_columns = max(1, min(len(entries), (drawing.width - margin) // column_width))
    num_rows = math.ceil(len(entries) / num_columns)
    width = max(drawing.width, column_width + margin)
    height = drawing.height + num_rows * line_height + 2 * margin
    result = Image.new("RGB", (width, height), BACKGROUND_COLOR)
    result.paste(drawing, (0, 0))
    pen = ImageDraw.Draw(result)
    for index, (color, text) in enumerate(entries):
        x = margin + index // num_rows * column_width
        y = drawing.height + margin + index % num_rows * line_height
        outline = BACKGROUND_COLOR if color == BACKGROUND_COLOR else EDGE_COLOR
        pen.rectangle((x, y, x + font_size, y + font_size), fill=color, outline=outline)
        text_start = (x + font_size + margin, y + font_size * 0.86)
        font = choose_font(text, font_size)
        pen.text(text_start, text, font=font, fill=TEXT_COLOR, anchor="ls")
    return result


def _list_legend_entries(classes: Sequence[Mapping[str, Any]]) -> list[tuple[Color, str]]:
    """Returns (color, text) of each line in a legend."""
    entries: list[tuple[Color, str]] = []
    for row in classes[:MAX_LEGEND_CLASSES]:
        text = f"{shorten_name(row['name'])}  {format_percent(row['share'])}"
        entries.append((get_color(row["label"]), text))
    if len(classes) > MAX_LEGEND_CLASSES:
        entries.append((BACKGROUND_COLOR, f"and {len(classes) - MAX_LEGEND_CLASSES} more"))
    return entries


def _resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes labels by nearest pixels; Pillow does not resize integers of more than 8 bits."""
    indices = []
    for new_size, old_size in zip((height, width), labels.shape, strict=True):
        centers = (np.arange(new_size) + 0.5) * old_size / new_size
        indices.append(np.minimum(centers.astype(int), old_size - 1))
    rows, columns = indices
    return labels[rows][:, columns]


def _draw_edges(pixels: np.ndarray, labels: np.ndarray, line_width: int) -> None:
    """Darkens the pixels between different labels in place, first of rows, then of columns."""
    for axis in (0, 1):
        is_edge = np.zeros(labels.shape, bool)
        changes = np.diff(labels, axis=axis) != 0
        for shift in range(line_width):
            window = np.moveaxis(is_edge, axis, 0)[shift : shift + changes.shape[axis]]
            window |= np.moveaxis(changes, axis, 0)[: len(window)]
        pixels[is_edge] = blend(pixels[is_edge], EDGE_COLOR, LABEL_ALPHA)
