"""A slow second reading of the world's language: from the text and the scene's objects alone, what
is true.

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


def noun(text: str) -> dict[str, str]:
    """The attributes a phrase tells: "a large circle" -> size large, shape circle; fails on a word
    it cannot place."""
    words = text.split()
    if words[0] in ("a", "an", "the"):
        article, words = words[0], words[1:]
        assert article == "the" or (article == "an") == (words[0][0] in "aeiou"), text
    read: dict[str, str] = {}
    for word in words:
        keys = [key for key, known in VOCABULARY.items() if word in known]
        assert keys or (word in ("object", "objects") and word == words[-1]), (
            f"{word!r} in {text!r}"
        )
        read.update(dict.fromkeys(keys, word))
    return read


def fitting(text: str, scene: Scene) -> list[Object]:
    """The objects that a simple noun phrase fits."""
    read = noun(text)
    return [
        item
        for item in scene.objects
        if all(getattr(item, key) == word for key, word in read.items())
    ]


def the(text: str, scene: Scene) -> Object:
    """The one object of a definite phrase, "the object left of the red square" included."""
    if match := re.fullmatch(rf"(.+?) ({SIDES}) (.+)", text):
        landmark = the(match[3], scene)
        found = [
            item
            for item in fitting(match[1], scene)
            if item is not landmark and leans(item, match[2], landmark)
        ]
        assert len(found) == 1 and clearly(found[0], match[2], landmark), text
        return found[0]
    found = fitting(text, scene)
    assert len(found) == 1, f"{text!r} fits {len(found)} objects"
    return found[0]


def leans(item: Object, side: str, landmark: Object) -> bool:
    if side == "left of":
        return item.x < landmark.x
    if side == "right of":
        return item.x > landmark.x
    if side == "above":
        return item.y < landmark.y
    return item.y > landmark.y


def clearly(item: Object, side: str, landmark: Object) -> bool:
    """Leaning to that side by over a quarter of the picture, and more than to any other side."""
    dx, dy = abs(item.x - landmark.x), abs(item.y - landmark.y)
    along, across = (dx, dy) if side in ("left of", "right of") else (dy, dx)
    return leans(item, side, landmark) and along > 0.25 and along >= across


def placed(first: str, side: str, second: str, scene: Scene) -> bool:
    """Whether the first stands on that side of the second; fails where the answer would be a matter
    of taste."""
    item, landmark = the(first, scene), the(second, scene)
    truths = {name: clearly(item, name, landmark) for name in SIDES.split("|")}
    assert any(truths.values()) and not (leans(item, side, landmark) and not truths[side]), (
        first,
        side,
        second,
    )
    return truths[side]


def caption_holds(text: str, scene: Scene) -> bool:
    """Each mention fits an object of its own in full (texture told exactly when not plain), numbers
    and sides hold."""
    match = re.fullmatch(r"(?:(one|two|three) objects? : |there is |a picture of )?(.+)", text)
    assert match, text
    if match[1] and NUMBERS[match[1]] != len(scene.objects):
        return False
    body = match[2]
    mentions = re.split(rf" , | and | (?:{SIDES}) ", body)
    found = [full(mention, scene) for mention in mentions]
    if len(found) != len({item for item in found if item is not None}):
        return False
    side = re.fullmatch(rf"(.+?) ({SIDES}) (.+)", body)
    return side is None or placed(side[1], side[2], side[3], scene)


def full(mention: str, scene: Scene) -> Object | None:
    """The object that a full description names, None when there is none."""
    read = noun(mention)
    assert {"size", "color", "shape"} <= read.keys() and read.get("texture") != "plain", mention
    found = [
        item for item in fitting(mention, scene) if item.texture == read.get("texture", "plain")
    ]
    return found[0] if len(found) == 1 else None


def answer(text: str, scene: Scene) -> str:
    """The answer to a question; fails on one that is not understood or has no single answer."""
    if match := re.fullmatch(r"what (color|shape|size|texture) is (the .+) \?", text):
        assert match[1] not in noun(re.split(f" (?:{SIDES}) ", match[2])[0]), (
            f"gives itself away: {text}"
        )
        return getattr(the(match[2], scene), match[1])
    if match := re.fullmatch(r"is (the .+) small or large \?", text):
        assert "size" not in noun(match[1]), f"gives itself away: {text}"
        return the(match[1], scene).size
    if match := re.fullmatch(r"on which side of (the .+) is (the .+) \?", text):
        found = [
            side
            for side in SIDES.split("|")
            if clearly(the(match[2], scene), side, the(match[1], scene))
        ]
        assert len(found) == 1, text
        return found[0].removesuffix(" of")
    if match := re.fullmatch(rf"is (the .+?) ({SIDES}) (the .+) \?", text):
        return "yes" if placed(match[1], match[2], match[3], scene) else "no"
    if match := re.fullmatch(r"how many (.+) are there \?", text):
        return str(len(fitting(match[1], scene)))
    match = re.fullmatch(r"is there (an? .+) \?", text)
    assert match, f"not understood: {text}"
    return "yes" if fitting(match[1], scene) else "no"


def sentence_holds(text: str, scene: Scene) -> bool:
    """One sentence of a paragraph, without its full stop."""
    number = re.fullmatch(
        r"(?:there (?:is|are)|the picture shows|here (?:is|are)) (one|two|three) objects?.*", text
    )
    if number:
        return NUMBERS[number[1]] == len(scene.objects)
    if match := re.fullmatch(r"(?:there is|this is|i see) (an? .+)", text):
        return full(match[1], scene) is not None
    if match := re.fullmatch(rf"(the .+?) is ({SIDES}) (the .+)", text):
        return placed(match[1], match[2], match[3], scene)
    match = re.fullmatch(r"(the .+) is (\w+)", text)
    assert match, f"not understood: {text}"
    return match[2] in (the(match[1], scene).color, the(match[1], scene).size)


def statement_holds(text: str, left: Scene, right: Scene) -> bool:
    """A statement on two pictures."""
    scenes = {"left": left, "right": right}
    if match := re.fullmatch(r"the (left|right) image shows (one|two|three) objects? \.", text):
        return len(scenes[match[1]].objects) == NUMBERS[match[2]]
    if match := re.fullmatch(
        rf"in the (left|right) image (the .+?) is ({SIDES}) (the .+) \.", text
    ):
        return placed(match[2], match[3], match[4], scenes[match[1]])
    if match := re.fullmatch(r"the (left|right) image contains (an? .+) \.", text):
        return bool(fitting(match[2], scenes[match[1]]))
    if match := re.fullmatch(
        r"(both images|at least one image|only one image) contains? (an? .+) \.", text
    ):
        hits = sum(bool(fitting(match[2], scene)) for scene in (left, right))
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
