"""Images and labels against an independent rendering of the same objects, and each other."""

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


def find_inside(item, size: int) -> np.ndarray:
    """Returns [S, S], the pixel centers around which the outline's corners turn once."""
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2)
    if item.shape == "circle":
        return np.hypot(x - item.x, y - item.y) <= item.radius
    corners = compute_outline(item)
    directions = [np.arctan2(cy - y, cx - x) for cx, cy in corners]
    turns = [
        (b - a + np.pi) % (2 * np.pi) - np.pi
        for a, b in zip(directions, [*directions[1:], directions[0]], strict=True)
    ]
    return abs(sum(turns)) > np.pi


def test_the_image_is_rgb_of_the_given_size_and_reproducible():
    for size in (8, 32, 50):
        image = render(SCENES[0], size)
        assert image.mode == "RGB" and image.size == (size, size)
    assert render(SCENES[1]).tobytes() == render(make_scene(1)).tobytes()
    assert render(SCENES[1]).tobytes() != render(SCENES[2]).tobytes()


def test_sizes_show_the_same_scene():
    for scene in SCENES[:20]:
        small = np.asarray(render(scene, 32), dtype=float)
        large = np.asarray(render(scene, 128).reduce(4), dtype=float)
        assert abs(small - large).mean() < 3


def test_masks_equal_an_independent_computation():
    for scene in SCENES:
        masks = render_instance_masks(scene, 32)
        assert masks.shape == (len(scene.objects), 32, 32) and masks.dtype == bool
        for mask, item in zip(masks, scene.objects, strict=True):
            assert (mask == find_inside(item, 32)).all(), item


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


def test_colors_are_visible_and_differ_from_backgrounds():
    palette = np.array(list(COLORS.values()), dtype=float)
    for scene in SCENES:
        image = np.asarray(render(scene, 64), dtype=float)
        masks = render_instance_masks(scene, 64)
        for mask, item in zip(masks, scene.objects, strict=True):
            pixels = image[mask]
            nearest = abs(pixels[:, None] - palette).sum(axis=-1).argmin(axis=1)  # [pixels]
            fraction = (nearest == list(COLORS).index(item.color)).mean()
            assert fraction > (0.7 if item.texture == "plain" else 0.3), (item, fraction)
        background = image[1:-1:4, 1:-1:4][~dilate(masks)[1:-1:4, 1:-1:4]]
        assert np.sqrt(((background[:, None] - palette) ** 2).sum(axis=-1)).min() > 75


def dilate(masks: np.ndarray) -> np.ndarray:
    """Returns [S, S], all objects with a rim of two pixels."""
    any_mask = masks.any(axis=0)
    dilated = any_mask.copy()
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            dilated |= np.roll(any_mask, (dy, dx), axis=(0, 1))
    return dilated


def test_a_too_small_image_is_refused():
    with pytest.raises(ValueError, match="image_size: 4"):
        render(SCENES[0], 4)
