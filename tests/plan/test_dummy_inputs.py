"""The record that stands in shows as much as a crowded one, whatever view of it is drawn."""

from dataclasses import replace

import numpy as np
import pytest

from beit3.plan.dummy_inputs import LABELS, OBJECTS, SIDE, built, example, label_map, objects
from beit3.task import load_task


@pytest.mark.parametrize("masks", [True, False])
def test_objects_fill_the_square(masks):
    """The widest jitter, on a small square: the picture is enlarged, and every object seen."""
    recipe = load_task("coco").recipes["base_1024"]
    task = replace(
        recipe.task,
        image=replace(recipe.task.image, image_size=128),
        detector=replace(recipe.task.detector, masks=masks),
    )
    seen = example(built(load_task("coco"), task, recipe.run), "main")
    assert (
        seen["size"].tolist() == [128, 128] and len(seen["boxes"]) == len(seen["labels"]) == OBJECTS
    )
    sides = seen["boxes"][:, 2:] - seen["boxes"][:, :2]
    assert sides.min() >= 1 and sides.max() == 128
    assert ("masks" in seen) == masks and (not masks or seen["masks"].flatten(1).any(1).all())


def test_any_half_of_the_picture_shows_all():
    boxes = np.array([each["box"] for each in objects()])
    assert (
        (boxes[:, :2] < SIDE / 2).all()
        and (boxes[:, :2] + boxes[:, 2:] > SIDE / 2).all()
        and boxes.max() == SIDE
    )


@pytest.mark.parametrize(("num_classes", "shown"), [(150, LABELS), (11, 11)])
def test_labels_fill_the_view(num_classes, shown):
    """Of as many classes as there are, up to a limit."""
    kind = load_task("ade20k")
    recipe = kind.recipes["large_896"]
    view = replace(recipe.task.train_view, crop=128, short=128, long=512)
    seen = example(
        built(kind, replace(recipe.task, num_classes=num_classes, train_view=view), recipe.run),
        "main",
    )
    assert seen["size"].tolist() == [128, 128] and len(seen["label_map"].unique()) == shown
    assert label_map(1).getvalue().startswith(b"\x89PNG")
