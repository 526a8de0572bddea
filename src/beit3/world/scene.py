"""The embedded world's scenes: one to three simple objects on a muted background, made from a seed.

Positions and lengths are fractions of the image, x to the right and y downward, so a scene renders
at any size. Two objects of a scene never share both color and shape: "the red circle" names at most
one object. Sizes and outlines are chosen so that a small network learns shapes within a thousand
steps (docs/decisions.md, 2026-11-29).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np

RGB: TypeAlias = tuple[int, int, int]
T = TypeVar("T")

COLORS: dict[str, RGB] = {
    "red": (222, 32, 38),
    "green": (22, 150, 44),
    "blue": (30, 60, 226),
    "yellow": (250, 228, 20),
    "purple": (150, 30, 176),
    "orange": (252, 132, 8),
    "white": (252, 252, 252),
    "black": (12, 12, 14),
}
SHAPES = ("circle", "square", "triangle", "cross", "bar")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")

# Saturation and brightness stay in the middle, far from each of COLORS, white and black included.
TONES: tuple[RGB, ...] = (
    (176, 164, 140),
    (146, 160, 136),
    (128, 148, 168),
    (172, 144, 142),
    (118, 142, 140),
    (142, 126, 112),
    (152, 144, 172),
    (112, 116, 126),
)
RADIUS = {"small": 0.16, "large": 0.225}
RADIUS_JITTER = 0.03  # relative: a small object stays below 0.165 and a large one above 0.218
MIN_DISTANCE = 0.25  # a relation is stated only where positions differ by more than this
NUM_OBJECTS = (0.6, 0.32, 0.08)  # probabilities of 1, 2 and 3 objects
PLAIN_RATE = 0.8
SIMILAR_RATE = 0.25  # of the objects beside another: these share its texture, and color or shape
LARGE_RATE = 0.5  # of the objects
HORIZON_RATE = 0.4


@dataclass(frozen=True)
class Object:
    """An object: its attributes, its center (x, y) and its radius, half the side of its square."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """A gradient along `angle` (radians) from tone `start` to tone `end`.

    Below the height `horizon`, unless that is None, is the ground, which runs to tone `ground`.
    """

    start: RGB
    end: RGB
    angle: float
    horizon: float | None
    ground: RGB


@dataclass(frozen=True)
class Scene:
    """The objects and the background of an image; `make_scene` makes it."""

    seed: int
    objects: tuple[Object, ...]
    background: Background


def make_scene(seed: int, *, num_objects: tuple[float, float, float] = NUM_OBJECTS) -> Scene:
    """Returns the scene of a seed; `num_objects` are the probabilities of 1, 2 and 3 objects.

    Raises ValueError for a negative seed, or probabilities that do not sum to 1.
    """
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative; give 0 or more")
    if len(num_objects) != 3 or min(num_objects) < 0 or abs(sum(num_objects) - 1) > 1e-6:
        raise ValueError(
            f"num_objects: {num_objects} must be three probabilities (of 1, 2, 3 objects) that "
            "sum to 1"
        )
    rng = np.random.default_rng(seed)
    count = int(np.searchsorted(np.cumsum(num_objects)[:2], rng.random(), side="right")) + 1
    background = _make_background(rng)
    return Scene(seed, _make_objects(rng, count), background)


def find_relation(first: Object, second: Object) -> str | None:
    """Returns where `first` is relative to `second`, one of `RELATIONS` on the dominant axis.

    None where it is not clear.
    """
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) <= MIN_DISTANCE:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def invert_relation(name: str) -> str:
    """Returns the relation that holds with the two objects exchanged."""
    return RELATIONS[RELATIONS.index(name) ^ 1]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Returns an element of a non-empty sequence, uniformly.

    `rng.choice` would turn tuples into arrays, and is 20 times slower.
    """
    return options[int(rng.random() * len(options))]


def _make_background(rng: np.random.Generator) -> Background:
    tones = [TONES[i] for i in rng.permutation(len(TONES))[:3]]
    horizon = float(rng.uniform(0.35, 0.75)) if rng.random() < HORIZON_RATE else None
    return Background(tones[0], tones[1], float(rng.uniform(0, 2 * np.pi)), horizon, tones[2])


def _make_objects(rng: np.random.Generator, count: int) -> tuple[Object, ...]:
    """Returns `count` objects that do not overlap.

    Sizes are drawn once and kept: if objects that find no space were drawn anew, a scene of many
    would be one of small ones, and their number would tell their size without the image.
    """
    sizes = ["large" if rng.random() < LARGE_RATE else "small" for _ in range(count)]
    objects = _place_objects(rng, sizes)
    while objects is None:
        objects = _place_objects(rng, sizes)
    return tuple(objects[index] for index in rng.permutation(count))


def _place_objects(rng: np.random.Generator, sizes: list[str]) -> list[Object] | None:
    """Returns objects of these sizes; None where 100 attempts at one have failed."""
    objects: list[Object] = []
    for size in sorted(sizes):  # large ones first, while there is space
        for _ in range(100):
            candidate = _make_object(rng, size)
            if objects and rng.random() < SIMILAR_RATE:
                candidate = _make_similar(rng, candidate, pick(rng, objects))
            if all(_can_coexist(candidate, item) for item in objects):
                objects.append(candidate)
                break
        else:
            return None
    return objects


def _make_object(rng: np.random.Generator, size: str) -> Object:
    radius = RADIUS[size] * float(rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER))
    texture = "plain" if rng.random() < PLAIN_RATE else pick(rng, TEXTURES[1:])
    x, y = (float(value) for value in rng.uniform(radius, 1 - radius, size=2))
    return Object(pick(rng, SHAPES), pick(rng, tuple(COLORS)), size, texture, x, y, radius)


def _make_similar(rng: np.random.Generator, item: Object, model: Object) -> Object:
    """Returns `item` with the texture of `model` and either its color or its shape."""
    shared = pick(rng, ("color", "shape"))
    return replace(item, texture=model.texture, **{shared: getattr(model, shared)})


def _can_coexist(first: Object, second: Object) -> bool:
    """Returns whether two objects differ in color or shape and do not overlap."""
    is_same = first.color == second.color and first.shape == second.shape
    distance = max(abs(first.x - second.x), abs(first.y - second.y))
    return not is_same and distance > first.radius + second.radius
