"""What can truly be said and asked about a scene: names, captions, paragraphs, questions,
statements on two scenes.

Lower-case English, the words (and marks) separated by single spaces. Everything said is true by
construction and every
question has one answer. Both sides of a yes/no or true/false are drawn from the same forms:
guessing from the words
alone scores 51 % on statements, 50 % on "is there", 60 % on sizes, 31 % over all questions (on
held-out scenes).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TypeAlias

from numpy.random import Generator

from beit3.world.scene import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scene,
    find_relation,
    invert_relation,
    pick,
)

NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
)  # in captions; answers use digits, as VQA's own normalisation does
SIDES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
ANSWERS = (*COLORS, *SHAPES, *SIZES, *TEXTURES, "0", "1", "2", "3", "yes", "no", *SIDES.values())
ATTRIBUTE_VALUES = {
    "size": SIZES,
    "texture": TEXTURES,
    "color": tuple(COLORS),
    "shape": SHAPES,
}  # in the order of English
KIND_WEIGHTS = {
    "color": 0.26,
    "shape": 0.22,
    "size": 0.14,
    "texture": 0.06,
    "count": 0.08,
    "exists": 0.12,
    "relation": 0.12,
}
Description: TypeAlias = dict[str, str]  # attribute -> word, for some of WORDS


@dataclass(frozen=True)
class Question:
    """`kind` is one of KIND_WEIGHTS, `answer` one of ANSWERS."""

    text: str
    answer: str
    kind: str


def describe_object(item: Object) -> str:
    """Size, texture (unless plain), color and shape: "large striped red circle"."""
    return _words(
        {key: getattr(item, key) for key in ATTRIBUTE_VALUES if getattr(item, key) != "plain"}
    )


def write_captions(scene: Scene, rng: Generator, count: int) -> list[str]:
    """`count` captions, all different as long as the scene affords it, else in rounds."""
    choices = _captions(scene)
    order = [choices[i] for i in rng.permutation(len(choices))]
    return [order[i % len(order)] for i in range(count)]


def write_paragraph(scene: Scene, rng: Generator) -> str:
    """A text-only document of three to seven sentences about one scene, each closed by " ."."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    number = NUMBERS[len(objects)] + (" object" if len(objects) == 1 else " objects")
    opening = pick(rng, ("there {is} {n} in the picture", "the picture shows {n}", "here {is} {n}"))
    sentences = [opening.format(n=number, **{"is": "is" if len(objects) == 1 else "are"})]
    sentences += [
        pick(rng, ("there is {}", "this is {}", "i see {}")).format(_a(describe_object(o)))
        for o in objects
    ]
    facts = [
        f"the {describe_object(a)} is {r} the {describe_object(b)}" for a, r, b in _pairs(scene)
    ]
    for item in objects:
        facts += [f"the {ref} is {item.color}" for ref in _refer(scene, item, hidden="color")]
        facts += [f"the {ref} is {item.size}" for ref in _refer(scene, item, hidden="size")]
    picked = [facts[i] for i in rng.permutation(len(facts))[: 1 + int(rng.random() * 3)]]
    return " . ".join(sentences + picked) + " ."


def ask_questions(scene: Scene, rng: Generator, count: int) -> list[Question]:
    """`count` questions of different wording (fewer only when the scene affords no more), kinds as
    in KIND_WEIGHTS."""
    asked: dict[str, Question] = {}
    kinds, weights = tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values())
    for _ in range(50 * count):
        if len(asked) == count:
            break
        threshold, at = rng.random() * sum(weights), 0
        while at < len(kinds) - 1 and threshold >= weights[at]:
            threshold, at = threshold - weights[at], at + 1
        question = _ASK[kinds[at]](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def make_statement(left: Scene, right: Scene, rng: Generator) -> tuple[str, bool]:
    """A claim on a pair of pictures, as in NLVR2, and whether it holds: even odds for every form of
    claim."""
    forms = [form for form in _claims(left, right) if len({holds for _, holds in form}) == 2]
    form, truth = pick(rng, forms), rng.random() < 0.5
    text = pick(rng, [text for text, holds in form if holds == truth])
    return f"{text} .", bool(truth)


# Descriptions -------------------------------------------------------------------------------------


def _words(description: Description) -> str:
    words = [description[key] for key in ATTRIBUTE_VALUES if key in description]
    return " ".join(words if "shape" in description else [*words, "object"])


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _matches(item: Object, description: Description) -> bool:
    return all(getattr(item, key) == word for key, word in description.items())


def _any(scene: Scene, description: Description) -> bool:
    return any(_matches(item, description) for item in scene.objects)


def _refer(scene: Scene, item: Object, *, hidden: str) -> list[str]:
    """The shortest and second shortest descriptions that fit `item` alone and do not tell the
    attribute `hidden`."""
    keys = [key for key in ATTRIBUTE_VALUES if key != hidden and getattr(item, key) != "plain"]
    found: list[tuple[int, str]] = []
    for length in range(len(keys) + 1):
        for chosen in combinations(keys, length):
            description = {key: getattr(item, key) for key in chosen}
            if sum(_matches(other, description) for other in scene.objects) == 1:
                found.append((length, _words(description)))
    return [words for length, words in found if length <= found[0][0] + 1]


def _pairs(scene: Scene) -> list[tuple[Object, str, Object]]:
    """Every (a, relation, b) that holds, both ways round."""
    found = [(a, find_relation(a, b), b) for a, b in permutations(scene.objects, 2)]
    return [(a, where, b) for a, where, b in found if where is not None]


def _captions(scene: Scene) -> list[str]:
    names = [_a(describe_object(item)) for item in scene.objects]
    if len(names) == 1:
        return [
            form.format(*names)
            for form in ("{}", "there is {}", "a picture of {}", "one object : {}")
        ]
    said = [
        f"{_a(describe_object(a))} {where} {_a(describe_object(b))}"
        for a, where, b in _pairs(scene)
    ]
    if len(names) == 2:
        for first, second in permutations(names):
            said += [f"{first} and {second}", f"two objects : {first} and {second}"]
        return said
    said += [f"{first} , {second} and {third}" for first, second, third in permutations(names)]
    return said + [f"{first} and {second}" for first, second in permutations(names, 2)]


# Questions ----------------------------------------------------------------------------------------


def _ask_attribute(
    key: str, forms: tuple[str, ...]
) -> Callable[[Scene, Generator], Question | None]:
    """The asker of one attribute: `forms` have {} where the object is referred to without it."""

    def ask(scene: Scene, rng: Generator) -> Question | None:
        item = pick(rng, scene.objects)
        references = _refer(scene, item, hidden=key)
        if not references:
            return None
        return Question(pick(rng, forms).format(pick(rng, references)), getattr(item, key), key)

    return ask


def _ask_texture(scene: Scene, rng: Generator) -> Question | None:
    # Most objects are plain: leave out most questions on those, or "plain" would be the answer 70 %
    # of the time.
    item = pick(rng, scene.objects)
    references = _refer(scene, item, hidden="texture")
    if not references or (item.texture == "plain" and rng.random() < 0.75):
        return None
    return Question(f"what texture is the {pick(rng, references)} ?", item.texture, "texture")


def _ask_count(scene: Scene, rng: Generator) -> Question:
    size = pick(rng, ("", *SIZES))
    number = sum(item.size == size or not size for item in scene.objects)
    return Question(f"how many {size} objects are there ?".replace("  ", " "), str(number), "count")


def _ask_exists(scene: Scene, rng: Generator) -> Question:
    keys = pick(
        rng, (("color",), ("shape",), ("color", "shape"), ("size", "shape"), ("size", "color"))
    )
    item = pick(rng, scene.objects)
    description = {key: getattr(item, key) for key in keys}
    answer = "yes" if rng.random() < 0.5 else "no"
    while answer == "no" and _any(
        scene, description
    ):  # ends: no scene shows all colors, or all shapes
        key = pick(rng, keys)
        description[key] = pick(rng, ATTRIBUTE_VALUES[key])
    return Question(f"is there {_a(_words(description))} ?", answer, "exists")


def _ask_relation(scene: Scene, rng: Generator) -> Question | None:
    pairs = _pairs(scene)
    if not pairs:
        return None
    first, where, second = pick(rng, pairs)
    landmark = _named(second)
    form = pick(rng, ("attribute", "attribute", "yes/no", "side"))
    if form == "yes/no":
        told, answer = (where, "yes") if rng.random() < 0.5 else (invert_relation(where), "no")
        return Question(f"is the {_named(first)} {told} the {landmark} ?", answer, "relation")
    if form == "side":
        text = f"on which side of the {landmark} is the {_named(first)} ?"
        return Question(text, SIDES[where], "relation")
    if any(_leans(other, where, second) for other in scene.objects if other not in (first, second)):
        return None
    key = pick(rng, ("color", "shape"))
    return Question(
        f"what {key} is the object {where} the {landmark} ?", getattr(first, key), "relation"
    )


def _named(item: Object) -> str:
    return f"{item.color} {item.shape}"


def _leans(item: Object, where: str, landmark: Object) -> bool:
    """Whether `item` lies on that side of `landmark` at all, clearly or not."""
    horizontal = where in RELATIONS[:2]
    ahead = item.x - landmark.x if horizontal else item.y - landmark.y
    return ahead <= 0 if where in ("left of", "above") else ahead >= 0


_ASK: dict[str, Callable[[Scene, Generator], Question | None]] = {
    "color": _ask_attribute("color", ("what color is the {} ?",)),
    "shape": _ask_attribute("shape", ("what shape is the {} ?",)),
    "size": _ask_attribute("size", ("what size is the {} ?", "is the {} small or large ?")),
    "texture": _ask_texture,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


# Statements ---------------------------------------------------------------------------------------


_FEW = ((1, "one object"), (2, "two objects"))


def _claims(left: Scene, right: Scene) -> Iterator[list[tuple[str, bool]]]:
    """Forms of claim, each with its possible wordings and their truth.

    One form holds wordings that are interchangeable (all colors, both relations of an axis ...), so
    that a wording is
    about as often true as false (between 37 and 61 % for the worst, those on sizes).
    """
    for side, scene in (("left", left), ("right", right)):
        # Not "three": rarer than the others, it would be false more often than true.
        yield [(f"the {side} image shows {said}", len(scene.objects) == n) for n, said in _FEW]
        for a, where, b in _pairs(scene):
            told = (where, invert_relation(where))
            yield [
                (f"in the {side} image the {_named(a)} is {w} the {_named(b)}", w == where)
                for w in told
            ]
    for key in ("color", "shape", "size"):
        found = [
            (_a(_words({key: w})), _any(left, {key: w}), _any(right, {key: w}))
            for w in ATTRIBUTE_VALUES[key]
        ]
        yield [(f"the left image contains {it}", in_left) for it, in_left, _ in found]
        yield [(f"the right image contains {it}", in_right) for it, _, in_right in found]
        yield [
            (f"both images contain {it}", in_left and in_right) for it, in_left, in_right in found
        ]
        yield [
            (f"at least one image contains {it}", in_left or in_right)
            for it, in_left, in_right in found
        ]
        yield [
            (f"only one image contains {it}", in_left != in_right)
            for it, in_left, in_right in found
        ]
    more = len(left.objects) - len(right.objects)
    yield [
        ("the left image has more objects than the right image", more > 0),
        ("the right image has more objects than the left image", more < 0),
        ("both images have the same number of objects", more == 0),
    ]
