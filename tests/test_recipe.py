"""What a task's config checks and declares."""

from dataclasses import replace
from typing import Any

import pytest

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY
from beit3.recipe import TaskConfig
from beit3.task import list_tasks, load_task


@pytest.mark.parametrize("name", ["pretrain", "captioning", "vqkd"])
def test_image_sizes_must_agree_where_masks_or_counts_follow_the_patch_grid(name):
    config: Any = load_task(name).recipes["demo"].task
    other = replace(config.image, image_size=64)
    with pytest.raises(ValueError, match="image_size 64 and task.model.image_size 32 disagree"):
        replace(config, image=other)


def test_image_sizes_may_differ_where_positions_are_resampled():
    assert TaskConfig(model=TINY, image=Preprocessing(64)).image.image_size == 64


def test_every_recipe_uses_the_image_size_of_its_network_unless_it_is_dense():
    for name in list_tasks():
        if name not in ("coco", "ade20k"):
            for recipe_name, recipe in load_task(name).recipes.items():
                sizes = recipe.task.image.image_size, recipe.task.model.image_size
                assert sizes[0] == sizes[1], f"{name} {recipe_name}: {sizes}"


def test_a_plain_config_declares_no_classes():
    config = TaskConfig()
    assert config.class_names == () and config.num_classes == 0 and not config.head_sizes
    assert not config.classifies_by_names and config.resize_patch is None
    assert config.base_depth == 2
