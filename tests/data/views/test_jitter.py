"""Large-scale jitter: ranges, seeds, masks equal to drawing all and cropping, edge cases."""

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from beit3.data.stores.rle import encode_rle, rasterize
from beit3.data.views import jitter
from beit3.data.views.jitter import (
    MIN_SIDE,
    FlipResizeCrop,
    ObjectAnnotations,
    large_scale_jitter,
    pad_to_square,
)
from beit3.seeding import make_rng


def make_polygon(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def make_objects(*boxes, segmentations=None):
    return ObjectAnnotations(
        torch.tensor(boxes).float().view(-1, 4), torch.arange(len(boxes)), segmentations
    )


def make_identity(height, width):
    return FlipResizeCrop((height, width), (height, width), (0, 0), (height, width))


def make_black_image(height, width):
    return torch.zeros(3, height, width, dtype=torch.uint8)


# Random ranges --------------------------------------------------------------------------------


def test_random_choices_cover_their_ranges(monkeypatch):
    """Factors fill `scale`, images are flipped or not, corners are independent for each axis."""
    transforms = []
    monkeypatch.setattr(
        FlipResizeCrop, "transform_image", lambda self, image: transforms.append(self) or image
    )
    for seed in range(400):
        large_scale_jitter(make_black_image(60, 80), make_objects(), make_rng(seed, 0, 0), size=100)
    factors = np.array([max(transform.resized_size) / 100 for transform in transforms])
    assert (
        0.1 <= factors.min() < 0.15
        and 1.95 < factors.max() <= 2.0
        and abs(factors.mean() - 1.05) < 0.1
    )
    assert 0.4 < np.mean([transform.flipped for transform in transforms]) < 0.6
    for transform in transforms:
        assert (
            abs(transform.resized_size[0] / 60 - transform.resized_size[1] / 80)
            < 0.5 / 60 + 0.5 / 80
        )
        assert transform.crop_size == tuple(min(side, 100) for side in transform.resized_size)
        assert all(
            0 <= corner <= side - kept
            for corner, side, kept in zip(
                transform.crop_corner, transform.resized_size, transform.crop_size, strict=True
            )
        )
    fractions = np.array(
        [
            [
                corner / (side - 100)
                for corner, side in zip(transform.crop_corner, transform.resized_size, strict=True)
            ]
            for transform in transforms
            if min(transform.resized_size) > 110
        ]
    )
    assert len(fractions) > 50 and fractions.min() < 0.05 and fractions.max() > 0.95
    assert abs(np.corrcoef(fractions.T)[0, 1]) < 0.3


def test_seeds_and_flip_rates_decide():
    image = torch.arange(3 * 40 * 50).remainder(251).to(torch.uint8).view(3, 40, 50)
    annotations = make_objects([4, 4, 30, 30], segmentations=[[make_polygon(4, 4, 30, 30)]])
    first, second = (
        large_scale_jitter(image, annotations, make_rng(7, 0, 0), size=48) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1].masks, second[1].masks)
    unchanged, visible = large_scale_jitter(
        image, annotations, make_rng(0, 0, 0), size=50, scale=(1.0, 1.0), flip=0.0
    )
    assert (
        torch.equal(unchanged, image)
        and visible.boxes.tolist() == [[4, 4, 30, 30]]
        and visible.labels.tolist() == [0]
    )
    flipped, visible = large_scale_jitter(
        image, annotations, make_rng(0, 0, 0), size=50, scale=(1.0, 1.0), flip=1.0
    )
    assert torch.equal(flipped, image.flip(-1)) and visible.boxes.tolist() == [[20, 4, 46, 30]]


# Masks and boxes ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", ["polygon", "rle", "box"])
def test_objects_move_with_their_pixels(seed, form):
    """Each object is painted into a channel of its own, and found where that color is."""
    boxes = [[10, 8, 40, 30], [50, 20, 74, 56], [5, 38, 30, 56]]
    image = make_black_image(60, 80)
    for channel, (x1, y1, x2, y2) in zip(image, boxes, strict=True):
        channel[y1:y2, x1:x2] = 255
    segmentations = {
        "polygon": [[make_polygon(*box)] for box in boxes],
        "rle": [encode_rle(channel > 0) for channel in image],
        "box": None,
    }[form]
    crop, visible = large_scale_jitter(
        image,
        make_objects(*boxes, segmentations=segmentations),
        make_rng(seed, 0, 0),
        size=64,
        scale=(0.8, 2.0),
    )
    assert (
        visible.boxes.dtype == torch.float32
        and visible.labels.dtype == torch.int64
        and (visible.masks is None) == (form == "box")
    )
    for row, label in enumerate(visible.labels.tolist()):
        painted = crop[label] > 127
        outside = torch.tensor([0, 0, *crop.shape[:0:-1]])
        assert (visible.boxes[row, :2] >= 0).all() and (visible.boxes[row, 2:] <= outside[2:]).all()
        if painted.any():
            assert (
                visible.boxes[row] - masks_to_boxes(painted[None])[0] - torch.tensor([0, 0, 1, 1])
            ).abs().max() <= 1
        if visible.masks is not None:
            missed = painted != visible.masks[row].bool()
            assert missed.sum() <= painted.shape[0] + painted.shape[1], (
                "at most a line of pixels along the edges"
            )
    assert all(
        (crop[label] > 127).sum() <= 64 for label in set(range(3)) - set(visible.labels.tolist())
    )


@pytest.mark.parametrize("flipped", [False, True])
def test_masks_equal_drawing_everything_and_cropping(flipped):
    generator = np.random.default_rng(0)
    polygons = [[list(map(float, generator.uniform(0, 60, 2 * n)))] for n in (3, 4, 5, 6, 8, 11)]
    polygons[0].append(make_polygon(50, 50, 58, 59))
    full = FlipResizeCrop((60, 60), (150, 140), (0, 0), (150, 140), flipped)
    part = FlipResizeCrop((60, 60), (150, 140), (31, 42), (64, 70), flipped)
    annotations = make_objects(*[[0, 0, 60, 60]] * 6, segmentations=polygons)
    expected = full.transform_objects(annotations).masks[:, 31:95, 42:112]
    visible = part.transform_objects(annotations)
    assert len(visible.masks) == 6
    # Corners before the crop are rounded to fifths of a pixel the other way, so pixels along
    # an edge may differ.
    assert (visible.masks != expected).float().mean() < 0.002
    assert torch.equal(visible.boxes, masks_to_boxes(visible.masks) + torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("flipped", [False, True])
def test_rle_and_polygons_agree(flipped):
    """With an integer factor and integer coordinates nothing is rounded."""
    polygon = [make_polygon(10, 5, 33, 21), make_polygon(40, 30, 41, 31)]
    drawn = rasterize(polygon, 36, 48)
    transform = FlipResizeCrop((36, 48), (72, 96), (8, 15), (55, 60), flipped)
    runs = {"size": [36, 48], "counts": [0, 36 * 48]}
    visible = transform.transform_objects(
        make_objects(*[[0, 0, 48, 36]] * 3, segmentations=[polygon, encode_rle(drawn), runs])
    )
    expected = (
        (drawn.flip(-1) if flipped else drawn)
        .repeat_interleave(2, 0)
        .repeat_interleave(2, 1)[8:63, 15:75]
    )
    assert (
        torch.equal(visible.masks[0], expected)
        and torch.equal(visible.masks[1], expected)
        and visible.masks[2].all()
    )


def test_a_reduced_rle_takes_the_pixels_in_the_middle():
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    visible = FlipResizeCrop((9, 12), (3, 4), (0, 0), (3, 4)).transform_objects(
        make_objects([0, 0, 12, 9], segmentations=[encode_rle(mask)])
    )
    assert torch.equal(visible.masks[0].bool(), mask[1::3, 1::3])


def test_masks_are_drawn_only_in_the_crop(monkeypatch):
    sizes = []
    decode_rle = jitter.decode_rle
    monkeypatch.setattr(
        jitter, "decode_rle", lambda rle: sizes.append(rle["size"]) or decode_rle(rle)
    )
    transform = FlipResizeCrop((600, 800), (2400, 3200), (900, 1000), (64, 64))
    polygons = [[make_polygon(x, x, x + 20, x + 20)] for x in range(0, 600, 10)]
    visible = transform.transform_objects(
        make_objects(*[[0, 0, 1, 1]] * 60, segmentations=polygons)
    )
    assert 0 < len(visible.masks) == len(sizes) < 10 and all(size == [64, 64] for size in sizes)


# Edge cases -----------------------------------------------------------------------------------


def test_objects_outside_the_crop_are_dropped():
    boxes = [
        [0, 0, 5, 5],
        [30, 30, 31, 31],
        [28, 28, 60, 60],
        [20, 0, 28, 60],
        [32.5, 40, 32.9, 50],
    ]
    transform = FlipResizeCrop((60, 60), (60, 60), (28, 28), (20, 20))
    visible = transform.transform_objects(make_objects(*boxes))
    assert (
        visible.labels.tolist() == [1, 2]
        and visible.boxes.tolist() == [[2, 2, 3, 3], [0, 0, 20, 20]]
        and visible.masks is None
    )
    assert MIN_SIDE == 1.0
    visible = transform.transform_objects(
        make_objects(*boxes, segmentations=[[make_polygon(*box)] for box in boxes])
    )
    assert visible.labels.tolist()[:2] == [1, 2] and visible.boxes[:2].tolist() == [
        [2, 2, 3, 3],
        [0, 0, 20, 20],
    ]
    assert len(visible.masks) == len(visible.boxes) and visible.masks.flatten(1).any(1).all()


def test_images_without_visible_objects():
    for segmentations in (None, []):
        _, visible = large_scale_jitter(
            make_black_image(20, 30),
            make_objects(segmentations=segmentations),
            make_rng(0, 0, 0),
            size=16,
        )
        assert visible.boxes.shape == (0, 4) and visible.labels.shape == (0,)
    assert visible.masks.shape[0] == 0
    visible = make_identity(20, 30).transform_objects(
        make_objects([0, 0, 9, 9], segmentations=[[[]]])
    )
    assert visible.boxes.shape == (0, 4) and visible.masks.shape == (0, 20, 30)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 900), (900, 1), (3, 3), (500, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_images_of_extreme_sizes(height, width, seed):
    box = [0, 0, width, height]
    for segmentations in (None, [[make_polygon(*box)]]):
        crop, visible = large_scale_jitter(
            make_black_image(height, width),
            make_objects(box, segmentations=segmentations),
            make_rng(seed, 0, 0),
            size=64,
        )
        assert crop.dtype == torch.uint8 and 1 <= min(crop.shape[1:]) and max(crop.shape[1:]) <= 64
        assert len(visible.boxes) == 1 and visible.boxes[0].tolist() == [
            0,
            0,
            crop.shape[2],
            crop.shape[1],
        ]
        assert visible.masks is None or (
            visible.masks.shape == (1, *crop.shape[1:]) and visible.masks.all()
        )


def test_padding_is_at_the_bottom_and_the_right():
    for shape in ((48, 64), (64, 1), (64, 64)):
        for pixels in (torch.rand(3, *shape) + 1, torch.full((3, *shape), 7, dtype=torch.uint8)):
            padded = pad_to_square(pixels, 64)
            assert padded.shape == (3, 64, 64) and torch.equal(
                padded[:, : shape[0], : shape[1]], pixels
            )
            assert not padded[:, shape[0] :].any() and not padded[:, :, shape[1] :].any()
    with pytest.raises(AssertionError):
        pad_to_square(torch.ones(3, 65, 2), 64)
