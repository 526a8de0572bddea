"""A dummy record is as crowded as real ones can be, in every random crop."""

from dataclasses import replace

import numpy as np
import pytest

from beit3.plan.dummy_inputs import (
    IMAGE_SIZE,
    MAX_CLASSES,
    NUM_OBJECTS,
    build_meta_task,
    make_example,
    make_frozen_module,
    make_label_map,
    make_objects,
)
from beit3.task import load_task
from beit3.tokenizer.teacher_loading import load_teacher


@pytest.mark.parametrize("masks", [True, False])
def test_objects_fill_the_square(masks):
    """With the widest jitter on a small square every object is visible."""
    task_class = load_task("coco")
    recipe = task_class.recipes["base_1024"]
    config = replace(
        recipe.task,
        image=replace(recipe.task.image, image_size=128),
        detector=replace(recipe.task.detector, masks=masks),
    )
    example = make_example(build_meta_task(task_class, config, recipe.run), "main")
    assert example["size"].tolist() == [128, 128]
    assert len(example["boxes"]) == len(example["labels"]) == NUM_OBJECTS
    sides = example["boxes"][:, 2:] - example["boxes"][:, :2]
    assert sides.min() >= 1 and sides.max() == 128
    assert ("masks" in example) == masks
    assert not masks or example["masks"].flatten(1).any(1).all()


def test_any_half_of_the_image_shows_all_objects():
    boxes = np.array([box["box"] for box in make_objects()])
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    assert (starts < IMAGE_SIZE / 2).all() and (ends > IMAGE_SIZE / 2).all()
    assert boxes.max() == IMAGE_SIZE


@pytest.mark.parametrize(("num_classes", "num_shown"), [(150, MAX_CLASSES), (11, 11)])
def test_label_maps_show_all_classes_up_to_a_limit(num_classes, num_shown):
    task_class = load_task("ade20k")
    recipe = task_class.recipes["large_896"]
    view = replace(recipe.task.train_view, crop=128, short=128, long=512)
    config = replace(recipe.task, num_classes=num_classes, train_view=view)
    example = make_example(build_meta_task(task_class, config, recipe.run), "main")
    assert example["size"].tolist() == [128, 128]
    assert len(example["label_map"].unique()) == num_shown


def test_label_maps_are_png_files():
    assert make_label_map(1).getvalue().startswith(b"\x89PNG")


def test_the_stand_in_of_a_teacher_is_as_large_as_the_teacher():
    config = load_task("vqkd").recipes["laptop_efficientnet"].task
    teacher = make_frozen_module("teacher", config)
    real = load_teacher("efficientnet", patch_size=16)
    assert teacher is not None
    shapes = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert all(tensor.is_meta for tensor in teacher.state_dict().values())
