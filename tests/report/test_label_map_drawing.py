"""Label maps are drawn in the colors of their legend."""

import numpy as np
from PIL import Image

from beit3.report.canvas import MIN_SIDE
from beit3.report.label_map_drawing import (
    MAX_LEGEND_CLASSES,
    add_legend,
    draw_label_map,
    measure_classes,
)
from beit3.report.palette import get_color

GRAY = np.full((MIN_SIDE, MIN_SIDE, 3), 128, np.uint8)


def is_label(pixel: np.ndarray, label: int) -> bool:
    """Returns whether this is a gray pixel in the color of a label."""
    expected = 0.35 * 128 + 0.65 * np.array(get_color(label))
    return bool((np.abs(pixel - expected) <= 2).all())


def test_labels_are_tinted_with_dark_lines_between_them():
    labels = np.zeros((MIN_SIDE, MIN_SIDE), int)
    labels[:, 200:], labels[:100] = 7, 255
    drawing = np.array(draw_label_map(GRAY, labels, ignore_index=255))
    assert is_label(drawing[300, 100], 0) and is_label(drawing[300, 300], 7)
    np.testing.assert_array_equal(drawing[:98], GRAY[:98])
    assert drawing[300, 199].max() < 110
    assert (np.abs(drawing[300, 195].astype(int) - drawing[300, 199]) > 2).any()
    small = draw_label_map(GRAY[:10, :20], labels[:10, :20])
    assert small.size == (MIN_SIDE, MIN_SIDE // 2)


def test_classes_are_measured_and_named():
    labels = np.array([[0, 0, 0, 5], [1, 255, 0, 1]])
    classes = measure_classes(labels, ["sky", "sea"], ignore_index=255)
    shares = [(item["name"], item["share"]) for item in classes]
    assert shares == [("sky", 0.5), ("sea", 0.25), ("class 5", 0.125)]


def test_a_legend_shows_colors_up_to_its_limit():
    num_classes = MAX_LEGEND_CLASSES + 6
    classes = [
        {"label": label, "name": f"class {label}", "share": 0.01} for label in range(num_classes)
    ]
    legend = np.array(add_legend(Image.fromarray(GRAY), classes))[MIN_SIDE:]
    is_shown = [
        bool((legend == get_color(label)).all(-1).sum() > 50) for label in range(num_classes)
    ]
    assert is_shown == [True] * MAX_LEGEND_CLASSES + [False] * 6


def test_a_legend_is_wide_enough_for_its_names():
    narrow = Image.fromarray(GRAY[:, :20])
    classes = [{"label": 0, "name": "class 0", "share": 0.01}]
    assert add_legend(narrow, classes).width > 20
