"""Reference BLEU, ROUGE-L and both CIDEr scores of tokenized captions: one loop for each sum."""

from math import exp, log, sqrt


def list_ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def compute_bleu(candidates, references, order):
    """Corpus BLEU by image id: geometric mean of clipped precisions times the brevity penalty."""
    length = reference_length = 0
    num_matching = [0] * order
    num_ngrams = [0] * order
    for key, candidate in candidates.items():
        length += len(candidate)
        distances = sorted(
            (abs(len(words) - len(candidate)), len(words)) for words in references[key]
        )
        reference_length += distances[0][1]
        for n in range(1, order + 1):
            ngrams = list_ngrams(candidate, n)
            num_ngrams[n - 1] += len(ngrams)
            for ngram in set(ngrams):
                most = max(list_ngrams(words, n).count(ngram) for words in references[key])
                num_matching[n - 1] += min(ngrams.count(ngram), most)
    product = 1.0
    for n in range(order):
        product *= (num_matching[n] + 1e-15) / (num_ngrams[n] + 1e-9)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return product ** (1 / order) * (exp(1 - 1 / ratio) if ratio < 1 else 1)


def common_length(left, right):
    """Length of the longest common subsequence, by its recursive definition."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return common_length(left[:-1], right[:-1]) + 1
    return max(common_length(left[:-1], right), common_length(left, right[:-1]))


def compute_rouge_l(candidates, references):
    total = 0.0
    for key, candidate in candidates.items():
        candidate = candidate or [""]
        image_references = [words or [""] for words in references[key]]
        lengths = [common_length(candidate, words) for words in image_references]
        precision = max(lengths) / len(candidate)
        recall = max(
            length / len(words) for length, words in zip(lengths, image_references, strict=True)
        )
        if precision > 0:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(candidates)


def compute_cider(candidates, references, clipped):
    """Mean over images, references and n of the cosine of TF-IDF weighted counts, times 10."""
    total = 0.0
    for n in range(1, 5):
        documents = [
            {ngram for words in image_references for ngram in list_ngrams(words, n)}
            for image_references in references.values()
        ]

        def weigh(words, n=n, documents=documents):
            ngrams = list_ngrams(words, n)
            weights = {}
            for ngram in ngrams:
                frequency = sum(ngram in document for document in documents)
                rarity = log(len(documents) / max(1, frequency))
                weights[ngram] = ngrams.count(ngram) * rarity
            return weights

        for key, candidate in candidates.items():
            for words in references[key]:
                score = compare(weigh(candidate), weigh(words), clipped)
                if clipped:
                    difference = len(list_ngrams(candidate, 2)) - len(list_ngrams(words, 2))
                    score *= exp(-(difference**2) / (2 * 6**2))
                total += score / len(references[key])
    return 10 * total / 4 / len(candidates)


def compare(left, right, clipped):
    """Cosine of two weighted counts; with `clipped` the left count is at most the right one."""
    product = sum(
        (min(left[ngram], right[ngram]) if clipped else left[ngram]) * right[ngram]
        for ngram in left
        if ngram in right
    )
    norm = sqrt(sum(v * v for v in left.values())) * sqrt(sum(v * v for v in right.values()))
    return product / norm if norm else 0.0
