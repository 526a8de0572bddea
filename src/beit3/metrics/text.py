"""VQA answers as text: normalization of the official evaluation, soft scores of the annotators.

The answer list of the released heads is built with `normalize_answer`, but soft scores count the
raw answers, as in BEiT-3's release.
"""

import re
from collections import Counter
from collections.abc import Iterable

# Each character is removed where the text has it beside a space, and all of them where a comma
# stands between digits (1,000). Otherwise it becomes a space.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
# A period is removed unless a digit follows: "3.5" stays as it is, "no." does not.
PERIOD = re.compile(r"\.(?!\d)")
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# A word that lacks one of its apostrophes gets it back.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def normalize_answer(text: str) -> str:
    """Returns the form in which VQA answers are compared: "The Two  dogs." becomes "2 dogs"."""
    words = (DIGITS.get(word, word) for word in _strip_punctuation(text).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def compute_soft_scores(answers: Iterable[str]) -> dict[str, float]:
    """Maps each distinct answer of (usually ten) annotators to its soft score.

    It is 0.3, 0.6, 0.9 or 1.0 if 1, 2, 3 or more annotators gave the answer. Answers are compared
    as they are, without normalization.
    """
    return {answer: min(1.0, count * 3 / 10) for answer, count in Counter(answers).items()}


def _strip_punctuation(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = THOUSANDS.search(text)
    stripped = text
    for character in PUNCTUATION:
        beside_space = f"{character} " in text or f" {character}" in text
        stripped = stripped.replace(character, "" if beside_space or has_thousands else " ")
    return PERIOD.sub("", stripped)


def _drop_one_apostrophe(word: str) -> Iterable[str]:
    """Yields `word` without each one of its apostrophes: y'all'll gives yall'll and y'allll."""
    for index, letter in enumerate(word):
        if letter == "'":
            yield word[:index] + word[index + 1 :]


# The official table has one entry that removes an apostrophe.
APOSTROPHES = {
    misspelled: word for word in CONTRACTIONS for misspelled in _drop_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}
