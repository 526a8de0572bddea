"""Run lengths: cases by hand, round trips of all sizes, polygons, real annotations, errors."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3.data.stores.rle import (
    MAX_COORDINATE,
    RLE,
    compute_area,
    compute_box,
    decode_rle,
    encode_rle,
    encode_window,
    merge_polygons,
    rasterize,
)
from tests.golden import find_fixture

SHAPES = [(1, 1), (1, 40), (40, 1), (7, 9), (64, 48), (0, 3), (3, 0)]


def count_runs(mask: Tensor) -> RLE:
    """Returns the uncompressed RLE of a mask: column by column, zeros first."""
    counts, value = [0], 0
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_masks_survive_a_round_trip(shape, density):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mask = (noise < density).to(torch.uint8)
    for variant in (mask, mask.bool(), mask.T.contiguous().T):
        rle = json.loads(json.dumps(encode_rle(variant)))
        assert rle["size"] == list(shape)
        assert torch.equal(decode_rle(rle), mask)
        assert compute_area(rle) == mask.sum()
    if mask.numel():
        assert torch.equal(rasterize(rle, *shape), mask)
        assert torch.equal(rasterize(count_runs(mask), *shape), mask)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 7, 9),
        (2, 3, 4, 5),
        (6, 8, 1, 1),
        (0, 0, 7, 1),
        (0, 5, 1, 4),
        (3, 4, 0, 0),
        (3, 9, 2, 0),
    ],
)
def test_a_window_is_encoded_as_the_mask_around_it(box, density):
    top, left, rows, columns = box
    window = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < density
    mask = torch.zeros(7, 9, dtype=torch.uint8)
    mask[top : top + rows, left : left + columns] = window
    assert encode_window(window, top, left, height=7, width=9) == encode_rle(mask)


def test_the_box_surrounds_the_pixels():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        height = int(torch.randint(1, 9, (), generator=generator))
        mask = torch.rand(height, 7, generator=generator) < 0.15
        expected = (0, 0, 0, 0)
        if mask.any():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            x2, y2 = int(columns[-1]) + 1, int(rows[-1]) + 1
            expected = int(columns[0]), int(rows[0]), x2, y2
        assert compute_box(encode_rle(mask)) == expected


def test_polygons_are_drawn_and_merged():
    square = [3, 2, 8, 2, 8, 5, 3, 5]
    mask = torch.zeros(7, 9, dtype=torch.uint8)
    mask[2:5, 3:8] = 1
    assert torch.equal(rasterize([square], 7, 9), mask)
    mask[0:1, 0:2] = 1
    polygons = [square, [0, 0, 2, 0, 2, 1, 0, 1], [1, 1, 5, 5], []]
    assert torch.equal(rasterize(polygons, 7, 9), mask), "two points have no area"
    around = [-50, -50, 50, -50, 50, 50, -50, 50]
    ones = torch.ones(7, 9, dtype=torch.uint8)
    assert torch.equal(rasterize([around], 7, 9), ones), "the part outside is cut off"
    for polygons in ([], [[]], [[1, 1, 3, 3]], [[20, 20, 30, 20, 30, 30]]):
        assert not rasterize(polygons, 7, 9).any()
    assert merge_polygons([square], 0, 9)["size"] == [0, 9]


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon"),
        ([[1, 2, 3, float("nan"), 5, 6]], "polygon"),
        ([[1, 2, 3, MAX_COORDINATE + 1, 5, 6]], str(MAX_COORDINATE)),
        ({"size": [9, 7], "counts": "1"}, r"size \[7, 9\]"),
        ({"size": [7, 9]}, "malformed"),
        ({"size": [7, 9], "counts": "zzzz"}, "malformed"),
        ({"size": [7, 9], "counts": [0, 3]}, "7 x 9"),
        ({"size": [7, 9], "counts": [0, 300]}, "malformed"),
        ({"size": [7, 9], "counts": [-3, 66]}, "malformed"),
        ({"size": [7, 9], "counts": None}, "malformed"),
        ("polygon", "neither polygons"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message) as error:
        rasterize(segmentation, 7, 9)
    assert "\n" not in str(error.value)


def test_real_annotations_are_drawn_as_pycocotools_draws_them():
    coco = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools, the reference API, is not installed"
    )
    truth = json.loads((find_fixture("coco_eval") / "instances_val2014_100.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    kinds = set()
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"] and annotation["id"] % 5:
            continue
        segmentation, size = annotation["segmentation"], sizes[annotation["image_id"]]
        rle = coco.frPyObjects(segmentation, *size)
        expected = coco.decode(coco.merge(rle) if isinstance(rle, list) else rle)
        mask = torch.from_numpy(np.ascontiguousarray(expected))
        assert torch.equal(rasterize(segmentation, *size), mask), annotation["id"]
        kinds.add(type(segmentation))
    assert kinds == {list, dict}
