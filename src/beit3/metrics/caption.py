"""Caption scores as coco-caption (pycocoevalcap) computes them: BLEU, ROUGE-L and CIDEr.

Two formulas are called CIDEr. The number that coco-caption prints as "CIDEr", and that papers
report, is what the authors' own code (vrama91/cider) calls CIDEr-D: counts are clipped, and a
Gaussian of the difference in length (sigma 6) is a penalty. So `cider` and `cider_d` are the same
number here. `cider_unclipped` is what vrama91/cider calls CIDEr, the paper's formula without these
two. All three are multiplied by 10 and take document frequencies from the scored references.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log

import numpy as np

from beit3.metrics.caption_text import tokenize_caption

MAX_ORDER = 4
"""Longest n-gram of BLEU and CIDEr."""
NGRAM_EPSILON, MATCH_EPSILON = 1e-9, 1e-15
"""What the official BLEU adds to counts of n-grams and of matches, against division by zero."""
ROUGE_BETA = 1.2
"""Weight of recall in ROUGE-L."""
CIDER_SIGMA = 6.0
"""Width of CIDEr-D's length penalty, in words."""

NgramCounts = Counter[tuple[str, ...]]


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Scores one caption per image against the reference captions.

    Args:
        candidates: Image id to predicted caption, plain text. An empty caption scores 0.
        references: Image id to reference captions, plain text.

    Returns:
        `bleu1` to `bleu4` and `rouge_l`, 0 to 1; `cider`, `cider_d` and `cider_unclipped`, 0 to 10.
        Papers print BLEU, ROUGE-L and CIDEr times 100.

    Raises:
        ValueError: If the ids differ, an image has no reference, or there are no images.
    """
    candidate_tokens, reference_tokens = tokenize_captions(candidates, references)
    candidate_ngrams = [_count_ngrams(tokens) for tokens in candidate_tokens.values()]
    reference_ngrams = [
        [_count_ngrams(tokens) for tokens in token_lists]
        for token_lists in reference_tokens.values()
    ]
    bleu = _compute_bleu(candidate_ngrams, reference_ngrams)
    rouge = [_compute_rouge(candidate_tokens[key], reference_tokens[key]) for key in references]
    cider_d, cider_unclipped = _compute_cider(candidate_ngrams, reference_ngrams)
    return {
        **{f"bleu{order}": score for order, score in enumerate(bleu, start=1)},
        "rouge_l": sum(rouge) / len(rouge),
        "cider": cider_d,
        "cider_d": cider_d,
        "cider_unclipped": cider_unclipped,
    }


def tokenize_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """Tokenizes candidates and references; both results are in the order of the references' ids.

    Raises ValueError if an id has no candidate or no reference, or if there are no ids.
    """
    missing = sorted(references.keys() - candidates.keys())
    if missing:
        raise ValueError(
            f"image {missing[0]} has no predicted caption ({len(missing)} such): "
            "predict every image that is scored"
        )
    extra = sorted(candidates.keys() - references.keys())
    if extra:
        raise ValueError(
            f"image {extra[0]} has a predicted caption but no references ({len(extra)} such): "
            "leave it out of the predictions"
        )
    without_references = [key for key, texts in references.items() if not texts]
    if without_references:
        raise ValueError(
            f"image {without_references[0]} has an empty list of references "
            f"({len(without_references)} such): score a split that has captions"
        )
    if not references:
        raise ValueError(
            "no captions to score: the references are empty, name a split that has some"
        )
    candidate_tokens = {key: tokenize_caption(candidates[key]) for key in references}
    reference_tokens = {
        key: [tokenize_caption(text) for text in texts] for key, texts in references.items()
    }
    return candidate_tokens, reference_tokens


def _count_ngrams(tokens: Sequence[str]) -> NgramCounts:
    """Counts the n-grams of 1 to MAX_ORDER words."""
    # The official BLEU and CIDEr split tokens again at no-break spaces; ROUGE-L does not.
    words = " ".join(tokens).split()
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _sum_counts(counts: NgramCounts, order: int) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == order)


# BLEU


def _compute_bleu(
    candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]
) -> list[float]:
    """Returns corpus BLEU of orders 1 to MAX_ORDER.

    The brevity penalty takes the reference whose length is closest, of two equally close ones the
    shorter.
    """
    num_matching, num_ngrams = np.zeros(MAX_ORDER), np.zeros(MAX_ORDER)
    length = reference_length = 0
    for candidate, image_references in zip(candidates, references, strict=True):
        num_words = _sum_counts(candidate, 1)
        length += num_words
        reference_lengths = [_sum_counts(counts, 1) for counts in image_references]
        reference_length += min((abs(n - num_words), n) for n in reference_lengths)[1]
        for ngram, count in candidate.items():
            num_ngrams[len(ngram) - 1] += count
            max_count = max(counts[ngram] for counts in image_references)
            num_matching[len(ngram) - 1] += min(count, max_count)
    ratio = (length + MATCH_EPSILON) / (reference_length + NGRAM_EPSILON)
    penalty = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    products = np.cumprod((num_matching + MATCH_EPSILON) / (num_ngrams + NGRAM_EPSILON))
    return [float(product ** (1 / n) * penalty) for n, product in enumerate(products, start=1)]


# ROUGE-L


def _compute_rouge(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns ROUGE-L of one image.

    Precision and recall are the best over all references, not necessarily the same one. An empty
    caption counts as one empty word.
    """
    candidate = candidate or [""]
    common = [(_common_length(candidate, words or [""]), len(words) or 1) for words in references]
    precision = max(length for length, _ in common) / len(candidate)
    recall = max(length / num_words for length, num_words in common)
    if not precision:
        return 0.0
    beta_squared = ROUGE_BETA**2
    return (1 + beta_squared) * precision * recall / (recall + beta_squared * precision)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for left_word in left:
        previous_row, row = row, [0]
        for index, right_word in enumerate(right):
            if left_word == right_word:
                row.append(previous_row[index] + 1)
            else:
                row.append(max(previous_row[index + 1], row[index]))
    return row[-1]


# CIDEr


def _compute_cider(
    candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]
) -> tuple[float, float]:
    """Returns CIDEr-D and unclipped CIDEr, both averaged over the images."""
    max_weight = log(len(candidates))
    document_counts = Counter(
        ngram for image_references in references for ngram in set().union(*image_references)
    )
    weights = {ngram: max_weight - log(count) for ngram, count in document_counts.items()}
    scores = []
    for candidate, image_references in zip(candidates, references, strict=True):
        vector = _TfIdfVector(candidate, weights, max_weight)
        comparisons = [
            vector.compare(_TfIdfVector(counts, weights, max_weight)) for counts in image_references
        ]
        scores.append(np.mean(comparisons, axis=0))
    cider_d, cider_unclipped = np.mean(scores, axis=0)
    return float(cider_d), float(cider_unclipped)


class _TfIdfVector:
    """N-gram counts of one caption, weighted by their rarity, and the norm of each order."""

    def __init__(
        self, counts: NgramCounts, weights: Mapping[tuple[str, ...], float], default_weight: float
    ):
        self.values = {
            ngram: count * weights.get(ngram, default_weight) for ngram, count in counts.items()
        }
        # The official code takes the number of bigrams as the length.
        self.length = _sum_counts(counts, 2)
        squares = np.zeros(MAX_ORDER)
        for ngram, value in self.values.items():
            squares[len(ngram) - 1] += value**2
        self.norms = np.sqrt(squares)

    def compare(self, reference: "_TfIdfVector") -> tuple[float, float]:
        """Returns (CIDEr-D, unclipped CIDEr): 10 times the mean cosine over the orders."""
        products = np.zeros((2, MAX_ORDER))
        for ngram, value in self.values.items():
            reference_value = reference.values.get(ngram)
            if reference_value:
                clipped_product = min(value, reference_value) * reference_value
                products[:, len(ngram) - 1] += clipped_product, value * reference_value
        norms = self.norms * reference.norms
        clipped, unclipped = 10 * (products / np.where(norms > 0, norms, 1.0)).mean(axis=1)
        penalty = exp(-((self.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2))
        return float(clipped * penalty), float(unclipped)
