"""Writes texts about scenes: names, captions, paragraphs, questions, statements about two scenes.

The texts are lower-case English with single spaces between words and punctuation. All of them are
true, and every question has one answer. Both answers to a yes/no question and both labels of a
statement come from the same sentence forms: guessing from the text alone scores 51 % on statements,
50 % on "is there", 60 % on sizes, and 31 % over all questions, on held-out scenes.
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

NUMBERS = ("zero", "one", "two", "three")
"""Numbers in captions; answers have digits, as VQA's normalization does."""
SIDES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
ANSWERS = (*COLORS, *SHAPES, *SIZES, *TEXTURES, "0", "1", "2", "3", "yes", "no", *SIDES.values())
ATTRIBUTE_VALUES = {
    "size": SIZES,
    "texture": TEXTURES,
    "color": tuple(COLORS),
    "shape": SHAPES,
}
"""In the order of English adjectives."""
KIND_WEIGHTS = {
    "color": 0.26,
    "shape": 0.22,
    "size": 0.14,
    "texture": 0.06,
    "count": 0.08,
    "exists": 0.12,
    "relation": 0.12,
}
Description: TypeAlias = dict[str, str]
"""Attribute -> value, for some of `ATTRIBUTE_VALUES`."""


@dataclass(frozen=True)
class Question:
    """A question; `kind` is one of `KIND_WEIGHTS`, `answer` one of `ANSWERS`."""

    text: str
    answer: str
    kind: str


def describe_object(item: Object) -> str:
    """Returns size, texture (unless plain), color and shape: "large striped red circle"."""
    return _join_words(
        {key: getattr(item, key) for key in ATTRIBUTE_VALUES if getattr(item, key) != "plain"}
    )


def write_captions(scene: Scene, rng: Generator, count: int) -> list[str]:
    """Returns `count` captions, which repeat only where the scene does not allow as many."""
    choices = _list_captions(scene)
    order = [choices[i] for i in rng.permutation(len(choices))]
    return [order[i % len(order)] for i in range(count)]


def write_paragraph(scene: Scene, rng: Generator) -> str:
    """Returns a document of three to seven sentences about a scene, each ended by " ."."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    number = NUMBERS[len(objects)] + (" object" if len(objects) == 1 else " objects")
    opening = pick(rng, ("there {is} {n} in the picture", "the picture shows {n}", "here {is} {n}"))
    sentences = [opening.format(n=number, **{"is": "is" if len(objects) == 1 else "are"})]
    sentences += [
        pick(rng, ("there is {}", "this is {}", "i see {}")).format(
            _add_article(describe_object(o))
        )
        for o in objects
    ]
    facts = [
        f"the {describe_object(a)} is {r} the {describe_object(b)}"
        for a, r, b in _find_relations(scene)
    ]
    for item in objects:
        facts += [f"the {ref} is {item.color}" for ref in _refer(scene, item, hidden="color")]
        facts += [f"the {ref} is {item.size}" for ref in _refer(scene, item, hidden="size")]
    picked = [facts[i] for i in rng.permutation(len(facts))[: 1 + int(rng.random() * 3)]]
    return " . ".join(sentences + picked) + " ."


def ask_questions(scene: Scene, rng: Generator, count: int) -> list[Question]:
    """Returns `count` questions of different wording, with kinds drawn by `KIND_WEIGHTS`.

    There are fewer only where the scene does not allow as many.
    """
    questions: dict[str, Question] = {}
    kinds, weights = tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values())
    for _ in range(50 * count):
        if len(questions) == count:
            break
        threshold, index = rng.random() * sum(weights), 0
        while index < len(kinds) - 1 and threshold >= weights[index]:
            threshold, index = threshold - weights[index], index + 1
        question = _ASK[kinds[index]](scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def make_statement(left: Scene, right: Scene, rng: Generator) -> tuple[str, bool]:
    """Returns a statement about two images, as in NLVR2, and whether it is true.

    Each form of statement is as often true as false.
    """
    forms = [form for form in _list_claims(left, right) if len({holds for _, holds in form}) == 2]
    form, label = pick(rng, forms), rng.random() < 0.5
    text = pick(rng, [text for text, holds in form if holds == label])
    return f"{text} .", bool(label)


# Descriptions -------------------------------------------------------------------------------------


def _join_words(description: Description) -> str:
    words = [description[key] for key in ATTRIBUTE_VALUES if key in description]
    return " ".join(words if "shape" in description else [*words, "object"])


def _add_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _matches(item: Object, description: Description) -> bool:
    return all(getattr(item, key) == word for key, word in description.items())


def _contains(scene: Scene, description: Description) -> bool:
    return any(_matches(item, description) for item in scene.objects)


def _refer(scene: Scene, item: Object, *, hidden: str) -> list[str]:
    """Returns the shortest and second shortest descriptions that fit `item` alone.

    They do not mention the attribute `hidden`.
    """
    keys = [key for key in ATTRIBUTE_VALUES if key != hidden and getattr(item, key) != "plain"]
    references: list[tuple[int, str]] = []
    for length in range(len(keys) + 1):
        for chosen_keys in combinations(keys, length):
            description = {key: getattr(item, key) for key in chosen_keys}
            if sum(_matches(candidate, description) for candidate in scene.objects) == 1:
                references.append((length, _join_words(description)))
    return [words for length, words in references if length <= references[0][0] + 1]


def _find_relations(scene: Scene) -> list[tuple[Object, str, Object]]:
    """Returns all (a, relation, b) that hold, in both directions."""
    triples = [(a, find_relation(a, b), b) for a, b in permutations(scene.objects, 2)]
    return [(a, relation, b) for a, relation, b in triples if relation is not None]


def _list_captions(scene: Scene) -> list[str]:
    names = [_add_article(describe_object(item)) for item in scene.objects]
    if len(names) == 1:
        return [
            form.format(*names)
            for form in ("{}", "there is {}", "a picture of {}", "one object : {}")
        ]
    captions = [
        f"{_add_article(describe_object(a))} {relation} {_add_article(describe_object(b))}"
        for a, relation, b in _find_relations(scene)
    ]
    if len(names) == 2:
        for first, second in permutations(names):
            captions += [f"{first} and {second}", f"two objects : {first} and {second}"]
        return captions
    captions += [f"{first} , {second} and {third}" for first, second, third in permutations(names)]
    return captions + [f"{first} and {second}" for first, second in permutations(names, 2)]


# Questions ----------------------------------------------------------------------------------------


def _ask_attribute(
    key: str, forms: tuple[str, ...]
) -> Callable[[Scene, Generator], Question | None]:
    """Returns the asker of an attribute; `forms` have {} for an object described without it."""

    def ask(scene: Scene, rng: Generator) -> Question | None:
        item = pick(rng, scene.objects)
        references = _refer(scene, item, hidden=key)
        if not references:
            return None
        return Question(pick(rng, forms).format(pick(rng, references)), getattr(item, key), key)

    return ask


def _ask_texture(scene: Scene, rng: Generator) -> Question | None:
    # Most objects are plain. Without this rule "plain" would be the answer 80 % of the time.
    item = pick(rng, scene.objects)
    references = _refer(scene, item, hidden="texture")
    if not references or (item.texture == "plain" and rng.random() < 0.85):
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
    # The loop ends, because no scene shows all colors or all shapes.
    while answer == "no" and _contains(scene, description):
        key = pick(rng, keys)
        description[key] = pick(rng, ATTRIBUTE_VALUES[key])
    return Question(f"is there {_add_article(_join_words(description))} ?", answer, "exists")


def _ask_relation(scene: Scene, rng: Generator) -> Question | None:
    relations = _find_relations(scene)
    if not relations:
        return None
    first, relation, second = pick(rng, relations)
    landmark = _name(second)
    form = pick(rng, ("attribute", "attribute", "yes/no", "side"))
    if form == "yes/no":
        claim, answer = relation, "yes"
        if rng.random() >= 0.5:
            claim, answer = invert_relation(relation), "no"
        return Question(f"is the {_name(first)} {claim} the {landmark} ?", answer, "relation")
    if form == "side":
        text = f"on which side of the {landmark} is the {_name(first)} ?"
        return Question(text, SIDES[relation], "relation")
    others = [item for item in scene.objects if item not in (first, second)]
    if any(_leans(item, relation, second) for item in others):
        return None
    key = pick(rng, ("color", "shape"))
    return Question(
        f"what {key} is the object {relation} the {landmark} ?", getattr(first, key), "relation"
    )


def _name(item: Object) -> str:
    return f"{item.color} {item.shape}"


def _leans(item: Object, relation: str, landmark: Object) -> bool:
    """Returns whether `item` is on this side of `landmark` at all, clearly or not."""
    is_horizontal = relation in RELATIONS[:2]
    offset = item.x - landmark.x if is_horizontal else item.y - landmark.y
    return offset <= 0 if relation in ("left of", "above") else offset >= 0


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


_COUNTS = ((1, "one object"), (2, "two objects"))


def _list_claims(left: Scene, right: Scene) -> Iterator[list[tuple[str, bool]]]:
    """Yields forms of statement, each a list of (wording, whether it is true).

    A form has wordings that are interchangeable (all colors, both relations of an axis), so that a
    wording is about as often true as false (between 37 and 61 % for the worst, those on sizes).
    """
    for side, scene in (("left", left), ("right", right)):
        # Not "three": it is rarer, so it would be false more often than true.
        yield [
            (f"the {side} image shows {words}", len(scene.objects) == count)
            for count, words in _COUNTS
        ]
        for a, relation, b in _find_relations(scene):
            yield [
                (f"in the {side} image the {_name(a)} is {claim} the {_name(b)}", holds)
                for claim, holds in ((relation, True), (invert_relation(relation), False))
            ]
    for key in ("color", "shape", "size"):
        rows = [
            (
                _add_article(_join_words({key: value})),
                _contains(left, {key: value}),
                _contains(right, {key: value}),
            )
            for value in ATTRIBUTE_VALUES[key]
        ]
        yield [(f"the left image contains {name}", in_left) for name, in_left, _ in rows]
        yield [(f"the right image contains {name}", in_right) for name, _, in_right in rows]
        yield [
            (f"both images contain {name}", in_left and in_right)
            for name, in_left, in_right in rows
        ]
        yield [
            (f"at least one image contains {name}", in_left or in_right)
            for name, in_left, in_right in rows
        ]
        yield [
            (f"only one image contains {name}", in_left != in_right)
            for name, in_left, in_right in rows
        ]
    more = len(left.objects) - len(right.objects)
    yield [
        ("the left image has more objects than the right image", more > 0),
        ("the right image has more objects than the left image", more < 0),
        ("both images have the same number of objects", more == 0),
    ]
