"""BLEU, ROUGE-L and both CIDEr of captions that are lists of words: the formulas written out, one loop for each sum."""

from math import exp, log, sqrt


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def bleu(texts, truths, order):
    """Corpus BLEU: geometric mean of the clipped precisions, times the brevity penalty; by image id."""
    length = reference_length = 0
    right = [0] * order
    given = [0] * order
    for key, text in texts.items():
        length += len(text)
        distances = sorted((abs(len(words) - len(text)), len(words)) for words in truths[key])
        reference_length += distances[0][1]
        for n in range(1, order + 1):
            found = ngrams(text, n)
            given[n - 1] += len(found)
            for gram in set(found):
                right[n - 1] += min(
                    found.count(gram), max(ngrams(words, n).count(gram) for words in truths[key])
                )
    product = 1.0
    for n in range(order):
        product *= (right[n] + 1e-15) / (given[n] + 1e-9)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return product ** (1 / order) * (exp(1 - 1 / ratio) if ratio < 1 else 1)


def common(left, right):
    """Length of the longest common subsequence, by its definition."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return common(left[:-1], right[:-1]) + 1
    return max(common(left[:-1], right), common(left, right[:-1]))


def rouge_l(texts, truths):
    total = 0.0
    for key, text in texts.items():
        text = text or [""]
        several = [words or [""] for words in truths[key]]
        precision = max(common(text, words) / len(text) for words in several)
        recall = max(common(text, words) / len(words) for words in several)
        if precision > 0:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(texts)


def cider(texts, truths, clipped):
    """Mean over images, references and n of the cosine of the weighted counts, times 10; by image id."""
    total = 0.0
    for n in range(1, 5):
        seen = {
            key: {gram for words in several for gram in ngrams(words, n)}
            for key, several in truths.items()
        }

        def weighted(words, n=n, seen=seen):
            found = ngrams(words, n)
            return {
                g: found.count(g)
                * log(len(truths) / max(1, sum(g in grams for grams in seen.values())))
                for g in found
            }

        for key, text in texts.items():
            for words in truths[key]:
                own, other = weighted(text), weighted(words)
                product = sum(
                    (min(own[g], other[g]) if clipped else own[g]) * other[g]
                    for g in own
                    if g in other
                )
                norm = sqrt(sum(v * v for v in own.values())) * sqrt(
                    sum(v * v for v in other.values())
                )
                score = product / norm if norm else 0.0
                if clipped:
                    score *= exp(
                        -((len(ngrams(text, 2)) - len(ngrams(words, 2))) ** 2) / (2 * 6**2)
                    )
                total += score / len(truths[key])
    return 10 * total / 4 / len(texts)
