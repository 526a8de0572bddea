"""Reference recall of retrieval: sorts the candidates of one image or text at a time."""

import numpy as np


def compute_recall(images, texts, owner, ks):
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    text_ranks, image_ranks = [], []
    for image in range(len(images)):
        ranked = sorted(range(len(texts)), key=lambda text: (-similarity[image, text], text))
        text_ranks.append(min(rank for rank, text in enumerate(ranked) if owner[text] == image))
    for text in range(len(texts)):
        ranked = sorted(range(len(images)), key=lambda image: (-similarity[image, text], image))
        image_ranks.append(ranked.index(owner[text]))
    scores = {f"text_recall@{k}": np.mean([rank < k for rank in text_ranks]) for k in ks}
    scores |= {f"image_recall@{k}": np.mean([rank < k for rank in image_ranks]) for k in ks}
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}
