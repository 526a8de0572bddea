"""Pictures and labels against a second drawing of the same objects, and against each other."""

from itertools import combinations

import numpy as np
import pytest

from beit3.world.render import (
    SEMANTIC_CLASSES,
    compute_boxes,
    compute_outline,
    render,
    render_instance_masks,
    render_semantic_map,
)
from beit3.world.scene import COLORS, make_scene

SCENES = [make_scene(seed) for seed in range(120)]


def winding(item, size: int) -> np.ndarray:
    """Pixel centres in the object [S, S]: the outline's corners, seen from inside, turn once
    around."""
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2)
    if item.shape == "circle":
        return np.hypot(x - item.x, y - item.y) <= item.radius
    corners = compute_outline(item)
    towards = [np.arctan2(cy - y, cx - x) for cx, cy in corners]
    turns = [
        (b - a + np.pi) % (2 * np.pi) - np.pi
        for a, b in zip(towards, [*towards[1:], towards[0]], strict=True)
    ]
    return abs(sum(turns)) > np.pi


def test_picture_is_rgb_of_the_asked_size_and_repeatable():
    for size in (8, 32, 50):
        picture = render(SCENES[0], size)
        assert picture.mode == "RGB" and picture.size == (size, size)
    assert render(SCENES[1]).tobytes() == render(make_scene(1)).tobytes()
    assert render(SCENES[1]).tobytes() != render(SCENES[2]).tobytes()


def test_sizes_show_the_same_scene():
    for scene in SCENES[:20]:
        small = np.asarray(render(scene, 32), dtype=float)
        large = np.asarray(render(scene, 128).reduce(4), dtype=float)
        assert abs(small - large).mean() < 3


def test_masks_equal_a_second_geometry():
    for scene in SCENES:
        masks = render_instance_masks(scene, 32)
        assert masks.shape == (len(scene.objects), 32, 32) and masks.dtype == bool
        for mask, item in zip(masks, scene.objects, strict=True):
            assert (mask == winding(item, 32)).all(), item


def test_masks_are_disjoint_and_boxes_are_tight():
    for scene in SCENES:
        masks = render_instance_masks(scene, 40)
        assert not any((a & b).any() for a, b in combinations(masks, 2))
        for mask, (x, y, width, height) in zip(masks, compute_boxes(scene, 40), strict=True):
            pixels = [
                (row, column) for row in range(40) for column in range(40) if mask[row, column]
            ]
            rows, columns = zip(*pixels, strict=True)
            assert (x, y) == (min(columns), min(rows))
            assert (x + width, y + height) == (max(columns) + 1, max(rows) + 1)


def test_semantic_map_names_each_pixel():
    for scene in SCENES:
        labels = render_semantic_map(scene, 32)
        expected = np.ones((32, 32), dtype=int)
        for mask, item in zip(render_instance_masks(scene, 32), scene.objects, strict=True):
            expected[mask] = 2 + ["circle", "square", "triangle", "cross", "bar"].index(item.shape)
        assert labels.dtype == np.uint8 and (labels == expected).all()
    assert SEMANTIC_CLASSES[0] == "background" and len(SEMANTIC_CLASSES) == 6


def test_colors_show_and_backgrounds_never_look_like_one():
    known = np.array(list(COLORS.values()), dtype=float)
    for scene in SCENES:
        picture = np.asarray(render(scene, 64), dtype=float)
        masks = render_instance_masks(scene, 64)
        for mask, item in zip(masks, scene.objects, strict=True):
            pixels = picture[mask]
            nearest = abs(pixels[:, None] - known).sum(axis=-1).argmin(axis=1)  # [pixels]
            share = (nearest == list(COLORS).index(item.color)).mean()
            assert share > (0.7 if item.texture == "plain" else 0.3), (item, share)
        far = picture[1:-1:4, 1:-1:4][~near(masks)[1:-1:4, 1:-1:4]]
        assert np.sqrt(((far[:, None] - known) ** 2).sum(axis=-1)).min() > 75


def near(masks: np.ndarray) -> np.ndarray:
    """The objects with a rim of two pixels [S, S]."""
    any_mask = masks.any(axis=0)
    grown = any_mask.copy()
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            grown |= np.roll(any_mask, (dy, dx), axis=(0, 1))
    return grown


def test_too_small_a_picture():
    with pytest.raises(ValueError, match="image_size: 4"):
        render(SCENES[0], 4)
