"""Scenes: determined by the seed, without overlaps, with relations only where they are clear."""

from collections import Counter
from itertools import combinations, permutations

import pytest

from beit3.world.scene import COLORS, SHAPES, TEXTURES, find_relation, invert_relation, make_scene
from tests.world.truth import SIDES, is_clearly

SCENES = [make_scene(seed) for seed in range(600)]


def test_the_seed_determines_the_scene():
    assert SCENES[:50] == [make_scene(seed) for seed in range(50)]
    assert len({scene.objects for scene in SCENES}) == len(SCENES)


def test_objects_are_inside_the_image_and_do_not_overlap():
    for scene in SCENES:
        for item in scene.objects:
            assert item.radius < item.x < 1 - item.radius and item.radius < item.y < 1 - item.radius
        for a, b in combinations(scene.objects, 2):
            reach = a.radius + b.radius
            assert abs(a.x - b.x) > reach or abs(a.y - b.y) > reach, scene
            assert (a.color, a.shape) != (b.color, b.shape), scene


def test_sizes_are_never_ambiguous():
    small = [item.radius for scene in SCENES for item in scene.objects if item.size == "small"]
    large = [item.radius for scene in SCENES for item in scene.objects if item.size == "large"]
    assert max(small) < 0.17 and min(large) > 0.21


def test_the_number_of_objects_does_not_tell_their_size():
    sizes = Counter(
        (len(scene.objects), item.size)
        for scene in map(make_scene, range(3000))
        for item in scene.objects
    )
    for count in (1, 2, 3):
        large, small = sizes[count, "large"], sizes[count, "small"]
        assert large / (large + small) == pytest.approx(0.5, abs=0.06)


def test_some_objects_of_a_scene_differ_in_one_attribute_only():
    num_differences = Counter(
        sum(getattr(a, key) != getattr(b, key) for key in ("color", "shape", "size", "texture"))
        for scene in SCENES
        for a, b in combinations(scene.objects, 2)
    )
    assert num_differences[1] > 0.08 * num_differences.total()


def test_attributes_have_the_expected_frequencies():
    num_objects = Counter(len(scene.objects) for scene in SCENES)
    assert [num_objects[k] / len(SCENES) for k in (1, 2, 3)] == pytest.approx(
        [0.6, 0.32, 0.08], abs=0.06
    )
    objects = [item for scene in SCENES for item in scene.objects]
    plain = sum(item.texture == "plain" for item in objects) / len(objects)
    assert plain == pytest.approx(0.8, abs=0.06)
    for key, values in (("color", COLORS), ("shape", SHAPES)):
        counts = Counter(getattr(item, key) for item in objects)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.7 * len(objects) / len(values)
    assert {item.texture for item in objects} == set(TEXTURES)


def test_num_objects_sets_the_probabilities():
    assert {len(make_scene(seed, num_objects=(0, 0, 1)).objects) for seed in range(30)} == {3}
    assert {len(make_scene(seed, num_objects=(1, 0, 0)).objects) for seed in range(30)} == {1}


def test_relations_agree_with_an_independent_check():
    num_stated = 0
    for scene in SCENES:
        for a, b in permutations(scene.objects, 2):
            sides = [side for side in SIDES.split("|") if is_clearly(a, side, b)]
            assert find_relation(a, b) == (sides[0] if sides else None)
            if sides:
                num_stated += 1
                assert find_relation(b, a) == invert_relation(sides[0])
    assert num_stated > 500


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="seed: -1"):
        make_scene(-1)
    with pytest.raises(ValueError, match="num_objects"):
        make_scene(0, num_objects=(0.5, 0.5, 0.5))
