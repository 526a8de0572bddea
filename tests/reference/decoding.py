"""Caption decoding without a cache and without books: every step encodes image, words and [MASK]
anew, one image at a time.

Beam search as the release describes it: per step the 3 * beams best continuations; the end mark, or
the last length, closes
a sequence with log-probability / length ** penalty, where the length counts the begin mark and the
slot.
"""

import torch
from torch import Tensor

from beit3.model.beit3 import BEiT3


def next_word(
    backbone: BEiT3, head, image: Tensor, words: list[int], bos: int, mask: int
) -> Tensor:
    """Log-probabilities [V] of the word after `words`; image [1, 3, H, W]."""
    text = torch.tensor([[bos, *words, mask]])
    num_image = 1 + backbone.config.num_patches
    total = num_image + text.shape[1]
    may = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            may[query, key] = key < num_image or (query >= num_image and key <= query)
    states = backbone(image, text, attention_mask=may).of("text")
    return head(states[:, -1]).log_softmax(-1)[0]


def greedy(
    backbone, head, image, max_length: int, bos: int, eos: int, mask: int
) -> tuple[list[int], float]:
    words: list[int] = []
    score = 0.0
    while len(words) + 2 < max_length:
        probs = next_word(backbone, head, image, words, bos, mask)
        word = int(probs.argmax())
        score += float(probs[word])
        if word == eos:
            break
        words.append(word)
    return words, score


def beam(
    backbone,
    head,
    image,
    max_length: int,
    num_beams: int,
    penalty: float,
    bos: int,
    eos: int,
    mask: int,
) -> tuple[list[int], float]:
    opened: list[tuple[list[int], float]] = [([], 0.0)]
    best: tuple[list[int], float] | None = None
    for length in range(2, max_length):
        found = []
        for words, log_prob in opened:
            probs = next_word(backbone, head, image, words, bos, mask)
            found += [(log_prob + float(p), words, word) for word, p in enumerate(probs)]
        found = sorted(found, key=lambda each: -each[0])[: 3 * num_beams]
        if best is not None and best[1] >= found[0][0] / (max_length - 1) ** penalty:
            break
        opened = []
        for log_prob, words, word in found:
            if word == eos or length == max_length - 1:
                score = log_prob / (len(words) + 2) ** penalty
                if best is None or score > best[1]:
                    best = (words, score)
            else:
                opened.append(([*words, word], log_prob))
            if len(opened) == num_beams:
                break
        if not opened:
            break
    assert best is not None
    return best
