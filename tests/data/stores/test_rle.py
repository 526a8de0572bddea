"""Run lengths: hand-worked cases, round trips at all sizes, polygons, real annotations, and what is refused."""

import json

import numpy as np
import pytest
import torch

from beit3.data.stores.rle import (
    FARTHEST,
    area,
    decode,
    encode,
    encode_window,
    extent,
    rasterise,
    united,
)
from tests.golden import golden

SHAPES = [(1, 1), (1, 40), (40, 1), (7, 9), (64, 48), (0, 3), (3, 0)]


def runs(mask):
    """Plain counts of a mask, column by column, the first of zeros."""
    counts, value = [0], 0
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_round_trips(shape, share):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(torch.uint8)
    for stored in (mask, mask.bool(), mask.T.contiguous().T):
        rle = json.loads(json.dumps(encode(stored)))
        assert (
            rle["size"] == list(shape)
            and torch.equal(decode(rle), mask)
            and area(rle) == mask.sum()
        )
    if mask.numel():
        assert torch.equal(rasterise(rle, *shape), mask) and torch.equal(
            rasterise(runs(mask), *shape), mask
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "place",
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
def test_a_window_is_encoded_as_the_whole(place, share):
    top, left, rows, columns = place
    window = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < share
    mask = torch.zeros(7, 9, dtype=torch.uint8)
    mask[top : top + rows, left : left + columns] = window
    assert encode_window(window, top, left, height=7, width=9) == encode(mask)


def test_extent_is_the_pixels():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        mask = (
            torch.rand(int(torch.randint(1, 9, (), generator=generator)), 7, generator=generator)
            < 0.15
        )
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        wanted = (
            (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            if mask.any()
            else (0, 0, 0, 0)
        )
        assert extent(encode(mask)) == wanted


def test_polygons():
    square = [3, 2, 8, 2, 8, 5, 3, 5]
    mask = torch.zeros(7, 9, dtype=torch.uint8)
    mask[2:5, 3:8] = 1
    assert torch.equal(rasterise([square], 7, 9), mask)
    mask[0:1, 0:2] = 1
    assert torch.equal(
        rasterise([square, [0, 0, 2, 0, 2, 1, 0, 1], [1, 1, 5, 5], []], 7, 9), mask
    ), "united; two points are no area"
    assert torch.equal(
        rasterise([[-50, -50, 50, -50, 50, 50, -50, 50]], 7, 9), torch.ones(7, 9, dtype=torch.uint8)
    ), "cut off"
    for nothing in ([], [[]], [[1, 1, 3, 3]], [[20, 20, 30, 20, 30, 30]]):
        assert not rasterise(nothing, 7, 9).any()
    assert united([square], 0, 9)["size"] == [0, 9]


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon"),
        ([[1, 2, 3, float("nan"), 5, 6]], "polygon"),
        ([[1, 2, 3, FARTHEST + 1, 5, 6]], str(FARTHEST)),
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
def test_malformed(segmentation, words):
    with pytest.raises(ValueError, match=words) as error:
        rasterise(segmentation, 7, 9)
    assert "\n" not in str(error.value)


def test_real_annotations_are_drawn_as_pycocotools_draws_them():
    coco = pytest.importorskip(
        "pycocotools.mask", reason="pycocotools, the official API, is not installed"
    )
    truth = json.loads((golden("coco_eval") / "instances_val2014_100.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    kinds = set()
    for item in truth["annotations"]:
        if item["iscrowd"] or item["id"] % 5 == 0:
            segmentation, size = item["segmentation"], sizes[item["image_id"]]
            drawn = coco.frPyObjects(segmentation, *size)
            wanted = coco.decode(coco.merge(drawn) if isinstance(drawn, list) else drawn)
            assert torch.equal(
                rasterise(segmentation, *size), torch.from_numpy(np.ascontiguousarray(wanted))
            ), item["id"]
            kinds.add(type(segmentation))
    assert kinds == {list, dict}
