"""Moves most of a val split into training, as the published VQA figures were trained.

Upstream shuffles the val images, holds out 1,000 and trains on the questions about all others.
"""

import random
from collections.abc import Sequence

from beit3.data.prepare.formats.split_names import Record, SplitRecord


def train_on_val(
    questions: Sequence[SplitRecord], num_held_out: int
) -> tuple[list[SplitRecord], frozenset[str]]:
    """Holds out `num_held_out` val images and makes all other val questions training questions.

    All questions about an image stay together. The choice depends on the names of the images alone,
    so it is the same on every machine and each time. Upstream's choice is not known: it used no
    seed.

    Returns:
        The questions with their new splits, in the same order, and the ids of the moved ones.

    Raises:
        ValueError: The val split has no more images than are to be held out.
    """
    names: dict[str, str] = {}
    for split, question in questions:
        if split == "val":
            image = _image_key(question)
            names.setdefault(image, image.rpartition("/")[2])
    if len(names) <= num_held_out:
        raise ValueError(
            f"--val_images {num_held_out}: val has {len(names)} images, so none would be left to "
            "train on; give a smaller number, or leave the option out"
        )
    images = sorted(names, key=lambda image: (names[image], image))
    held_out = set(random.Random(0).sample(images, num_held_out))
    moved_ids: set[str] = set()
    moved: list[SplitRecord] = []
    for split, question in questions:
        if split == "val" and _image_key(question) not in held_out:
            split = "train"
            moved_ids.add(str(question["id"]))
        moved.append((split, question))
    return moved, frozenset(moved_ids)


def _image_key(question: Record) -> str:
    """Returns the image's path with forward slashes, or the id where a question has no image."""
    return str(question.get("image", question["id"])).replace("\\", "/")
