"""Augmentation and resizing for segmentation: equal to loops, within bounds, seeded."""

import colorsys

import numpy as np
import pytest
import torch

from beit3.data.views.segmentation import (
    SegmentationAugmentation,
    adjust_saturation,
    compute_evaluation_size,
    distort_colors,
    pad_image_and_labels,
    rescale_size,
    resize_image,
    resize_labels,
)

IDENTITY = {
    "crop": 1000,
    "short": 60,
    "long": 240,
    "scale": (1.0, 1.0),
    "largest_share": 1.0,
    "flip": 0.0,
    "distort": False,
}
"""Settings with which nothing changes an image of 60 x 80."""


def make_rng(seed=0):
    return np.random.default_rng(seed)


def make_labeled_image(height=60, width=80, seed=0):
    """Returns an image whose red is 20 times the label; labels are in blocks of ten pixels."""
    shape = (-(-height // 10), -(-width // 10))
    blocks = torch.from_numpy(make_rng(seed).integers(0, 5, shape))
    labels = blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)
    labels = labels[:height, :width].to(torch.uint8)
    noise = torch.from_numpy(make_rng(seed).integers(0, 256, (2, height, width))).to(torch.uint8)
    return torch.cat((20 * labels[None], noise)), labels


def make_augmentation(**settings):
    return SegmentationAugmentation(**(IDENTITY | settings))


# Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, expected",
    [
        ((512, 683), (896, 1195)),
        ((683, 512), (1195, 896)),
        ((100, 1000), (358, 3584)),
        ((896, 896), (896, 896)),
    ],
)
def test_the_shorter_side_fits_unless_the_longer_is_too_long(size, expected):
    assert rescale_size(*size, short=896, long=3584) == expected
    height, width = compute_evaluation_size(*size, short=896, long=3584, multiple=32)
    assert height % 32 == width % 32 == 0
    assert 0 <= height - expected[0] < 32 and 0 <= width - expected[1] < 32


@pytest.mark.parametrize("size", [(60, 80), (30, 200), (121, 97), (1, 1)])
def test_labels_are_taken_at_the_center_of_each_new_pixel(size):
    _, labels = make_labeled_image()
    resized = resize_labels(labels, *size)
    for row in range(0, size[0], 7):
        for column in range(0, size[1], 7):
            old_row, old_column = (row + 0.5) * 60 / size[0], (column + 0.5) * 80 / size[1]
            assert resized[row, column] == labels[int(old_row), int(old_column)]


# Augmentation ---------------------------------------------------------------------------------


def test_identity_settings_change_nothing():
    image, labels = make_labeled_image()
    augmented = make_augmentation()(image, labels, make_rng())
    assert torch.equal(augmented[0], image) and torch.equal(augmented[1], labels)


@pytest.mark.parametrize("seed", range(6))
def test_pixels_and_labels_stay_together(seed):
    """Red shows the label except at the edges of blocks, where colors are blended."""
    image, labels = make_labeled_image(seed=seed)
    augment = make_augmentation(scale=(0.8, 2.0), crop=40, flip=0.5)
    image, labels = augment(image, labels, make_rng(seed))
    assert image.shape[1:] == labels.shape and max(labels.shape) <= 40
    agreement = ((image[0].float() - 20.0 * labels).abs() < 3).float().mean()
    assert agreement > 0.7


def test_every_crop_occurs_flipped_and_not():
    image = torch.arange(12, dtype=torch.uint8).expand(3, 12, 12).contiguous()
    augment, rng = make_augmentation(short=12, long=48, crop=10, flip=0.5), make_rng()
    first_rows = set()
    for _ in range(200):
        crop, _ = augment(image, image[0], rng)
        first_rows.add(tuple(crop[0, 0].tolist()))
    unflipped = {tuple(range(start, start + 10)) for start in range(3)}
    assert first_rows == unflipped | {row[::-1] for row in unflipped}


def test_scales_fill_their_range():
    image, labels = make_labeled_image()
    augment, rng = make_augmentation(scale=(0.5, 2.0)), make_rng()
    heights = [augment(image, labels, rng)[1].shape[0] for _ in range(100)]
    assert 30 <= min(heights) < 36 and 112 < max(heights) <= 120


def test_crops_of_one_class_are_drawn_again():
    """Class 1 fills all but the last ten columns.

    One crop in four shows both classes, one in eight with enough of class 2.
    """
    labels = torch.ones(20, 60, dtype=torch.uint8)
    labels[:, 50:] = 2
    image = labels.expand(3, -1, -1).contiguous()
    counts = []
    for largest_share in (0.75, 1.0):
        augment = make_augmentation(short=20, long=80, crop=20, largest_share=largest_share)
        rng = make_rng()
        crops = [augment(image, labels, rng)[1] for _ in range(100)]
        counts.append(sum(1 for crop in crops if (crop == 2).any()))
    assert counts[0] > 70 and counts[1] < 40


def test_ignored_pixels_do_not_count_for_the_largest_class():
    """Of 20 columns 12 are ignored and 4 belong to each class: none has three quarters."""
    labels = torch.full((20, 40), 255, dtype=torch.uint8)
    labels[:, 8:12], labels[:, 12:16] = 1, 2
    augmentation = make_augmentation(crop=20, largest_share=0.75)
    lefts = {augmentation.sample_corner(labels, make_rng(seed), 255)[1] for seed in range(30)}
    # Every left up to 10 shows both classes, and neither with more than three quarters.
    assert lefts <= set(range(11)) and len(lefts) > 6
    labels = torch.full((20, 40), 255, dtype=torch.uint8)
    assert augmentation.sample_corner(labels, make_rng(), 255)[0] == 0


def test_the_same_seed_gives_the_same_augmentation():
    image, labels = make_labeled_image()
    image_before, labels_before = image.clone(), labels.clone()
    augment = make_augmentation(
        scale=(0.5, 2.0), crop=32, flip=0.5, distort=True, largest_share=0.75
    )
    torch.manual_seed(1)
    first = augment(image, labels, make_rng(4))
    torch.manual_seed(2)
    second = augment(image, labels, make_rng(4))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    other, _ = augment(image, labels, make_rng(5))
    assert not torch.equal(first[0], other[..., : first[0].shape[1], : first[0].shape[2]])
    assert torch.equal(image, image_before) and torch.equal(labels, labels_before)


def test_padding_is_at_the_bottom_and_the_right():
    pixels, labels = torch.randn(3, 5, 8), torch.ones(5, 8, dtype=torch.uint8)
    padded, padded_labels = pad_image_and_labels(pixels, labels, 9)
    assert padded.shape == (3, 9, 9) and padded_labels.shape == (9, 9)
    assert torch.equal(padded[:, :5, :8], pixels)
    assert not padded[:, 5:].any() and not padded[..., 8:].any()
    assert padded_labels.dtype == torch.uint8 and (padded_labels[:5, :8] == 1).all()
    assert (padded_labels[5:] == 255).all() and (padded_labels[:, 8:] == 255).all()
    _, wide_labels = pad_image_and_labels(pixels, labels.int(), 9, ignore=65535)
    assert (wide_labels[5:] == 65535).all()


# Colors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 40.0])
def test_saturation_keeps_hue_and_value(factor):
    pixels = torch.from_numpy(make_rng().integers(0, 256, (3, 4, 5))).float()
    pixels[:, 0, 0] = torch.tensor([9.0, 9.0, 9.0])
    pixels[:, 0, 1] = 0.0
    changed = adjust_saturation(pixels, factor) / 255
    for row in range(4):
        for column in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, row, column] / 255).tolist())
            rgb = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            torch.testing.assert_close(
                changed[:, row, column], torch.tensor(rgb), atol=1e-5, rtol=0
            )


def test_distortion_changes_colors_and_no_shape():
    image = resize_image(make_labeled_image()[0], 30, 40)
    distorted = [distort_colors(image, make_rng(seed)) for seed in range(200)]
    assert all(copy.dtype == torch.uint8 and copy.shape == image.shape for copy in distorted)
    assert len({copy.numpy().tobytes() for copy in distorted[:24]}) > 18
    assert any(torch.equal(copy, image) for copy in distorted), "sometimes no change is applied"


def test_distortion_of_gray_changes_only_brightness_and_contrast():
    """Gray has no saturation and no hue: a value v becomes (v + b) * c."""
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [int(distort_colors(gray, make_rng(seed))[0, 0, 0]) for seed in range(300)]
    assert min(values) >= 0.5 * 68 - 1 and max(values) <= 1.5 * 132 + 1
    assert min(values) < 45 and max(values) > 170


def test_hue_turns_by_up_to_a_tenth_of_the_circle():
    """Brightness, contrast and saturation keep the hue of this red; rounding moves it a little."""
    red = torch.tensor([80, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    turns = []
    for seed in range(400):
        pixels = distort_colors(red, make_rng(seed))[:, 0, 0]
        hue = colorsys.rgb_to_hsv(*(pixels / 255).tolist())[0]
        turns.append((hue + 0.5) % 1 - 0.5)
    assert -0.11 < min(turns) < -0.09 and 0.09 < max(turns) < 0.11
    assert sum(turn == 0 for turn in turns) > 120, "half of the images keep their hue"
