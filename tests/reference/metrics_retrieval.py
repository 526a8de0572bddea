"""Recall of retrieval by sorting every list: one image, one text at a time."""

import numpy as np


def recall(images, texts, owner, ks):
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    of_images, of_texts = [], []
    for image in range(len(images)):
        ranked = sorted(range(len(texts)), key=lambda text: (-similarity[image, text], text))
        of_texts.append(min(place for place, text in enumerate(ranked) if owner[text] == image))
    for text in range(len(texts)):
        ranked = sorted(range(len(images)), key=lambda image: (-similarity[image, text], image))
        of_images.append(ranked.index(owner[text]))
    scores = {f"text_recall@{k}": sum(place < k for place in of_texts) / len(of_texts) for k in ks}
    scores |= {
        f"image_recall@{k}": sum(place < k for place in of_images) / len(of_images) for k in ks
    }
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}
