"""Predictions drawn onto their image: objects of detection, label maps of segmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from beit3.files import atomic_write
from beit3.images import open_image
from beit3.report.label_map_drawing import add_legend, draw_label_map, measure_classes
from beit3.report.object_drawing import draw_objects
from beit3.segmentation.records import decode_label_map
from beit3.task import Prediction

if TYPE_CHECKING:
    from beit3.predict import Predictor

FILE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File extension -> format of a drawing."""

QUALITY = 92
"""Quality of formats with loss, 0 to 100."""

MIN_SCORE = 0.3
"""Objects with a lower score are not drawn by default."""


def predict_and_draw(
    predictor: "Predictor",
    inputs: Sequence[Any],
    out: str | Path,
    *,
    min_score: float | None = None,
) -> list[Prediction]:
    """Predicts, draws the prediction onto the image `inputs[0]`, and writes it to the file `out`.

    Args:
        predictor: Weights of `coco` or `ade20k`.
        inputs: What the predictor takes; the first is the image.
        out: File of the drawing; its extension says the format.
        min_score: Lowest score of the objects that are drawn and returned; `MIN_SCORE` by default.

    Returns:
        The prediction in short: objects without their masks, or the classes of a label map with
        their share of the image.

    Raises:
        ValueError: `out` is empty, is the image itself, or has no extension of an image; or the
            prediction has neither objects nor a label map.
    """
    if not out:
        raise ValueError("--min-score selects the objects that are drawn: give --out too")
    out = Path(out)
    _check_out_file(out, inputs[0])  # before anything that takes time
    first, *others = inputs
    if hasattr(first, "read"):  # a file can be read once
        first = first.read()
    predictions = predictor(first, *others)
    image = open_image(first).permute(1, 2, 0).numpy()
    drawing, summary = draw_prediction(
        image,
        predictions[0] if len(predictions) == 1 else {},
        predictor.task.class_names,
        min_score=MIN_SCORE if min_score is None else min_score,
    )
    with atomic_write(out) as file:
        drawing.save(file, FILE_FORMATS[out.suffix.lower()], quality=QUALITY)
    return [summary]


def draw_prediction(
    image: np.ndarray, prediction: Prediction, class_names: Sequence[str], *, min_score: float
) -> tuple[Image.Image, Prediction]:
    """Draws a prediction onto an image [H, W, 3] uint8; returns the drawing and a summary.

    The summary has objects without their masks, or the classes of a label map with their share of
    the image. `class_names` are those of a label map; objects carry their own names.
    """
    summary = {key: prediction[key] for key in ("id", "height", "width") if key in prediction}
    if "objects" in prediction:
        objects = [item for item in prediction["objects"] if item["score"] >= min_score]
        without_masks = [
            {key: value for key, value in item.items() if key != "mask"} for item in objects
        ]
        return draw_objects(image, objects), summary | {"objects": without_masks}
    if "map" in prediction:
        labels = decode_label_map(prediction)
        classes = measure_classes(labels, class_names)
        drawing = add_legend(draw_label_map(image, labels), classes)
        return drawing, summary | {"classes": classes}
    raise ValueError(
        "these weights predict neither objects nor a label map, so there is nothing to draw: leave "
        "--out and --min-score out"
    )


def _check_out_file(out: Path, image: Any) -> None:
    """Raises ValueError where `out` has no extension of an image or is the predicted image."""
    if out.suffix.lower() not in FILE_FORMATS:
        raise ValueError(
            f"--out {out} does not have the extension of an image: give one of "
            f"{', '.join(FILE_FORMATS)}"
        )
    is_file = isinstance(image, str | Path) and Path(image).exists()
    if is_file and out.exists() and out.samefile(image):
        raise ValueError(f"--out {out} is the image itself: give another name")
