"""What the tests of detection and segmentation share: small networks, pictures with objects,
pictures with labels."""

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

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIDE = 64
MODEL = replace(
    TINY, dim=32, depth=2, num_heads=2, ffn_dim=48, image_size=SIDE, patch_size=8, final_norm=False
)
LABELS = 4
"""Categories of the records here, and classes."""


def coco_config(**fields: Any) -> CocoConfig:
    """The demo's with a smaller network."""
    demo: Any = Coco.recipes["demo"].task
    detector = replace(demo.detector, pyramid_dim=16, box_dim=32)
    return replace(demo, **{"model": MODEL, "detector": detector, "num_classes": LABELS} | fields)


def ade20k_config(**fields: Any) -> Ade20kConfig:
    """The demo's with a smaller network and half of the interactions."""
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
    return replace(
        demo, **{"model": MODEL, "adapter": adapter, "head": head, "num_classes": LABELS} | fields
    )


CONFIGS = {"coco": coco_config, "ade20k": ade20k_config}


def made(name: str, seed: int = 0, **fields: Any) -> Any:
    """A task at its initial values."""
    task = load_task(name)(CONFIGS[name](**fields))
    task.init_weights(seed)
    return task


def stirred(task: Task) -> Any:
    """The task with noise on every parameter, so that nothing hides behind zeros and maps show
    several classes; in evaluation mode."""
    generator, share = torch.Generator().manual_seed(1), 0.2 if isinstance(task, Ade20k) else 0.05
    for _, parameter in task.trainable_parameters():
        parameter.data += share * torch.randn(parameter.shape, generator=generator)
    return task.eval()


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> str:
    """A picture of noise and its path."""
    values = np.random.default_rng(width * 7 + height).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    grey = values[..., 0]
    Image.fromarray({"RGB": values, "L": grey, "I;16": grey.astype(np.uint16) << 8}[mode]).save(
        path
    )
    return str(path)


def thing(
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    label: int = 0,
    id: int = 1,
    crowd: bool = False,
    outline: bool = True,
) -> dict[str, Any]:
    """An object that fills its box."""
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    made = {"id": id, "box": [x, y, w, h], "label": label, "area": float(w * h), "crowd": crowd}
    return made | ({"segmentation": [polygon]} if outline else {})


def scene(folder: Path, name: str, size: Sequence[int], *objects: dict[str, Any]) -> dict[str, Any]:
    """A record of coco; `size` is width and height."""
    width, height = size
    return {
        "id": name,
        "image": picture(folder / f"{name}.png", width, height),
        "width": width,
        "height": height,
        "objects": list(objects),
    }


def blocks(width: int, height: int, seed: int = 0, labels: int = LABELS) -> np.ndarray:
    """Labels in blocks of 8 pixels."""
    rows, columns = -(-height // 8), -(-width // 8)
    return (
        np.random.default_rng(seed)
        .integers(0, labels, (rows, columns))
        .repeat(8, 0)
        .repeat(8, 1)[:height, :width]
        .astype(np.uint8)
    )


def labelled(
    folder: Path, name: str, labels: np.ndarray, *, palette: bool = False, **meaning: Any
) -> dict[str, Any]:
    """A record of ade20k, its label map as a PNG of the array's type."""
    height, width = labels.shape
    file = Image.fromarray(labels)
    if palette:
        file.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    file.save(folder / f"{name}_labels.png")
    paths = {
        "image": picture(folder / f"{name}.png", width, height),
        "label_map": str(folder / f"{name}_labels.png"),
    }
    return {"id": name, **paths, "labels": {"num_classes": LABELS, **meaning}}


def windows(**fields: Any) -> InferenceConfig:
    """Of 64 pixels, half overlapping, one at a time."""
    return replace(InferenceConfig(SIDE, SIDE // 2, SIDE, 4 * SIDE), **fields)


def square(size: int) -> Preprocessing:
    return replace(coco_config().image, image_size=size)
