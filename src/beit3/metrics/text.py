"""Answers as text: the normalisation of the official VQA evaluation and the soft scores of ten annotators.

The answer list of the released heads is built with `normalize_answer`; scores count the raw answers (BEiT-3's release).
"""

import re
from collections import Counter
from collections.abc import Iterable

# Each mark is removed where the text has it beside a space (or has a 1,000 with a comma), else it becomes a space.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
# A full stop goes unless a digit follows: "3.5" stays, "no." does not.
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# A word with one of its apostrophes forgotten gets it back.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def normalize_answer(text: str) -> str:
    """`text` in the form in which VQA answers are compared: "The Two  dogs." -> "2 dogs"."""
    words = (DIGITS.get(word, word) for word in _strip_punctuation(text).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """Answer, as it stands -> 0.3, 0.6, 0.9, 1.0 for 1, 2, 3, or more of the usual ten annotators who gave it."""
    return {answer: min(1.0, count * 3 / 10) for answer, count in Counter(answers).items()}


def _strip_punctuation(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = THOUSANDS.search(text)
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or thousands else " ")
    return FULL_STOP.sub("", cleaned)


def _forgotten(word: str) -> Iterable[str]:
    """`word` without each one of its apostrophes: y'all'll -> yall'll, y'allll."""
    return (word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'")


# The official table has one entry that removes an apostrophe.
APOSTROPHES = {wrong: word for word in CONTRACTIONS for wrong in _forgotten(word)} | {
    "somebody'd": "somebodyd"
}
