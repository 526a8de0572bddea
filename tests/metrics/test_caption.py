"""BLEU, ROUGE-L and CIDEr against the official scorer, a reference and cases worked by hand.

RECORDED holds the official scores of REFERENCES and three sets of candidates, all written for this
test: pycocoevalcap 1.2, its tokenizer with a line "A zz" after each caption, then Bleu(4), Rouge()
and Cider(). `cider_unclipped` is the same Cider() without the minimum and the Gaussian in its
`sim`, which is the code of vrama91/cider's CIDEr.
"""

import random

import pytest

from beit3.metrics import caption_java
from beit3.metrics.caption import score_captions
from beit3.metrics.caption_java import explain_missing_java, score_captions_with_java
from tests.reference import metrics_caption as reference

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
            "bleu1": 0.7490254081275821,
            "bleu2": 0.5942313045584707,
            "bleu3": 0.49818438665241443,
            "bleu4": 0.4046618743590138,
            "rouge_l": 0.5877658887703182,
            "cider": 1.893008812117773,
            "cider_unclipped": 2.1034359680495878,
        },
    ),
    (
        {key: texts[-1] for key, texts in REFERENCES.items()},
        {
            "bleu1": 0.9999999999444446,
            "bleu2": 0.9999999999416667,
            "bleu3": 0.999999999937963,
            "bleu4": 0.9999999999340278,
            "rouge_l": 1.0,
            "cider": 3.8281295231545798,
            "cider_unclipped": 3.948074189207142,
        },
    ),
    (
        # An empty caption and an empty reference both count as one empty word, which matches.
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
    "candidates, expected", RECORDED, ids=["captions", "references", "empty captions"]
)
def test_scores_equal_the_official_scorer(candidates, expected):
    scores = score_captions(candidates, REFERENCES)
    assert scores == pytest.approx(expected | {"cider_d": expected["cider"]}, abs=1e-9)


@pytest.mark.parametrize("seed, num_images", [(0, 1), (1, 2), (2, 9), (3, 9), (4, 30)])
def test_scores_equal_the_reference(seed, num_images):
    rng = random.Random(seed)

    def make_words():
        vocabulary = ["a", "dog", "runs", "on", "grass", "x-ray"]
        return [rng.choice(vocabulary) for _ in range(rng.randint(0, 8))]

    candidates = {str(image): make_words() for image in range(num_images)}
    references = {key: [make_words() for _ in range(rng.randint(1, 5))] for key in candidates}
    scores = score_captions(
        {key: " ".join(words) for key, words in reversed(candidates.items())},
        {key: [" ".join(words) for words in texts] for key, texts in references.items()},
    )
    expected = {
        f"bleu{order}": reference.compute_bleu(candidates, references, order)
        for order in range(1, 5)
    }
    expected["rouge_l"] = reference.compute_rouge_l(candidates, references)
    cider = reference.compute_cider(candidates, references, clipped=True)
    expected |= {"cider": cider, "cider_d": cider}
    expected["cider_unclipped"] = reference.compute_cider(candidates, references, clipped=False)
    assert scores == pytest.approx(expected, abs=1e-9)


def test_scores_equal_those_by_hand():
    references = {"1": ["a dog runs on grass", "the dog"], "2": ["two cats sleep"]}
    scores = score_captions({"1": "a dog sleeps", "2": "two cats"}, references)
    # 4 of 5 words and 2 of 3 bigrams match. The closest reference lengths sum to 5: 2, the shorter
    # of two equally close ones, and 3.
    assert scores["bleu1"] == pytest.approx(4 / 5)
    assert scores["bleu2"] == pytest.approx((4 / 5 * 2 / 3) ** 0.5)
    assert scores["bleu3"] < 1e-4
    # In image 1 the best precision is 2/3, of the first reference, the best recall 1/2, of the
    # second. In image 2 they are 1 and 2/3.
    f_scores = [2.44 * p * r / (r + 1.44 * p) for p, r in ((2 / 3, 1 / 2), (1, 2 / 3))]
    assert scores["rouge_l"] == pytest.approx(sum(f_scores) / 2)


def test_bleu_splits_at_no_break_spaces_but_rouge_does_not():
    """The token "1 1/2" contains a no-break space, at which the official BLEU and CIDEr split."""
    scores = score_captions({"1": "1 1/2 pies"}, {"1": ["1 pies"]})
    assert scores["bleu1"] == pytest.approx(2 / 3)
    assert scores["rouge_l"] == pytest.approx(1 / 2)


def test_clipping_penalizes_repetition():
    references = {"1": ["a red boat"], "2": ["a dog"], "3": ["two men"]}
    plain = score_captions({"1": "a red boat", "2": "", "3": ""}, references)
    repetition = "red red red red boat boat boat boat"
    repeated = score_captions({"1": repetition, "2": "", "3": ""}, references)
    assert repeated["cider"] < repeated["cider_unclipped"] < plain["cider"]
    assert plain["cider"] == pytest.approx(plain["cider_unclipped"])


def test_invalid_inputs_are_refused():
    references = {"1": ["a dog"], "2": ["a cat"], "3": ["a cow"]}
    for candidates, truths, message in (
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
        for score in (score_captions, score_captions_with_java):
            with pytest.raises(ValueError, match=message):
                score(candidates, truths)


def test_missing_java_is_explained(monkeypatch):
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: None)
    assert "Java" in explain_missing_java()
    assert score_captions_with_java({"1": "a dog"}, {"1": ["a dog"]}) == {}
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(caption_java, "find_spec", lambda name: None)
    assert "pip install pycocoevalcap" in explain_missing_java()
    assert score_captions_with_java({"1": "a dog"}, {"1": ["a dog"]}) == {}


def test_java_scorers_get_tokens_and_may_fail(monkeypatch):
    """A module with pycocoevalcap's interface replaces it.

    One of its scorers fails, as SPICE does without a network connection.
    """

    class Module:
        class Meteor:
            def compute_score(self, references, candidates):
                assert candidates == {"1": ["a dog 's ball"], "2": [""]}
                assert references == {"1": ["a -lrb- red -rrb- ball", ""], "2": ["a cat"]}
                return 0.25, [0.5, 0.0]

        class Spice:
            def __init__(self):
                raise OSError("no models")

    monkeypatch.setattr(caption_java, "explain_missing_java", lambda: "")
    monkeypatch.setattr(caption_java.importlib, "import_module", lambda name: Module)
    with pytest.warns(
        UserWarning, match="spice left out: pycocoevalcap failed with OSError: no models"
    ):
        scores = score_captions_with_java(
            {"2": "", "1": "A dog's ball."}, {"1": ["a (red) ball", ""], "2": ["a cat"]}
        )
    assert scores == {"meteor": 0.25}
