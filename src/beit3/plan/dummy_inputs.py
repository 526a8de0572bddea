"""Builds a task and a record of it without data or weights: stand-ins that give the shapes of real
ones.

The record goes through the task's own `example`, so image sizes, text lengths and the number of
masked positions are the recipe's. Its texts are as long as the recipe allows, which no real batch
exceeds; its image shows as much as crowded ones do.
"""

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from beit3.model.config import ModelConfig
from beit3.recipe import RunConfig, TaskConfig
from beit3.task import Example, Task, load_task, task_name
from beit3.tokenizer.efficientnet import EfficientNetLite0
from beit3.tokenizer.teacher_efficientnet import EfficientNetTeacher
from beit3.tokenizer.teacher_vit import CLIP_MEAN_STD, ViTTeacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig
from beit3.tokenizer.vit import ViT
from beit3.training.parallel import build_task

NUM_PIECES = 4096
"""Pieces of every text, before the task truncates it."""
IMAGE_SIZE = 64
"""Side of the square image in pixels; the task resizes it."""
NUM_OBJECTS = 63
"""In the image; the most in one of COCO's for training (arXiv:2005.12872, section 4), 7 on
average."""
MAX_CLASSES = 32
"""In the label map; three times ADE20K's average (Zhou et al., CVPR 2017, section 2)."""
SEED = 1
"""Of the augmentation. With it large-scale jitter enlarges the image, so that the crop fills the
square."""


class DummyTokenizer(TextTokenizer):
    """Makes texts that fill whatever length they are given.

    Args:
        vocab_size: Number of rows of the embedding table.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    @property
    def mask(self) -> int:
        return self._vocab_size - 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode_pieces(self, text: str) -> list[int]:
        return [self.first_piece] * NUM_PIECES


def build_meta_task(task_class: type[Task], config: TaskConfig, run: RunConfig) -> Task:
    """Builds the task on the meta device, not compiled; missing frozen parts are built in their
    usual size."""
    tokenizer = None
    if isinstance(config.model, ModelConfig):
        tokenizer = DummyTokenizer(config.model.vocab_size)
    run = replace(run, compile=False)
    task = build_task(task_class, config, tokenizer, run, torch.device("cpu"))
    for name in task.frozen:
        if getattr(task, name) is None:
            module = make_frozen_module(name, config)
            if module is not None:
                setattr(task, name, module.requires_grad_(False).eval())
    return task


def make_frozen_module(name: str, config: Any) -> nn.Module | None:
    """Returns a frozen part on the meta device, or None where the task makes its own.

    A visual tokenizer has the size of the vqkd recipe with as many codes; a teacher but
    EfficientNet is as large as the encoder.
    """
    with torch.device("meta"):
        if name == "visual_tokenizer":
            return VisualTokenizer(find_tokenizer_config(config.num_codes))
        if name == "teacher" and config.teacher == "efficientnet":
            return EfficientNetTeacher(EfficientNetLite0(), patch_size=config.model.patch_size)
        if name == "teacher" and config.teacher != "gradients":  # which has no weights
            model: VisualTokenizerConfig = config.model
            projection = torch.empty(model.dim, model.teacher_dim)
            return ViTTeacher(
                ViT(model.encoder), projection, mean_std=CLIP_MEAN_STD, patch_size=model.patch_size
            )
    return None


def find_tokenizer_config(num_codes: int) -> VisualTokenizerConfig:
    """Returns the largest config of the vqkd recipes with this number of codes, else the largest of
    all."""
    configs = [
        recipe.task.model
        for recipe in load_task("vqkd").recipes.values()
        if isinstance(recipe.task.model, VisualTokenizerConfig)
    ]
    matching = [config for config in configs if config.num_codes == num_codes]
    return (matching or configs)[-1]


def fill_class_names(config: TaskConfig, processes: int) -> TaskConfig:
    """Returns `config` with numbers as class names, which only records know; each process encodes
    its part of them."""
    if not config.classifies_by_names:
        return config
    num_names = math.ceil(config.num_classes / processes)
    names = tuple(str(index) for index in range(num_names))
    return replace(config, num_classes=num_names, classes=names)  # type: ignore[call-arg]


def make_example(task: Task, source: str) -> Example:
    """Returns the task's example of a record of `source`.

    Raises:
        ValueError: The task reads fields that no task of this package has.
    """
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    num_classes = max(1, task.config.num_classes)
    record: dict[str, Any] = {
        "id": "0",
        "image": image,
        "image2": image,
        "text": "a",
        "answers": {},
        "label": 0,
        "objects": make_objects(),
        "label_map": make_label_map(num_classes),
        "labels": {"num_classes": num_classes},
    }
    if len(task.sources) > 1:
        absent_fields = {"images": "text", "texts": "image"}
        record.pop(absent_fields.get(source, ""), None)
    try:
        return task.example(record, True, rng=np.random.default_rng(SEED))
    except KeyError as error:
        raise ValueError(
            f"task {task_name(type(task))} reads the record field {error}, "
            "for which plan has no dummy value"
        ) from None


def make_objects() -> list[dict[str, Any]]:
    """Returns squares of all sizes around the center of the image, so that any half of it shows a
    part of each."""
    objects = []
    for index in range(1, NUM_OBJECTS + 1):
        width = IMAGE_SIZE * index / NUM_OBJECTS
        low, high = (IMAGE_SIZE - width) / 2, (IMAGE_SIZE + width) / 2
        objects.append(
            {
                "id": index,
                "box": [low, low, width, width],
                "label": 0,
                "area": width**2,
                "crowd": False,
                "segmentation": [[low, low, high, low, high, high, low, high]],
            }
        )
    return objects


def make_label_map(num_classes: int) -> io.BytesIO:
    """Returns a PNG file whose columns have the labels in turn, so that any half of the image shows
    them all."""
    columns = np.arange(IMAGE_SIZE, dtype=np.uint8) % min(num_classes, MAX_CLASSES)
    file = io.BytesIO()
    Image.fromarray(np.tile(columns, (IMAGE_SIZE, 1))).save(file, "PNG")
    return file
