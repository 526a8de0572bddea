"""Recall of image-text retrieval in both directions, as fractions from 0 to 1.

The similarity of an image and a text is the dot product of their features, so normalize them first.
Products are summed in float64 and rounded to float32, so that equal features tie however the sums
are split into blocks.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

MAX_SIMILARITIES = 2**22
"""Similarities per block, 16 MB; the comparisons take about as much again."""
TEXTS_PER_BLOCK = 1024
"""Texts whose features are converted to float64 at once, 8 MB for 1,024 dimensions."""


def compute_recall(
    image_features: Array, text_features: Array, owner: Array, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns recall at each k in `ks`.

    A tie goes to the lower index, as in a stable descending sort.

    Args:
        image_features: Features of the images [I, D].
        text_features: Features of the texts [T, D].
        owner: Index of the image that each text belongs to, [T].
        ks: How many of the most similar candidates count.

    Returns:
        `text_recall@k`: fraction of the images with one of their texts among the k most similar
        texts. `image_recall@k`: fraction of the texts whose image is among the k most similar
        images. `mean_recall`: the mean of all of these.

    Raises:
        ValueError: If features are not finite, an owner is not an image, or an image has no text.
    """
    images = np.asarray(image_features, np.float32)
    texts = np.asarray(text_features, np.float32)
    owner = np.asarray(owner)
    shapes = (images.shape, texts.shape)
    assert images.ndim == texts.ndim == 2 and images.shape[1] == texts.shape[1], shapes
    assert len(texts) == len(owner), shapes
    _validate(images, texts, owner)
    text_ranks, image_ranks = _rank(images, texts, owner)
    scores = {f"text_recall@{k}": float(np.mean(text_ranks < k)) for k in ks}
    scores |= {f"image_recall@{k}": float(np.mean(image_ranks < k)) for k in ks}
    return scores | {"mean_recall": float(np.mean(list(scores.values())))}


def _validate(images: Array, texts: Array, owner: Array) -> None:
    for name, features in (("image", images), ("text", texts)):
        invalid = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(invalid):
            raise ValueError(
                f"the features of {name} {invalid[0]} are not finite ({len(invalid)} such): "
                "the model diverged"
            )
    unowned = np.flatnonzero((owner < 0) | (owner >= len(images)))
    if len(unowned):
        raise ValueError(
            f"text {unowned[0]} belongs to image {owner[unowned[0]]}, but there are "
            f"{len(images)} images: correct the owners"
        )
    without_text = np.setdiff1d(np.arange(len(images)), owner)
    if len(without_text):
        raise ValueError(
            f"image {without_text[0]} has no text ({len(without_text)} such): "
            "leave it out, recall needs both"
        )
    if not len(images):
        raise ValueError("there are no images to retrieve: name a split that has some")


def _rank(images: Array, texts: Array, owner: Array) -> tuple[Array, Array]:
    """Returns the ranks, from 0, of each image's best own text [I] and of each text's image [T]."""
    own_similarity = _compute_own_similarity(images, texts, owner)
    # The best text of an image is its most similar one, among equals that of the lowest index.
    order = np.lexsort((np.arange(len(texts)), -own_similarity, owner))
    best_text = order[np.unique(owner[order], return_index=True)[1]]
    text_ranks, image_ranks = np.empty(len(images), int), np.zeros(len(texts), int)
    images_per_block = max(1, MAX_SIMILARITIES // len(texts))
    for start in range(0, len(images), images_per_block):
        rows = np.arange(start, min(start + images_per_block, len(images)))
        similarity = _compute_similarity(images[rows], texts)
        # A sum in another order may differ in the last bit, so matching pairs get the same number
        # in every comparison.
        (own_texts,) = np.nonzero((owner >= start) & (owner < start + images_per_block))
        similarity[owner[own_texts] - start, own_texts] = own_similarity[own_texts]
        best = best_text[rows, None]
        text_is_earlier = np.arange(len(texts)) < best
        text_ranks[rows] = _precedes(similarity, own_similarity[best], text_is_earlier).sum(axis=1)
        image_is_earlier = rows[:, None] < owner
        image_ranks += _precedes(similarity, own_similarity, image_is_earlier).sum(axis=0)
    return text_ranks, image_ranks


def _precedes(similarity: Array, reference: Array, is_earlier: Array) -> Array:
    """Tells which similarities rank before `reference`; `is_earlier` decides a tie."""
    return (similarity > reference) | ((similarity == reference) & is_earlier)


def _compute_own_similarity(images: Array, texts: Array, owner: Array) -> Array:
    """Returns each text's similarity to its own image, float32 [T]."""
    blocks = []
    for start in range(0, len(texts), TEXTS_PER_BLOCK):
        block = slice(start, start + TEXTS_PER_BLOCK)
        own_images = images[owner[block]].astype(np.float64)
        blocks.append(np.einsum("td,td->t", own_images, texts[block].astype(np.float64)))
    return np.concatenate(blocks).astype(np.float32)


def _compute_similarity(images: Array, texts: Array) -> Array:
    """Returns the similarities of all pairs, float32 [I, T]."""
    similarity = np.empty((len(images), len(texts)), np.float32)
    images = images.astype(np.float64)
    for start in range(0, len(texts), TEXTS_PER_BLOCK):
        block = slice(start, start + TEXTS_PER_BLOCK)
        similarity[:, block] = images @ texts[block].astype(np.float64).T
    return similarity
