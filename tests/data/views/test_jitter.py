"""Jitter: bounds and seeds, masks against drawing everything and cropping, pixels that go with their masks, and odd inputs."""

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from beit3.data.stores.rle import encode, rasterise
from beit3.data.views import jitter
from beit3.data.views.jitter import MIN_SIDE, Objects, View, large_scale_jitter, pad_square
from beit3.seeding import make_rng


def box_polygon(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def objects(*boxes, segmentations=None):
    return Objects(torch.tensor(boxes).float().view(-1, 4), torch.arange(len(boxes)), segmentations)


def whole(height, width):
    return View((height, width), (height, width), (0, 0), (height, width))


def blank(height, width):
    return torch.zeros(3, height, width, dtype=torch.uint8)


# The draw ------------------------------------------------------------------------------------------------------------


def test_the_draw_covers_its_ranges(monkeypatch):
    """Sides of up to `size`, factors within `scale`, both mirrorings, corners anywhere and apart for each axis."""
    views = []
    monkeypatch.setattr(View, "image", lambda view, image: views.append(view) or image)
    for seed in range(400):
        large_scale_jitter(blank(60, 80), objects(), make_rng(seed, 0, 0), size=100)
    factors = np.array([max(view.scaled) / 100 for view in views])
    assert (
        0.1 <= factors.min() < 0.15
        and 1.95 < factors.max() <= 2.0
        and abs(factors.mean() - 1.05) < 0.1
    )
    assert 0.4 < np.mean([view.mirrored for view in views]) < 0.6
    for view in views:
        assert abs(view.scaled[0] / 60 - view.scaled[1] / 80) < 0.5 / 60 + 0.5 / 80
        assert view.shape == tuple(min(side, 100) for side in view.scaled)
        assert all(
            0 <= corner <= side - kept
            for corner, side, kept in zip(view.corner, view.scaled, view.shape, strict=True)
        )
    places = np.array(
        [
            [corner / (side - 100) for corner, side in zip(view.corner, view.scaled, strict=True)]
            for view in views
            if min(view.scaled) > 110
        ]
    )
    assert len(places) > 50 and places.min() < 0.05 and places.max() > 0.95
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.3


def test_seeds_and_rates():
    image = torch.arange(3 * 40 * 50).remainder(251).to(torch.uint8).view(3, 40, 50)
    shown = objects([4, 4, 30, 30], segmentations=[[box_polygon(4, 4, 30, 30)]])
    first, second = (large_scale_jitter(image, shown, make_rng(7, 0, 0), size=48) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1].masks, second[1].masks)
    plain, seen = large_scale_jitter(
        image, shown, make_rng(0, 0, 0), size=50, scale=(1.0, 1.0), flip=0.0
    )
    assert (
        torch.equal(plain, image)
        and seen.boxes.tolist() == [[4, 4, 30, 30]]
        and seen.labels.tolist() == [0]
    )
    mirrored, seen = large_scale_jitter(
        image, shown, make_rng(0, 0, 0), size=50, scale=(1.0, 1.0), flip=1.0
    )
    assert torch.equal(mirrored, image.flip(-1)) and seen.boxes.tolist() == [[20, 4, 46, 30]]


# Masks and boxes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", ["polygon", "rle", "box"])
def test_objects_go_with_their_pixels(seed, form):
    """Each object is painted into a channel of its own; where the view shows that colour, the mask and the box are."""
    places = [[10, 8, 40, 30], [50, 20, 74, 56], [5, 38, 30, 56]]
    image = blank(60, 80)
    for channel, (x1, y1, x2, y2) in zip(image, places, strict=True):
        channel[y1:y2, x1:x2] = 255
    segmentations = {
        "polygon": [[box_polygon(*place)] for place in places],
        "rle": [encode(channel > 0) for channel in image],
        "box": None,
    }[form]
    view, seen = large_scale_jitter(
        image,
        objects(*places, segmentations=segmentations),
        make_rng(seed, 0, 0),
        size=64,
        scale=(0.8, 2.0),
    )
    assert (
        seen.boxes.dtype == torch.float32
        and seen.labels.dtype == torch.int64
        and (seen.masks is None) == (form == "box")
    )
    for row, label in enumerate(seen.labels.tolist()):
        painted = view[label] > 127
        outside = torch.tensor([0, 0, *view.shape[:0:-1]])
        assert (seen.boxes[row, :2] >= 0).all() and (seen.boxes[row, 2:] <= outside[2:]).all()
        if painted.any():
            assert (
                seen.boxes[row] - masks_to_boxes(painted[None])[0] - torch.tensor([0, 0, 1, 1])
            ).abs().max() <= 1
        if seen.masks is not None:
            missed = painted != seen.masks[row].bool()
            assert missed.sum() <= painted.shape[0] + painted.shape[1], (
                "at most a line of pixels along the edges"
            )
    assert all(
        (view[label] > 127).sum() <= 64 for label in set(range(3)) - set(seen.labels.tolist())
    )


@pytest.mark.parametrize("mirrored", [False, True])
def test_masks_equal_drawing_all_and_cropping(mirrored):
    generator = np.random.default_rng(0)
    polygons = [[list(map(float, generator.uniform(0, 60, 2 * n)))] for n in (3, 4, 5, 6, 8, 11)]
    polygons[0].append(box_polygon(50, 50, 58, 59))
    full = View((60, 60), (150, 140), (0, 0), (150, 140), mirrored)
    part = View((60, 60), (150, 140), (31, 42), (64, 70), mirrored)
    shown = objects(*[[0, 0, 60, 60]] * 6, segmentations=polygons)
    wanted = full.objects(shown).masks[:, 31:95, 42:112]
    found = part.objects(shown)
    assert len(found.masks) == 6
    # Corners before the window are rounded to fifths of a pixel the other way: pixels along an edge may differ.
    assert (found.masks != wanted).float().mean() < 0.002
    assert torch.equal(found.boxes, masks_to_boxes(found.masks) + torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_rle_and_polygons_agree(mirrored):
    """At a whole factor and on whole pixels nothing is rounded."""
    polygon = [box_polygon(10, 5, 33, 21), box_polygon(40, 30, 41, 31)]
    drawn = rasterise(polygon, 36, 48)
    view = View((36, 48), (72, 96), (8, 15), (55, 60), mirrored)
    runs = {"size": [36, 48], "counts": [0, 36 * 48]}
    found = view.objects(
        objects(*[[0, 0, 48, 36]] * 3, segmentations=[polygon, encode(drawn), runs])
    )
    wanted = (
        (drawn.flip(-1) if mirrored else drawn)
        .repeat_interleave(2, 0)
        .repeat_interleave(2, 1)[8:63, 15:75]
    )
    assert (
        torch.equal(found.masks[0], wanted)
        and torch.equal(found.masks[1], wanted)
        and found.masks[2].all()
    )


def test_a_smaller_rle_takes_the_pixels_in_the_middle():
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = View((9, 12), (3, 4), (0, 0), (3, 4)).objects(
        objects([0, 0, 12, 9], segmentations=[encode(mask)])
    )
    assert torch.equal(seen.masks[0].bool(), mask[1::3, 1::3])


def test_only_the_view_is_drawn(monkeypatch):
    sizes = []
    decode = jitter.decode
    monkeypatch.setattr(jitter, "decode", lambda rle: sizes.append(rle["size"]) or decode(rle))
    view = View((600, 800), (2400, 3200), (900, 1000), (64, 64))
    polygons = [[box_polygon(x, x, x + 20, x + 20)] for x in range(0, 600, 10)]
    found = view.objects(objects(*[[0, 0, 1, 1]] * 60, segmentations=polygons))
    assert 0 < len(found.masks) == len(sizes) < 10 and all(size == [64, 64] for size in sizes)


# What is odd ---------------------------------------------------------------------------------------------------------


def test_what_is_not_seen_is_dropped():
    places = [
        [0, 0, 5, 5],
        [30, 30, 31, 31],
        [28, 28, 60, 60],
        [20, 0, 28, 60],
        [32.5, 40, 32.9, 50],
    ]
    view = View((60, 60), (60, 60), (28, 28), (20, 20))
    seen = view.objects(objects(*places))
    assert (
        seen.labels.tolist() == [1, 2]
        and seen.boxes.tolist() == [[2, 2, 3, 3], [0, 0, 20, 20]]
        and seen.masks is None
    )
    assert MIN_SIDE == 1.0
    seen = view.objects(objects(*places, segmentations=[[box_polygon(*place)] for place in places]))
    assert seen.labels.tolist()[:2] == [1, 2] and seen.boxes[:2].tolist() == [
        [2, 2, 3, 3],
        [0, 0, 20, 20],
    ]
    assert len(seen.masks) == len(seen.boxes) and seen.masks.flatten(1).any(1).all()


def test_nothing_to_see():
    for segmentations in (None, []):
        _, seen = large_scale_jitter(
            blank(20, 30), objects(segmentations=segmentations), make_rng(0, 0, 0), size=16
        )
        assert seen.boxes.shape == (0, 4) and seen.labels.shape == (0,)
    assert seen.masks.shape[0] == 0
    seen = whole(20, 30).objects(objects([0, 0, 9, 9], segmentations=[[[]]]))
    assert seen.boxes.shape == (0, 4) and seen.masks.shape == (0, 20, 30)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 900), (900, 1), (3, 3), (500, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_extreme_pictures(height, width, seed):
    place = [0, 0, width, height]
    for segmentations in (None, [[box_polygon(*place)]]):
        view, seen = large_scale_jitter(
            blank(height, width),
            objects(place, segmentations=segmentations),
            make_rng(seed, 0, 0),
            size=64,
        )
        assert view.dtype == torch.uint8 and 1 <= min(view.shape[1:]) and max(view.shape[1:]) <= 64
        assert len(seen.boxes) == 1 and seen.boxes[0].tolist() == [
            0,
            0,
            view.shape[2],
            view.shape[1],
        ]
        assert seen.masks is None or (seen.masks.shape == (1, *view.shape[1:]) and seen.masks.all())


def test_padding_is_at_the_bottom_and_on_the_right():
    for shape in ((48, 64), (64, 1), (64, 64)):
        for pixels in (torch.rand(3, *shape) + 1, torch.full((3, *shape), 7, dtype=torch.uint8)):
            padded = pad_square(pixels, 64)
            assert padded.shape == (3, 64, 64) and torch.equal(
                padded[:, : shape[0], : shape[1]], pixels
            )
            assert not padded[:, shape[0] :].any() and not padded[:, :, shape[1] :].any()
    with pytest.raises(AssertionError):
        pad_square(torch.ones(3, 65, 2), 64)
