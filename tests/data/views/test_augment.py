"""RandAugment equals timm's and operations in numpy and Pillow; random erasing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from beit3.data.views import augment
from beit3.data.views.augment import (
    ENHANCE_FACTOR,
    INCREASING_OPERATIONS,
    OPERATIONS,
    SHIFT_PIXELS,
    draw_erasing,
    erase_boxes,
    rand_augment,
    rand_augment_timm,
)


def make_noise(height: int = 40, width: int = 50) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_every_operation_keeps_shape_and_type():
    for operation in OPERATIONS:
        for sign in (1, -1):
            changed = operation(make_noise(), sign)
            assert changed.shape == (3, 40, 50) and changed.dtype == torch.uint8


def test_magnitudes_by_hand():
    image = make_noise()
    assert abs(ENHANCE_FACTOR - 1.36) < 1e-12 and SHIFT_PIXELS == 7
    brighter = (image.double() * 1.36).clamp(0, 255)
    assert (OPERATIONS[3](image, 1).double() - brighter).abs().max() <= 1
    moved = OPERATIONS[7](image, 1)
    assert torch.equal(moved[:, :, 7:], image[:, :, :-7]) and (moved[:, :, :7] == 128).all()
    moved = OPERATIONS[8](image, -1)
    assert torch.equal(moved[:, :-7], image[:, 7:]) and (moved[:, -7:] == 128).all()


def test_a_shear_moves_a_row_by_its_height_times_the_factor():
    image = torch.full((3, 64, 64), 10, dtype=torch.uint8)
    image[:, :, 32:] = 200
    for sign in (1, -1):
        sheared = OPERATIONS[5](image, sign)[0].float()
        # One side loses what the row has moved, the other side is filled with gray.
        lost = [32 - min((row < 60).sum().item(), (row > 180).sum().item()) for row in sheared]
        assert abs((lost[60] - lost[10]) / 50 - 0.21) < 0.03


def test_half_of_the_operations_are_left_out_and_the_generator_decides():
    image = make_noise() // 2 + 40  # neither contrast nor histogram is full already
    same = sum(
        torch.equal(rand_augment(image, np.random.default_rng(seed), count=1), image)
        for seed in range(400)
    )
    assert (
        400 * 0.47 < same < 400 * 0.63
    )  # one half, and of the other half the tenth that is the identity
    first, second = (rand_augment(image, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, second)


MEAN_COLOR = (124, 116, 104)  # 255 x (0.485, 0.456, 0.406) = 123.7, 116.3, 103.5


def make_photo() -> Image.Image:
    """Returns an image of 60 x 45 that every operation changes: smooth, noisy, not extreme."""
    y, x = np.mgrid[0:45, 0:60]
    noise = np.random.default_rng(1).integers(0, 9, (45, 60, 3))
    return Image.fromarray(
        (np.stack([20 + 3 * x, 30 + 4 * y, 15 + x + 2 * y], axis=2) + noise).astype(np.uint8)
    )


def to_gray(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def blur(pixels: np.ndarray) -> np.ndarray:
    """Blurs inner pixels with weight 5 in the center and 1 for eight neighbors."""
    blurred = pixels.copy()
    for y in range(1, pixels.shape[0] - 1):
        for x in range(1, pixels.shape[1] - 1):
            blurred[y, x] = (
                pixels[y - 1 : y + 2, x - 1 : x + 2].sum(axis=(0, 1)) + 4 * pixels[y, x]
            ) / 13
    return blurred


def equalize(channel: np.ndarray) -> np.ndarray:
    """Equalizes by Pillow's rule, value by value."""
    counts = [int((channel == value).sum()) for value in range(256)]
    step = (sum(counts) - [count for count in counts if count][-1]) // 255
    table, below = [], step // 2
    for count in counts:
        table.append(min(below // step, 255))
        below += count
    return np.array(table)[channel.astype(int)]


def stretch(channel: np.ndarray) -> np.ndarray:
    return (channel - channel.min()) * 255 / (channel.max() - channel.min())


def change_by_hand(name: str, pixels: np.ndarray, strength: float) -> np.ndarray:
    """Applies a color operation to pixels [H, W, 3] in numpy."""
    factor, size = 1 + 0.9 * strength, abs(strength)
    blended_with = {
        "color": to_gray(pixels)[..., None],
        "contrast": to_gray(pixels).mean().round(),
        "brightness": 0.0,
    }
    if name == "sharpness":
        blended_with[name] = blur(pixels)
    if name in blended_with:
        return np.clip(blended_with[name] + factor * (pixels - blended_with[name]), 0, 255)
    if name in ("equalize", "auto-contrast"):
        change = equalize if name == "equalize" else stretch
        return np.stack([change(pixels[..., channel]) for channel in range(3)], axis=2)
    if name == "invert":
        return 255 - pixels
    if name == "posterize":
        dropped = 2 ** (4 + int(4 * size))
        return pixels // dropped * dropped
    if name == "solarize":
        return np.where(pixels >= 256 - int(256 * size), 255 - pixels, pixels)
    return np.where(pixels < 128, np.minimum(pixels + int(110 * size), 255), pixels)  # solarize-add


def warp_by_hand(name: str, image: Image.Image, strength: float) -> Image.Image:
    """Applies a geometric operation with Pillow's matrix of where each pixel comes from."""
    if name == "rotate":
        return image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=MEAN_COLOR)
    matrix = {
        "shear-x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear-y": (1, 0, 0, 0.3 * strength, 1, 0),
        "shift-x": (1, 0, -0.45 * strength * 60, 0, 1, 0),
        "shift-y": (1, 0, 0, 0, 1, -0.45 * strength * 45),
    }[name]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=MEAN_COLOR
    )


WARPS = {"rotate", "shear-x", "shear-y", "shift-x", "shift-y"}


@pytest.mark.parametrize("strength", [0.9, -0.9, 0.42, -1.0])
@pytest.mark.parametrize("name", INCREASING_OPERATIONS)
def test_an_operation_equals_timms(name, strength):
    image = make_photo()
    changed = np.asarray(INCREASING_OPERATIONS[name](image, strength), np.float64)
    if name in WARPS:
        assert (changed == np.asarray(warp_by_hand(name, image, strength))).all()
    else:
        expected = change_by_hand(name, np.asarray(image, np.float64), strength)
        rounding = {"color", "contrast", "brightness", "sharpness", "auto-contrast"}
        # Pillow rounds gray values and the blurred image, which enter up to 0.9 times.
        assert np.abs(changed - expected).max() <= (1.9 if name in rounding else 0)
    assert (changed != np.asarray(image)).any()


def test_magnitude_9_by_hand():
    """The average strength of the recipe in the units of each operation."""
    pixels = np.array([[[0, 17, 25], [26, 100, 127], [128, 200, 255]]], np.uint8)
    changed = {
        name: np.asarray(INCREASING_OPERATIONS[name](Image.fromarray(pixels), 0.9))[0].tolist()
        for name in INCREASING_OPERATIONS
    }
    assert changed["posterize"] == [[0, 0, 0], [0, 0, 0], [128, 128, 128]]  # 4 - int(3.6) = 1 bit
    assert changed["solarize"] == [
        [0, 17, 25],
        [229, 155, 128],
        [127, 55, 0],
    ]  # from 256 - int(230.4) = 26
    assert changed["solarize-add"] == [[99, 116, 124], [125, 199, 226], [128, 200, 255]]
    assert changed["brightness"] == [[0, 30, 45], [47, 181, 229], [231, 255, 255]]  # times 1.81


def test_strength_0_changes_nothing_and_strength_1_is_allowed():
    image = make_photo()
    for name in INCREASING_OPERATIONS.keys() - {"auto-contrast", "equalize", "invert", "posterize"}:
        assert (np.asarray(INCREASING_OPERATIONS[name](image, 0.0)) == np.asarray(image)).all(), (
            name
        )
    assert (
        np.asarray(INCREASING_OPERATIONS["posterize"](image, 0.0)) == np.asarray(image) // 16 * 16
    ).all()
    assert not np.asarray(INCREASING_OPERATIONS["posterize"](image, 1.0)).any()


def test_shifts_and_shears_bring_in_the_mean_color():
    image = torch.randint(
        0, 256, (3, 40, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    fill = torch.tensor(MEAN_COLOR, dtype=torch.uint8).view(3, 1, 1)
    right = F.pil_to_tensor(
        INCREASING_OPERATIONS["shift-x"](F.to_pil_image(image), 2 / 3)
    )  # 0.3 of 20 pixels
    assert torch.equal(right[:, :, 6:], image[:, :, :-6]) and (right[:, :, :6] == fill).all()
    up = F.pil_to_tensor(
        INCREASING_OPERATIONS["shift-y"](F.to_pil_image(image), -1 / 3)
    )  # 0.15 of 40 pixels
    assert torch.equal(up[:, :-6], image[:, 6:]) and (up[:, -6:] == fill).all()
    sheared = F.pil_to_tensor(INCREASING_OPERATIONS["shear-x"](F.to_pil_image(image), 1.0))
    assert (sheared[:, 39, -11:] == fill[:, 0]).all()  # 0.3 x 39.5 = 11.85 pixels at the lowest row


@pytest.fixture(scope="module")
def record_operations():
    """Returns (operation, strength) of the operations in 3000 augmentations of one pixel."""
    seen = []

    def recorder(name):
        return lambda image, strength: seen[-1].append((name, strength)) or image

    rng, pixel = np.random.default_rng(0), torch.zeros(3, 1, 1, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            augment,
            "INCREASING_OPERATIONS",
            {name: recorder(name) for name in INCREASING_OPERATIONS},
        )
        for _ in range(3000):
            seen.append([])
            rand_augment_timm(pixel, rng)
    return seen


def test_two_operations_with_replacement_each_half_of_the_time(record_operations):
    # Tolerances are four standard deviations of a binomial count.
    applied = np.bincount([len(pair) for pair in record_operations], minlength=3)
    assert len(applied) == 3 and (np.abs(applied - [750, 1500, 750]) < [95, 110, 95]).all()
    names = [name for pair in record_operations for name, _ in pair]
    assert all(abs(names.count(name) - len(names) / 15) < 55 for name in INCREASING_OPERATIONS)
    same = sum(len(pair) == 2 and pair[0][0] == pair[1][0] for pair in record_operations)
    assert abs(same - applied[2] / 15) < 28


def test_strengths_are_normal_about_nine_tenths_and_cut_at_one(record_operations):
    strengths = np.array([strength for pair in record_operations for _, strength in pair])
    sizes = np.abs(strengths)
    # Of about 3000 draws the mean is known to 0.0009 and the median to 0.0011; 2.3 % (+- 0.3 %)
    # would be above 1.
    assert (
        abs(np.median(sizes) - 0.9) < 0.005
        and abs(np.median(np.abs(sizes - 0.9)) - 0.6745 * 0.05) < 0.004
    )
    assert sizes.max() == 1 and abs((sizes == 1).mean() - 0.0228) < 0.011 and sizes.min() > 0.65
    assert abs((strengths > 0).mean() - 0.5) < 0.04


def test_rand_augment_timm_is_a_function_of_its_generator():
    image = make_noise(33, 47)
    before, results = image.clone(), []
    for seed in range(60):
        first, second = (rand_augment_timm(image, np.random.default_rng(seed)) for _ in range(2))
        assert (
            torch.equal(first, second) and first.shape == image.shape and first.dtype == torch.uint8
        )
        results.append(first)
    assert torch.equal(image, before)
    # A quarter is unchanged, and some more by auto-contrast, as noise has all values: of 60,
    # 16 +- 3.4.
    assert 3 < sum(torch.equal(result, image) for result in results) < 30


def erase_at_random(
    pixels: torch.Tensor, rng: np.random.Generator, *, rate: float = 0.25
) -> torch.Tensor:
    """Erases a box of normalized pixels [3, H, W]."""
    return erase_boxes(pixels[None], [draw_erasing(pixels, rng, rate=rate)])[0]


def find_erased_box(size: int, seed: int) -> tuple[int, int, int, int] | None:
    """Returns top, left, height and width of the erased box; checks that all else is unchanged."""
    pixels = torch.full((3, size, size), 100.0)
    changed = erase_at_random(pixels, np.random.default_rng(seed), rate=1.0) != 100
    assert (pixels == 100).all()
    if not changed.any():
        return None
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    rows, columns = (changed[0].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    box = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert changed[0].sum() == box[2] * box[3]
    return box


def test_erased_boxes_fill_the_ranges_of_area_and_aspect():
    size, count = 96, 500
    boxes = np.array([find_erased_box(size, seed) for seed in range(count)], float)
    top, left, box_height, box_width = boxes.T
    # Sides are rounded, so that areas and aspects hold within half a pixel of either.
    assert ((box_height + 0.5) * (box_width + 0.5) >= 0.02 * size**2).all() and (
        (box_height - 0.5) * (box_width - 0.5) <= size**2 / 3
    ).all()
    assert ((box_height + 0.5) / (box_width - 0.5) >= 0.3).all() and (
        (box_height - 0.5) / (box_width + 0.5) <= 1 / 0.3
    ).all()
    area, aspect = box_height * box_width / size**2, np.log(box_height / box_width)
    # Uniform areas have a standard deviation of 0.0905, uniform logarithms one of 0.695. Few boxes
    # do not fit.
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 4 * 0.0905 / math.sqrt(count)
    assert abs(aspect.mean()) < 4 * 0.695 / math.sqrt(count) and abs(aspect.std() - 0.695) < 0.06
    assert area.min() < 0.03 and area.max() > 0.31
    assert (
        (top + box_height).max() == size
        and (left + box_width).max() == size
        and top.min() == left.min() == 0
    )
    assert abs((top + box_height / 2).mean() - size / 2) < 4 * 22 / math.sqrt(
        count
    )  # half the way left over, at most 27


def test_erased_pixels_are_standard_normal_and_the_rate_is_kept():
    pixels = torch.full((3, 64, 64), 100.0)
    rng, num_erased, values = np.random.default_rng(0), 0, []
    for _ in range(1200):
        erased = erase_at_random(pixels, rng)
        num_erased += not torch.equal(erased, pixels)
        values.append(erased[erased != 100])
    assert abs(num_erased - 300) < 4 * 15  # binomial, 1200 x 0.25 x 0.75 = 15 squared
    noise = torch.cat(values)  # 300 boxes of some 2000 values
    assert noise.numel() > 300_000 and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise.abs() > 1.96).double().mean() - 0.05) < 0.003
    assert draw_erasing(pixels, rng, rate=0.0) is None
    assert torch.equal(
        *(erase_at_random(pixels, np.random.default_rng(5), rate=1.0) for _ in range(2))
    )


def test_a_box_that_never_fits_is_given_up_after_ten_tries():
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    line = torch.ones(3, 1, 100)
    assert draw_erasing(line, rng, rate=1.0) is None
    other.random(1 + 10 * 2)  # whether at all, then area and aspect ten times
    assert rng.random() == other.random()
