"""Scores of captions, as coco-caption (pycocoevalcap) gives them: BLEU, ROUGE-L, CIDEr. Texts by image id -> scores.

Two formulas go by the name of CIDEr. The figure that coco-caption prints as "CIDEr", and papers report, is the one that its
authors' own code (vrama91/cider) calls CIDEr-D: counts are clipped, and a Gaussian of the difference in length (sigma 6)
punishes. So `cider` and `cider_d` are one number here, too. `cider_unclipped` is what vrama91/cider calls CIDEr, the
paper's formula without these two. All three are times 10, with document frequencies from the references that are scored.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log

import numpy as np

from beit3.metrics.caption_text import tokenize_caption

ORDER = 4
"""Longest n-gram of BLEU and CIDEr."""
SMALL, TINY = 1e-9, 1e-15
"""Of the official BLEU, against division by zero: to counts of n-grams, and to counts of those that are right."""
BETA = 1.2
"""Weight of ROUGE-L's recall."""
SIGMA = 6.0
"""Of CIDEr-D's penalty, in words."""

Ngrams = Counter[tuple[str, ...]]


def caption_scores(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Scores of one caption per image against those that people gave; both by image id, as plain text.

    Returns bleu1 to bleu4 and rouge_l (0 to 1), cider, cider_d and cider_unclipped (0 to 10; papers print BLEU, ROUGE-L
    and CIDEr times 100). An empty caption scores 0. ValueError for an id that one side lacks, or without references.
    """
    candidate_tokens, reference_tokens = tokenize_captions(candidates, references)
    texts = [_ngrams(tokens) for tokens in candidate_tokens.values()]
    truths = [[_ngrams(tokens) for tokens in several] for several in reference_tokens.values()]
    cider_d, cider_unclipped = _cider(texts, truths)
    rouges = [_rouge(candidate_tokens[key], reference_tokens[key]) for key in candidate_tokens]
    return {
        **{f"bleu{order}": score for order, score in enumerate(_bleu(texts, truths), start=1)},
        "rouge_l": sum(rouges) / len(rouges),
        "cider": cider_d,
        "cider_d": cider_d,
        "cider_unclipped": cider_unclipped,
    }


def tokenize_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """Tokens of the candidates and of the references, both in the order of the references' ids.

    ValueError where an id has no candidate or no reference, and where there are no ids.
    """
    if missing := sorted(references.keys() - candidates.keys()):
        raise ValueError(
            f"image {missing[0]} has no predicted caption ({len(missing)} such): predict every image that is scored"
        )
    if extra := sorted(candidates.keys() - references.keys()):
        raise ValueError(
            f"image {extra[0]} has a predicted caption but no references ({len(extra)} such): leave it out of the predictions"
        )
    if empty := [key for key, texts in references.items() if not texts]:
        raise ValueError(
            f"image {empty[0]} has an empty list of references ({len(empty)} such): score a split that has captions"
        )
    if not references:
        raise ValueError(
            "no captions to score: the references are empty, name a split that has some"
        )
    return (
        {key: tokenize_caption(candidates[key]) for key in references},
        {key: [tokenize_caption(text) for text in texts] for key, texts in references.items()},
    )


def _ngrams(tokens: Sequence[str]) -> Ngrams:
    """How often each n-gram of up to ORDER words occurs."""
    # The official BLEU and CIDEr split tokens once more, at no-break spaces too; ROUGE-L does not.
    words = " ".join(tokens).split()
    return Counter(
        tuple(words[at : at + order])
        for order in range(1, ORDER + 1)
        for at in range(len(words) - order + 1)
    )


def _total(counts: Ngrams, order: int) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == order)


def _bleu(texts: Sequence[Ngrams], truths: Sequence[Sequence[Ngrams]]) -> list[float]:
    """BLEU of orders 1 to ORDER over the corpus; of the references' lengths the closest counts, the shorter of two."""
    right, given = np.zeros(ORDER), np.zeros(ORDER)
    length = reference_length = 0
    for text, several in zip(texts, truths, strict=True):
        own = _total(text, 1)
        length += own
        reference_length += min(
            (abs(other - own), other) for other in (_total(counts, 1) for counts in several)
        )[1]
        for ngram, count in text.items():
            given[len(ngram) - 1] += count
            right[len(ngram) - 1] += min(count, max(counts[ngram] for counts in several))
    ratio = (length + TINY) / (reference_length + SMALL)
    penalty = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = np.cumprod((right + TINY) / (given + SMALL))
    return [float(precisions[order - 1] ** (1 / order) * penalty) for order in range(1, ORDER + 1)]


def _rouge(text: Sequence[str], several: Sequence[Sequence[str]]) -> float:
    """ROUGE-L: the best precision and the best recall, of whichever references. An empty caption counts as one empty word."""
    text = text or [""]
    common = [(_longest_common(text, words or [""]), len(words) or 1) for words in several]
    precision = max(length for length, _ in common) / len(text)
    recall = max(length / whole for length, whole in common)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = row
        row = [0]
        for at, other in enumerate(right):
            row.append(before[at] + 1 if word == other else max(before[at + 1], row[at]))
    return row[-1]


def _cider(texts: Sequence[Ngrams], truths: Sequence[Sequence[Ngrams]]) -> tuple[float, float]:
    """CIDEr-D and unclipped CIDEr, means over the images."""
    unseen = log(len(texts))
    documents = Counter(ngram for several in truths for ngram in set().union(*several))
    weight = {ngram: unseen - log(count) for ngram, count in documents.items()}
    scores = []
    for text, several in zip(texts, truths, strict=True):
        own = _Vector(text, weight, unseen)
        scores.append(
            np.mean([own.compare(_Vector(counts, weight, unseen)) for counts in several], axis=0)
        )
    clipped, unclipped = np.mean(scores, axis=0)
    return float(clipped), float(unclipped)


class _Vector:
    """Counts of n-grams times their rarity, and the norm of each order."""

    def __init__(self, counts: Ngrams, weight: Mapping[tuple[str, ...], float], unseen: float):
        self.values = {ngram: count * weight.get(ngram, unseen) for ngram, count in counts.items()}
        # The official length is the number of pairs of neighbours.
        self.length = _total(counts, 2)
        squares = np.zeros(ORDER)
        for ngram, value in self.values.items():
            squares[len(ngram) - 1] += value**2
        self.norms = np.sqrt(squares)

    def compare(self, reference: "_Vector") -> tuple[float, float]:
        """(CIDEr-D, unclipped CIDEr) of this vector against one of a reference: 10 times the mean cosine of the orders."""
        products = np.zeros((2, ORDER))
        for ngram, value in self.values.items():
            if other := reference.values.get(ngram):
                products[:, len(ngram) - 1] += min(value, other) * other, value * other
        norms = self.norms * reference.norms
        clipped, unclipped = 10 * (products / np.where(norms > 0, norms, 1.0)).mean(axis=1)
        return float(
            clipped * exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        ), float(unclipped)
