"""Recall of retrieval, both ways. Shapes: features of images [I, D] and of texts [T, D] -> shares from 0 to 1.

The similarity is the product of the features as they come: normalise them first. Products are summed in float64 and
rounded to float32, so that equal features tie whatever blocks the sums are taken in.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

VALUES = 2**22
"""Similarities at a time, 16 MB; what is computed from them takes about as much again."""
TEXTS = 1024
"""Texts whose features are turned into float64 at a time, 8 MB where they are 1,024 wide."""


def recall(
    image_features: Array, text_features: Array, owner: Array, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at each of `ks`; `owner` [T] is the index of the image that each text belongs to.

    `text_recall@k`: share of the images with one of their texts among the k most similar texts. `image_recall@k`: share
    of the texts whose image is among the k most similar images. `mean_recall`: the mean of all of these. A tie goes to
    the lower index, right or wrong, as in a stable descending sort.
    ValueError for features that are no numbers, an owner that is no image, and an image without a text.
    """
    images, texts, owner = (
        np.asarray(image_features, np.float32),
        np.asarray(text_features, np.float32),
        np.asarray(owner),
    )
    assert (
        images.ndim == texts.ndim == 2
        and images.shape[1] == texts.shape[1]
        and len(texts) == len(owner)
    ), (images.shape, texts.shape)
    _check(images, texts, owner)
    of_texts, of_images = _places(images, texts, owner)
    scores = {f"text_recall@{k}": float(np.mean(of_texts < k)) for k in ks}
    scores |= {f"image_recall@{k}": float(np.mean(of_images < k)) for k in ks}
    return scores | {"mean_recall": float(np.mean(list(scores.values())))}


def _check(images: Array, texts: Array, owner: Array) -> None:
    for name, features in (("image", images), ("text", texts)):
        if len(broken := np.flatnonzero(~np.isfinite(features).all(axis=1))):
            raise ValueError(
                f"the features of {name} {broken[0]} are not finite ({len(broken)} such): the model diverged"
            )
    if len(strange := np.flatnonzero((owner < 0) | (owner >= len(images)))):
        raise ValueError(
            f"text {strange[0]} belongs to image {owner[strange[0]]}, but there are {len(images)} images: mend the owners"
        )
    if len(alone := np.setdiff1d(np.arange(len(images)), owner)):
        raise ValueError(
            f"image {alone[0]} has no text ({len(alone)} such): leave it out, recall needs both"
        )
    if not len(images):
        raise ValueError("there are no images to retrieve: name a split that has some")


def _places(images: Array, texts: Array, owner: Array) -> tuple[Array, Array]:
    """Places, from 0: of each image's best own text among the texts [I], of each text's image among the images [T]."""
    own = _own_similarity(images, texts, owner)
    # Of an image's texts the most similar leads, of equals the lowest index. Every image has one.
    order = np.lexsort((np.arange(len(texts)), -own, owner))
    best = order[np.unique(owner[order], return_index=True)[1]]
    of_texts, of_images = np.empty(len(images), int), np.zeros(len(texts), int)
    step = max(1, VALUES // len(texts))
    for start in range(0, len(images), step):
        rows = np.arange(start, min(start + step, len(images)))
        similarity = _similarity(images[rows], texts)
        # Sums in another order may differ in a last bit: what belongs together is the same number in every comparison.
        (mine,) = np.nonzero((owner >= start) & (owner < start + step))
        similarity[owner[mine] - start, mine] = own[mine]
        of_texts[rows] = _ahead(
            similarity, own[best[rows], None], np.arange(len(texts)) < best[rows, None]
        ).sum(axis=1)
        of_images += _ahead(similarity, own, rows[:, None] < owner).sum(axis=0)
    return of_texts, of_images


def _ahead(similarity: Array, value: Array, earlier: Array) -> Array:
    """Whether each similarity stands before `value`; `earlier` settles a tie."""
    return (similarity > value) | ((similarity == value) & earlier)


def _own_similarity(images: Array, texts: Array, owner: Array) -> Array:
    """float32 [T]: each text with its image."""
    parts = [slice(start, start + TEXTS) for start in range(0, len(texts), TEXTS)]
    sums = [
        np.einsum(
            "td,td->t", images[owner[part]].astype(np.float64), texts[part].astype(np.float64)
        )
        for part in parts
    ]
    return np.concatenate(sums).astype(np.float32)


def _similarity(images: Array, texts: Array) -> Array:
    """float32 [I, T]."""
    similarity = np.empty((len(images), len(texts)), np.float32)
    wide = images.astype(np.float64)
    for start in range(0, len(texts), TEXTS):
        similarity[:, start : start + TEXTS] = (
            wide @ texts[start : start + TEXTS].astype(np.float64).T
        )
    return similarity
