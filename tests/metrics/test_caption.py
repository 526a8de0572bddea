"""BLEU, ROUGE-L and CIDEr: numbers of the official scorer, a slow second implementation, hand-worked cases.

RECORDED are the scores of REFERENCES and three sets of captions, sentences made up here: pycocoevalcap 1.2, its tokeniser
with a line "A zz" after each caption, then Bleu(4), Rouge() and Cider(); `cider_unclipped` by the same Cider() with the
minimum and the Gaussian taken out of its `sim`, which is the code of vrama91/cider's CIDEr.
"""

import random

import pytest

from beit3.metrics import caption_java
from beit3.metrics.caption import caption_scores
from beit3.metrics.caption_java import java_missing, java_scores
from tests.reference import metrics_caption as slow

REFERENCES = {
    "kitchen": [
        "Two cooks (one in a red hat) don't notice the pot that's boiling over.",
        "A pot boils over while 2 cooks talk!!",
        "Two people cook; steam rises from a pot.",
    ],
    "harbour": [
        "Fishing boats lie in the harbour of a small town at 5:30 a.m.",
        "Some boats, a quay and a black/white lighthouse.",
        "Boats rest in a harbor - the water is calm ...",
        "the harbour",
    ],
    "lesson": [
        "Mr. Brown's pupils can't hear the teacher.",
        'A teacher writes "1 1/2" on the board for his pupils',
    ],
    "café": [
        "Une vieille dame lit au café, à l'ombre.",
        "An old lady reads at a café in the shade.",
        "an old woman reading outside a café",
    ],
    "empty": ["A dog, and nothing else.", "a dog"],
    "blank": ["", "A picture of nothing at all"],
}
CANDIDATES = {
    "kitchen": "Two cooks (in red hats) don't see the boiling pot!!",
    "harbour": "a harbour with fishing boats and a black/white lighthouse",
    "lesson": "a teacher writes 1 1/2 on a board",
    "café": "An old lady is reading at a “café” … in the shade 😀",
    "empty": "",
    "blank": "a picture of nothing",
}
RECORDED = [
    (
        CANDIDATES,
        {
            **{
                "bleu1": 0.7490254081275821,
                "bleu2": 0.5942313045584707,
                "bleu3": 0.49818438665241443,
                "bleu4": 0.4046618743590138,
            },
            **{
                "rouge_l": 0.5877658887703182,
                "cider": 1.893008812117773,
                "cider_unclipped": 2.1034359680495878,
            },
        },
    ),
    (
        {key: texts[-1] for key, texts in REFERENCES.items()},
        {
            **{
                "bleu1": 0.9999999999444446,
                "bleu2": 0.9999999999416667,
                "bleu3": 0.999999999937963,
                "bleu4": 0.9999999999340278,
            },
            **{"rouge_l": 1.0, "cider": 3.8281295231545798, "cider_unclipped": 3.948074189207142},
        },
    ),
    (
        # An empty caption has in common with an empty reference what both count as, an empty word.
        dict.fromkeys(REFERENCES, "..."),
        {
            "bleu1": 0.0,
            "bleu2": 0.0,
            "bleu3": 0.0,
            "bleu4": 0.0,
            "rouge_l": 1 / 6,
            "cider": 0.0,
            "cider_unclipped": 0.0,
        },
    ),
]


@pytest.mark.parametrize(
    "candidates, expected", RECORDED, ids=["captions", "a reference", "nothing"]
)
def test_equals_the_official_scorer(candidates, expected):
    scores = caption_scores(candidates, REFERENCES)
    assert scores == pytest.approx(expected | {"cider_d": expected["cider"]}, abs=1e-9)


@pytest.mark.parametrize("seed, images", [(0, 1), (1, 2), (2, 9), (3, 9), (4, 30)])
def test_equals_the_slow_one(seed, images):
    draw = random.Random(seed)

    def words():
        return [
            draw.choice(["a", "dog", "runs", "on", "grass", "x-ray"])
            for _ in range(draw.randint(0, 8))
        ]

    texts = {str(image): words() for image in range(images)}
    truths = {key: [words() for _ in range(draw.randint(1, 5))] for key in texts}
    scores = caption_scores(
        {key: " ".join(text) for key, text in reversed(texts.items())},
        {key: [" ".join(text) for text in several] for key, several in truths.items()},
    )
    cider = slow.cider(texts, truths, clipped=True)
    expected = {f"bleu{order}": slow.bleu(texts, truths, order) for order in range(1, 5)}
    expected |= {"rouge_l": slow.rouge_l(texts, truths), "cider": cider, "cider_d": cider}
    assert scores == pytest.approx(
        expected | {"cider_unclipped": slow.cider(texts, truths, clipped=False)}, abs=1e-9
    )


def test_hand_worked():
    references = {"1": ["a dog runs on grass", "the dog"], "2": ["two cats sleep"]}
    scores = caption_scores({"1": "a dog sleeps", "2": "two cats"}, references)
    # 4 of 5 words and 2 of 3 pairs are right; 5 words against the closest lengths, 2 (the shorter of two as close) and 3.
    assert scores["bleu1"] == pytest.approx(4 / 5)
    assert scores["bleu2"] == pytest.approx((4 / 5 * 2 / 3) ** 0.5)
    assert scores["bleu3"] < 1e-4
    # Best precision 2/3 of the one reference and best recall 1/2 of the other; 1 and 2/3.
    f = [2.44 * p * r / (r + 1.44 * p) for p, r in ((2 / 3, 1 / 2), (1, 2 / 3))]
    assert scores["rouge_l"] == pytest.approx(sum(f) / 2)


def test_a_no_break_space_is_two_words_to_some():
    """ "1 1/2" is one token, which the official BLEU and CIDEr split; ROUGE-L does not."""
    scores = caption_scores({"1": "1 1/2 pies"}, {"1": ["1 pies"]})
    assert scores["bleu1"] == pytest.approx(2 / 3)
    assert scores["rouge_l"] == pytest.approx(1 / 2)


def test_repetition_is_what_clipping_is_for():
    references = {"1": ["a red boat"], "2": ["a dog"], "3": ["two men"]}
    once = caption_scores({"1": "a red boat", "2": "", "3": ""}, references)
    often = caption_scores(
        {"1": "red red red red boat boat boat boat", "2": "", "3": ""}, references
    )
    assert (
        often["cider"]
        < often["cider_unclipped"]
        < once["cider"]
        == pytest.approx(once["cider_unclipped"])
    )


def test_faults_are_named():
    references = {"1": ["a dog"], "2": ["a cat"], "3": ["a cow"]}
    for candidates, truths, words in (
        ({"1": "a dog"}, references, r"image 2 has no predicted caption \(2 such\)"),
        (
            {"1": "a", "2": "b", "3": "c", "4": "d"},
            references,
            "image 4 has a predicted caption but no references",
        ),
        (
            {"1": "a", "2": "b", "3": "c"},
            references | {"3": []},
            "image 3 has an empty list of references",
        ),
        ({}, {}, "no captions to score"),
    ):
        for scores in (caption_scores, java_scores):
            with pytest.raises(ValueError, match=words):
                scores(candidates, truths)


def test_java_is_asked_for(monkeypatch):
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: None)
    assert "Java" in java_missing() and java_scores({"1": "a dog"}, {"1": ["a dog"]}) == {}
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(caption_java, "find_spec", lambda name: None)
    assert (
        "pip install pycocoevalcap" in java_missing()
        and java_scores({"1": "a dog"}, {"1": ["a dog"]}) == {}
    )


def test_java_scorers_get_tokens_and_may_fail(monkeypatch):
    """In place of pycocoevalcap a module with its interface; one scorer fails as SPICE does without the network."""

    class Module:
        class Meteor:
            def compute_score(self, truths, results):
                assert results == {"1": ["a dog 's ball"], "2": [""]} and truths == {
                    "1": ["a -lrb- red -rrb- ball", ""],
                    "2": ["a cat"],
                }
                return 0.25, [0.5, 0.0]

        class Spice:
            def __init__(self):
                raise OSError("no models")

    monkeypatch.setattr(caption_java, "java_missing", lambda: "")
    monkeypatch.setattr(caption_java.importlib, "import_module", lambda name: Module)
    with pytest.warns(
        UserWarning, match="spice left out: pycocoevalcap failed with OSError: no models"
    ):
        scores = java_scores(
            {"2": "", "1": "A dog's ball."}, {"1": ["a (red) ball", ""], "2": ["a cat"]}
        )
    assert scores == {"meteor": 0.25}
