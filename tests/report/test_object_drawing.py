"""Objects are drawn where they are, and names where they cover no other name."""

import numpy as np
import torch

from beit3.data.stores.rle import encode_rle
from beit3.report.canvas import MIN_SIDE
from beit3.report.object_drawing import draw_objects, list_true_objects
from beit3.report.palette import EDGE_COLOR, get_color

GRAY = np.full((MIN_SIDE, MIN_SIDE, 3), 128, np.uint8)


def is_close(pixel: np.ndarray, color, tolerance: int = 2) -> bool:
    return bool((np.abs(np.asarray(pixel, int) - np.asarray(color)) <= tolerance).all())


def mix_with_gray(label: int) -> np.ndarray:
    """Returns the color of a gray pixel below a mask of this label."""
    return 0.6 * 128 + 0.4 * np.array(get_color(label))


def make_mask(top: int, bottom: int, left: int, right: int, side: int = MIN_SIDE) -> dict:
    mask = torch.zeros(side, side, dtype=torch.uint8)
    mask[top:bottom, left:right] = 1
    return encode_rle(mask)


def count_pixels(drawing: np.ndarray, label: int) -> int:
    return int((drawing == get_color(label)).all(-1).sum())


def test_a_box_has_dark_edges_and_leaves_its_inside_unchanged():
    drawing = np.array(draw_objects(GRAY, [{"box": [100, 200, 80, 60], "label": 2}]))
    for row, column in ((200, 140), (259, 140), (230, 100), (230, 179)):
        assert is_close(drawing[row, column], get_color(2), 0), (row, column)
    assert is_close(drawing[230, 99], EDGE_COLOR) and is_close(drawing[230, 102], EDGE_COLOR)
    np.testing.assert_array_equal(drawing[210:250, 110:170], GRAY[210:250, 110:170])
    np.testing.assert_array_equal(drawing[270:], GRAY[270:])


def test_a_mask_is_tinted_and_outlined():
    item = {"box": [100, 200, 80, 60], "label": 1, "mask": make_mask(220, 240, 120, 160)}
    drawing = np.array(draw_objects(GRAY, [item]))
    assert is_close(drawing[230, 140], mix_with_gray(1))
    assert is_close(drawing[220, 140], get_color(1), 0)
    assert is_close(drawing[218, 140], (128, 128, 128), 0)
    assert is_close(drawing[230, 165], (128, 128, 128), 0)


def test_small_images_are_enlarged():
    small = GRAY[:32, :20]
    assert draw_objects(small, []).size == (20 * 13, 32 * 13)
    item = {"box": [4, 16, 10, 8], "label": 0, "mask": make_mask(18, 22, 6, 10, 32)}
    drawing = np.array(draw_objects(small, [item]))
    assert is_close(drawing[16 * 13, 9 * 13], get_color(0), 0)
    assert is_close(drawing[20 * 13, 8 * 13], mix_with_gray(0))


def test_large_images_keep_their_size_and_get_thick_lines():
    wide = np.zeros((300, 2000, 3), np.uint8)
    drawing = draw_objects(wide, [{"box": [100, 100, 900, 150], "label": 0}])
    assert drawing.size == (2000, 300)
    assert is_close(np.array(drawing)[104, 500], get_color(0), 0), "lines are 5 pixels wide"
    assert draw_objects(wide, [], side=320).size == (320, 48)


def test_the_name_of_the_first_object_is_placed_first():
    first = {"box": [150, 180, 120, 90], "label": 0, "name": "one", "score": 0.5}
    second = first | {"label": 1, "name": "two"}
    alone, both = (
        np.array(draw_objects(GRAY, [first])),
        np.array(draw_objects(GRAY, [first, second])),
    )
    above_box = (slice(150, 178), slice(150, 200))
    np.testing.assert_array_equal(both[above_box], alone[above_box])
    assert count_pixels(alone, 1) == 0 and count_pixels(both, 1) > 300


def test_names_without_a_free_corner_are_left_out():
    box = {"box": [150, 180, 4, 4], "score": 0.5, "name": "x" * 60}
    drawing = np.array(draw_objects(GRAY, [box | {"label": label} for label in range(10)]))
    written = [label for label in range(10) if count_pixels(drawing, label) > 1000]
    assert written[0] == 0 and 0 < len(written) < 10


def test_unusual_objects_are_drawn():
    """They overlap the edge, lie outside, are empty, or have unusual names."""
    objects = [
        {"box": [-20, -5, 60, 40], "label": 0, "name": "собака 日本 😀"},
        {"box": [MIN_SIDE - 5, MIN_SIDE - 5, 50, 50], "label": 999},
        {"box": [30, 30, 0, 0], "label": 3, "mask": make_mask(0, 0, 0, 0)},
        {"box": [0, 0, MIN_SIDE, MIN_SIDE], "label": 4, "name": "two\nlines"},
    ]
    assert draw_objects(GRAY, objects).size == (MIN_SIDE, MIN_SIDE)
    one_pixel = draw_objects(GRAY[:1, :1], [{"box": [0, 0, 1, 1], "label": 0}])
    assert one_pixel.size == (MIN_SIDE, MIN_SIDE)


def test_true_objects_are_listed_largest_first_and_crowds_are_named():
    small_crowd = {
        "box": [0, 0, 2, 2],
        "label": 1,
        "area": 4.0,
        "crowd": True,
        "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]],
    }
    large = {"box": [0, 0, 4, 4], "label": 0, "area": 16.0, "crowd": False}
    record = {"width": 8, "height": 6, "objects": [small_crowd, large]}
    objects = list_true_objects(record, ["cat", "dog"])
    assert [item["name"] for item in objects] == ["cat", "dog (crowd)"]
    assert "mask" not in objects[0] and objects[1]["mask"]["size"] == [6, 8]
