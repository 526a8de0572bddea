"""Label maps in records and predictions (JSON).

A record names its label map's file, and under `labels` says what the file's numbers mean. A
prediction holds its label map as a PNG in base64.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from beit3.data.views.label_maps import IGNORE_INDEX, read_pixel_values


def get_label_map_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the numbers of a record's label map mean, as options of `open_label_map`."""
    labels = record["labels"]
    ignored_value = labels.get("ignore", IGNORE_INDEX)
    return {
        "num_classes": labels["num_classes"],
        "reduce_zero": labels.get("reduce_zero", False),
        "unlabeled": () if ignored_value == IGNORE_INDEX else (ignored_value,),
        "lookup": tuple(labels.get("lookup", ())),
    }


def encode_label_map(labels: Tensor) -> str:
    """Encodes labels [H, W] as a PNG in base64, of 8 bits where they fit, else of 16."""
    values = labels.cpu().numpy()
    dtype = np.uint8 if values.max(initial=0) <= 255 else np.uint16
    file = io.BytesIO()
    Image.fromarray(values.astype(dtype)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_label_map(prediction: Mapping[str, Any]) -> np.ndarray:
    """Returns the labels [H, W] int64 of a prediction.

    Raises ValueError naming the prediction where its `map` is no PNG of labels in base64.
    """
    try:
        png = base64.b64decode(str(prediction["map"]), validate=True)
        return read_pixel_values(io.BytesIO(png))
    except ValueError:
        raise ValueError(
            f"the map of prediction {prediction['id']} is no PNG of labels in base64: predict again"
        ) from None
