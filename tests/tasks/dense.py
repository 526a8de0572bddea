"""Small networks, images with objects and images with label maps, for the tests of detection and
segmentation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY
from beit3.segmentation.inference import InferenceConfig
from beit3.task import Task, load_task
from beit3.tasks.ade20k import Ade20k, Ade20kConfig
from beit3.tasks.coco import Coco, CocoConfig

DATA_DIR = Path(__file__).resolve().parents[3] / "shared" / "data"
SIDE = 64
MODEL = replace(
    TINY, dim=32, depth=2, num_heads=2, ffn_dim=48, image_size=SIDE, patch_size=8, final_norm=False
)
NUM_CLASSES = 4
"""Number of categories or classes in the records here."""


def coco_config(**fields: Any) -> CocoConfig:
    """The config of the demo recipe with a smaller network."""
    demo: Any = Coco.recipes["demo"].task
    detector = replace(demo.detector, pyramid_dim=16, box_dim=32)
    small = {"model": MODEL, "detector": detector, "num_classes": NUM_CLASSES}
    return replace(demo, **small | fields)


def ade20k_config(**fields: Any) -> Ade20kConfig:
    """The config of the demo recipe with a smaller network and half of the interactions."""
    demo: Any = Ade20k.recipes["demo"].task
    adapter = replace(demo.adapter, inplanes=8, num_interactions=2, num_extra_extractors=1)
    head = replace(
        demo.head,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn=32,
        decoder_ffn=32,
        num_points=64,
    )
    small = {"model": MODEL, "adapter": adapter, "head": head, "num_classes": NUM_CLASSES}
    return replace(demo, **small | fields)


CONFIGS = {"coco": coco_config, "ade20k": ade20k_config}


def make_task(name: str, seed: int = 0, **fields: Any) -> Any:
    """A task with its initial weights."""
    task = load_task(name)(CONFIGS[name](**fields))
    task.init_weights(seed)
    return task


def add_noise(task: Task) -> Any:
    """The task in evaluation mode with noise added to every parameter.

    Then no parameter is without effect because others are zero, and maps have several classes.
    """
    generator = torch.Generator().manual_seed(1)
    std = 0.2 if isinstance(task, Ade20k) else 0.05
    for _, parameter in task.trainable_parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return task.eval()


def write_image(path: Path, width: int, height: int, mode: str = "RGB") -> str:
    """Writes an image of noise and returns its path."""
    rng = np.random.default_rng(width * 7 + height)
    rgb = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    gray = rgb[..., 0]
    pixels = {"RGB": rgb, "L": gray, "I;16": gray.astype(np.uint16) << 8}[mode]
    Image.fromarray(pixels).save(path)
    return str(path)


def make_object(
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    label: int = 0,
    id: int = 1,
    crowd: bool = False,
    with_polygon: bool = True,
) -> dict[str, Any]:
    """An object whose polygon is its box."""
    item = {"id": id, "box": [x, y, w, h], "label": label, "area": float(w * h), "crowd": crowd}
    if with_polygon:
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return item


def make_record(
    folder: Path, name: str, size: Sequence[int], *objects: dict[str, Any]
) -> dict[str, Any]:
    """A record of coco with an image of `size` (width, height)."""
    width, height = size
    return {
        "id": name,
        "image": write_image(folder / f"{name}.png", width, height),
        "width": width,
        "height": height,
        "objects": list(objects),
    }


def make_label_blocks(
    width: int, height: int, seed: int = 0, num_classes: int = NUM_CLASSES
) -> np.ndarray:
    """A label map uint8 [height, width] of random blocks of 8 x 8 pixels."""
    rows, columns = -(-height // 8), -(-width // 8)
    blocks = np.random.default_rng(seed).integers(0, num_classes, (rows, columns))
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)


def make_labeled_record(
    folder: Path, name: str, labels: np.ndarray, *, palette: bool = False, **options: Any
) -> dict[str, Any]:
    """A record of ade20k whose label map is a PNG of the array's type."""
    height, width = labels.shape
    label_map = Image.fromarray(labels)
    if palette:
        label_map.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    label_map.save(folder / f"{name}_labels.png")
    return {
        "id": name,
        "image": write_image(folder / f"{name}.png", width, height),
        "label_map": str(folder / f"{name}_labels.png"),
        "labels": {"num_classes": NUM_CLASSES, **options},
    }


def make_inference_config(**fields: Any) -> InferenceConfig:
    """Windows of 64 px that overlap by half, one at a time."""
    return replace(InferenceConfig(SIDE, SIDE // 2, SIDE, 4 * SIDE), **fields)


def make_preprocessing(size: int) -> Preprocessing:
    return replace(coco_config().image, image_size=size)
