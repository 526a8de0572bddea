"""Tests of label maps in records and predictions."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.segmentation.records import decode_label_map, encode_label_map


@pytest.mark.parametrize(
    ("max_label", "mode"), [(3, "L"), (255, "L"), (256, "I;16"), (40_000, "I;16")]
)
def test_label_maps_survive_encoding_in_as_many_bits_as_they_need(max_label, mode):
    labels = torch.randint(0, max_label + 1, (5, 7))
    labels[0, 0] = max_label
    text = encode_label_map(labels)
    assert Image.open(io.BytesIO(base64.b64decode(text))).mode == mode
    assert np.array_equal(decode_label_map({"id": "a", "map": text}), labels.numpy())


@pytest.mark.parametrize("value", ["x", "aGk=", "", {}, None, 3])
def test_maps_that_are_no_png_are_refused(value):
    message = "the map of prediction a is no PNG of labels in base64: predict again"
    with pytest.raises(ValueError, match=message):
        decode_label_map({"id": "a", "map": value})
