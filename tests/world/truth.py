"""An independent, slow check of the world's texts against the objects of their scenes.

It shares nothing with `beit3.world.language`: it parses the English and measures the objects anew.
"""

import re

from beit3.world.scene import Object, Scene

VOCABULARY = {
    "color": "red green blue yellow purple orange white black".split(),
    "shape": "circle square triangle cross bar".split(),
    "size": "small large".split(),
    "texture": "plain striped dotted".split(),
}
SIDES = "left of|right of|above|below"
NUMBERS = {"one": 1, "two": 2, "three": 3}


def parse_noun(text: str) -> dict[str, str]:
    """Returns the attributes of a phrase: "a large circle" -> size large, shape circle.

    Fails on an unknown word.
    """
    words = text.split()
    if words[0] in ("a", "an", "the"):
        article, words = words[0], words[1:]
        assert article == "the" or (article == "an") == (words[0][0] in "aeiou"), text
    attributes: dict[str, str] = {}
    for word in words:
        keys = [key for key, values in VOCABULARY.items() if word in values]
        assert keys or (word in ("object", "objects") and word == words[-1]), (
            f"{word!r} in {text!r}"
        )
        attributes.update(dict.fromkeys(keys, word))
    return attributes


def find_fitting(text: str, scene: Scene) -> list[Object]:
    """Returns the objects that a simple noun phrase fits."""
    attributes = parse_noun(text)
    return [
        item
        for item in scene.objects
        if all(getattr(item, key) == word for key, word in attributes.items())
    ]


def find_referent(text: str, scene: Scene) -> Object:
    """Returns the object of a definite phrase, which may have "left of the red square"."""
    if match := re.fullmatch(rf"(.+?) ({SIDES}) (.+)", text):
        landmark = find_referent(match[3], scene)
        matches = [
            item
            for item in find_fitting(match[1], scene)
            if item is not landmark and leans(item, match[2], landmark)
        ]
        assert len(matches) == 1 and is_clearly(matches[0], match[2], landmark), text
        return matches[0]
    matches = find_fitting(text, scene)
    assert len(matches) == 1, f"{text!r} fits {len(matches)} objects"
    return matches[0]


def leans(item: Object, side: str, landmark: Object) -> bool:
    if side == "left of":
        return item.x < landmark.x
    if side == "right of":
        return item.x > landmark.x
    if side == "above":
        return item.y < landmark.y
    return item.y > landmark.y


def is_clearly(item: Object, side: str, landmark: Object) -> bool:
    """Returns whether `item` is on that side by over a quarter of the image, and mostly there."""
    dx, dy = abs(item.x - landmark.x), abs(item.y - landmark.y)
    along, across = (dx, dy) if side in ("left of", "right of") else (dy, dx)
    return leans(item, side, landmark) and along > 0.25 and along >= across


def stands(first: str, side: str, second: str, scene: Scene) -> bool:
    """Returns whether the first object is on that side of the second; fails where it is unclear."""
    item, landmark = find_referent(first, scene), find_referent(second, scene)
    truths = {name: is_clearly(item, name, landmark) for name in SIDES.split("|")}
    assert any(truths.values()) and not (leans(item, side, landmark) and not truths[side]), (
        first,
        side,
        second,
    )
    return truths[side]


def caption_holds(text: str, scene: Scene) -> bool:
    """Returns whether each mention describes its own object, and numbers and sides are right."""
    match = re.fullmatch(r"(?:(one|two|three) objects? : |there is |a picture of )?(.+)", text)
    assert match, text
    if match[1] and NUMBERS[match[1]] != len(scene.objects):
        return False
    body = match[2]
    mentions = re.split(rf" , | and | (?:{SIDES}) ", body)
    matches = [find_described(mention, scene) for mention in mentions]
    if len(matches) != len({item for item in matches if item is not None}):
        return False
    side = re.fullmatch(rf"(.+?) ({SIDES}) (.+)", body)
    return side is None or stands(side[1], side[2], side[3], scene)


def find_described(mention: str, scene: Scene) -> Object | None:
    """Returns the object of a full description, which names a texture unless it is plain."""
    attributes = parse_noun(mention)
    assert {"size", "color", "shape"} <= attributes.keys() and attributes.get(
        "texture"
    ) != "plain", mention
    matches = [
        item
        for item in find_fitting(mention, scene)
        if item.texture == attributes.get("texture", "plain")
    ]
    return matches[0] if len(matches) == 1 else None


def answer(text: str, scene: Scene) -> str:
    """Returns the answer to a question; fails where there is no single one."""
    if match := re.fullmatch(r"what (color|shape|size|texture) is (the .+) \?", text):
        assert match[1] not in parse_noun(re.split(f" (?:{SIDES}) ", match[2])[0]), (
            f"gives itself away: {text}"
        )
        return getattr(find_referent(match[2], scene), match[1])
    if match := re.fullmatch(r"is (the .+) small or large \?", text):
        assert "size" not in parse_noun(match[1]), f"gives itself away: {text}"
        return find_referent(match[1], scene).size
    if match := re.fullmatch(r"on which side of (the .+) is (the .+) \?", text):
        matches = [
            side
            for side in SIDES.split("|")
            if is_clearly(find_referent(match[2], scene), side, find_referent(match[1], scene))
        ]
        assert len(matches) == 1, text
        return matches[0].removesuffix(" of")
    if match := re.fullmatch(rf"is (the .+?) ({SIDES}) (the .+) \?", text):
        return "yes" if stands(match[1], match[2], match[3], scene) else "no"
    if match := re.fullmatch(r"how many (.+) are there \?", text):
        return str(len(find_fitting(match[1], scene)))
    match = re.fullmatch(r"is there (an? .+) \?", text)
    assert match, f"not understood: {text}"
    return "yes" if find_fitting(match[1], scene) else "no"


def sentence_holds(text: str, scene: Scene) -> bool:
    """Returns whether a sentence of a paragraph, without its full stop, is true."""
    number = re.fullmatch(
        r"(?:there (?:is|are)|the picture shows|here (?:is|are)) (one|two|three) objects?.*", text
    )
    if number:
        return NUMBERS[number[1]] == len(scene.objects)
    if match := re.fullmatch(r"(?:there is|this is|i see) (an? .+)", text):
        return find_described(match[1], scene) is not None
    if match := re.fullmatch(rf"(the .+?) is ({SIDES}) (the .+)", text):
        return stands(match[1], match[2], match[3], scene)
    match = re.fullmatch(r"(the .+) is (\w+)", text)
    assert match, f"not understood: {text}"
    return match[2] in (find_referent(match[1], scene).color, find_referent(match[1], scene).size)


def statement_holds(text: str, left: Scene, right: Scene) -> bool:
    """Returns whether a statement about two images is true."""
    scenes = {"left": left, "right": right}
    if match := re.fullmatch(r"the (left|right) image shows (one|two|three) objects? \.", text):
        return len(scenes[match[1]].objects) == NUMBERS[match[2]]
    if match := re.fullmatch(
        rf"in the (left|right) image (the .+?) is ({SIDES}) (the .+) \.", text
    ):
        return stands(match[2], match[3], match[4], scenes[match[1]])
    if match := re.fullmatch(r"the (left|right) image contains (an? .+) \.", text):
        return bool(find_fitting(match[2], scenes[match[1]]))
    if match := re.fullmatch(
        r"(both images|at least one image|only one image) contains? (an? .+) \.", text
    ):
        hits = sum(bool(find_fitting(match[2], scene)) for scene in (left, right))
        return {
            "both images": hits == 2,
            "at least one image": hits > 0,
            "only one image": hits == 1,
        }[match[1]]
    if match := re.fullmatch(
        r"the (left|right) image has more objects than the (left|right) image \.", text
    ):
        assert match[1] != match[2], text
        return len(scenes[match[1]].objects) > len(scenes[match[2]].objects)
    assert text == "both images have the same number of objects .", f"not understood: {text}"
    return len(left.objects) == len(right.objects)
