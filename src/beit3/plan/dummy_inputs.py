"""A task and a record of it where neither data nor weights are at hand: stand-ins that make the shapes of real ones.

The record goes through the task's own `example`, so image sizes, text lengths and the share of hidden positions are the
recipe's. Its texts are as long as the recipe allows, which no real batch exceeds; its picture shows as much as crowded ones.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from beit3.recipe import RunConfig, TaskConfig
from beit3.task import Example, Task, load_task, task_name
from beit3.tokenizer.teacher import CLIP_PIXELS, ViTTeacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer
from beit3.tokenizer.vit import ViT
from beit3.training.parallel import build

LONGEST = 4096
"""Pieces of every text, before the task cuts it."""
SIDE = 64
"""Pixels of the picture; the task resizes it."""
OBJECTS = 63
"""In the picture; the most in one of COCO's for training (arXiv:2005.12872, section 4), 7 on average."""
LABELS = 32
"""At most, in its label map; three times ADE20K's average (Zhou et al., CVPR 2017, section 2)."""
SEED = 1
"""Of the chances of `example`. With it large-scale jitter enlarges the picture, so that the view fills the square."""


class FullTexts(TextTokenizer):
    """Texts that fill whatever length they are given. vocab_size: rows of the table that they are looked up in."""

    def __init__(self, vocab_size: int):
        self.size = vocab_size

    @property
    def mask(self) -> int:
        return self.size - 1

    @property
    def vocab_size(self) -> int:
        return self.size

    def pieces(self, text: str) -> list[int]:
        return [self.first_piece] * LONGEST


def built(kind: type[Task], config: TaskConfig, run: RunConfig) -> Task:
    """The task on meta, not compiled; frozen parts that are not there are replaced by those of the usual size."""
    tokenizer = FullTexts(config.model.vocab_size) if hasattr(config.model, "vocab_size") else None
    task = build(kind, config, tokenizer, replace(run, compile=False), torch.device("cpu"))
    for name in task.frozen:
        if getattr(task, name) is None and (part := frozen_part(name, config)) is not None:
            setattr(task, name, part.requires_grad_(False).eval())
    return task


def frozen_part(name: str, config: Any) -> nn.Module | None:
    """A visual tokenizer as a recipe of vqkd with as many codes has it, or a teacher as large as the encoder; on meta."""
    with torch.device("meta"):
        if name == "visual_tokenizer":
            sizes = [recipe.task.model for recipe in load_task("vqkd").recipes.values()]
            fitting = [size for size in sizes if getattr(size, "num_codes", 0) == config.num_codes]
            return VisualTokenizer((fitting or sizes)[-1])  # type: ignore[arg-type]
        if (
            name == "teacher" and config.teacher != "gradients"
        ):  # that one has no weights, and is made when it is asked
            projection = torch.empty(config.model.dim, config.model.teacher_dim)
            return ViTTeacher(
                ViT(config.model.encoder),
                projection,
                pixels=CLIP_PIXELS,
                patch_size=config.model.patch_size,
            )
    return None


def named(config: TaskConfig, processes: int) -> TaskConfig:
    """`config` with numbers for the class names that only records know; a process encodes its share of them."""
    if getattr(config, "head", "") != "names":
        return config
    share = -(-getattr(config, "num_classes", 1) // processes)
    return replace(config, num_classes=share, classes=tuple(map(str, range(share))))  # type: ignore[call-arg]


def example(task: Task, source: str) -> Example:
    """What the task makes of a record of `source`. ValueError for a task that reads other fields than those of this package."""
    absent = {"images": "text", "texts": "image"}.get(source, "") if len(task.sources) > 1 else ""
    picture, classes = Image.new("RGB", (SIDE, SIDE)), getattr(task.config, "num_classes", 1)
    record = {
        "id": "0",
        "image": picture,
        "image2": picture,
        "text": "a",
        "answers": {},
        "label": 0,
    }
    record |= {
        "objects": list(objects()),
        "label_map": label_map(classes),
        "labels": {"num_classes": classes},
    }
    record.pop(absent, None)
    try:
        return task.example(record, True, rng=np.random.default_rng(SEED))
    except KeyError as field:
        raise ValueError(
            f"task {task_name(type(task))} reads the field {field} of a record, for which plan has no stand-in"
        ) from None


def objects() -> Iterator[dict[str, Any]]:
    """Squares of all sizes around the middle of the picture, so that any half of it shows a part of each."""
    for key in range(1, OBJECTS + 1):
        width = SIDE * key / OBJECTS
        near, far = (SIDE - width) / 2, (SIDE + width) / 2
        outline = [near, near, far, near, far, far, near, far]
        yield {
            "id": key,
            "box": [near, near, width, width],
            "label": 0,
            "area": width**2,
            "crowd": False,
            "segmentation": [outline],
        }


def label_map(num_classes: int) -> io.BytesIO:
    """A file of columns that have the labels by turns, so that any half of the picture shows them all."""
    columns = np.arange(SIDE, dtype=np.uint8) % min(num_classes, LABELS)
    file = io.BytesIO()
    Image.fromarray(np.tile(columns, (SIDE, 1))).save(file, "PNG")
    return file
