"""Preprocessing equals recorded outputs and Pillow, augmentation equals torchvision."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from beit3.data.views import transforms
from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, VL_MEAN_STD, Preprocessing
from beit3.data.views.transforms import make_two_views, random_resized_crop
from beit3.seeding import make_rng
from tests.golden import load_config, load_tensors


@pytest.fixture(scope="module")
def photo():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    return torch.stack([x * 3, y * 4, (80 - x) * y // 19]).to(torch.uint8)  # [3, 60, 80]


def from_pillow(image, size, box=None):
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = np.array(pillow.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(resized).permute(2, 0, 1)


@pytest.mark.parametrize(
    "name, mean_std, resize",
    [("vl", VL_MEAN_STD, "squash"), ("imagenet", IMAGENET_MEAN_STD, "crop")],
)
def test_evaluation_preprocessing_equals_the_recorded_one(name, mean_std, resize):
    size = load_config("preprocess")["input_size"]
    preprocessing = Preprocessing(size, *mean_std, resize=resize)
    expected = load_tensors("preprocess", "outputs")
    for image, pixels in load_tensors("preprocess", "inputs").items():
        normalized, released = preprocessing(pixels.permute(2, 0, 1)), expected[f"{image}.{name}"]
        assert normalized.shape == released.shape and normalized.dtype == torch.float32
        assert (
            (normalized - released).abs() <= 1.5 / 255 / torch.tensor(mean_std[1]).view(3, 1, 1)
        ).all(), image


def test_crop_pct_keeps_the_center(photo):
    # 48 / 0.8 keeps the shorter side of 60; the central 48 x 48 of 60 x 80 remain.
    cropped = Preprocessing(48, (0, 0, 0), (1, 1, 1), resize="crop", crop_pct=0.8)(photo)
    assert torch.allclose(cropped, photo[:, 6:54, 16:64] / 255)


def test_an_image_of_the_right_size_is_not_resized(photo, monkeypatch):
    monkeypatch.setattr(F, "resize_image", None)
    square = photo[:, :, :60]
    expected = (square / 255 - 0.5) / 0.5
    assert torch.allclose(Preprocessing(60)(square), expected, atol=1e-6)
    sizes = {"image_size": 60, "token_size": 60}
    patches, tokens = make_two_views(
        square, make_rng(0, 0, 0), **sizes, scale=(1, 1), hflip=0, color_jitter=0
    )
    assert torch.equal(patches, square) and torch.equal(patches, tokens)


def test_interleaved_and_separate_colors_give_the_same(photo):
    """Decoders interleave colors; an image may also be cut out of a larger one."""
    interleaved = photo.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert interleaved.stride() != photo.stride()
    for preprocessing in (Preprocessing(32), Preprocessing(32, *IMAGENET_MEAN_STD, resize="crop")):
        for cut in (slice(None), slice(3, 50)):
            assert torch.equal(
                preprocessing(interleaved[:, cut, cut]), preprocessing(photo[:, cut, cut])
            )
    one, two = (
        make_two_views(image, make_rng(0, 0, 4), image_size=32, token_size=24)
        for image in (photo, interleaved)
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_preprocessed_images_are_normalized(photo):
    for preprocessing in (Preprocessing(32), Preprocessing(32, *IMAGENET_MEAN_STD, resize="crop")):
        preprocessed = preprocessing.preprocess(photo)
        assert preprocessed.dtype == torch.uint8 and torch.equal(
            preprocessing(photo), preprocessing.normalize(preprocessed)
        )


def test_normalize_takes_bytes_and_fractions(photo):
    preprocessing = Preprocessing(8, *IMAGENET_MEAN_STD)
    expected = (photo / 255 - torch.tensor(IMAGENET_MEAN_STD[0]).view(3, 1, 1)) / torch.tensor(
        IMAGENET_MEAN_STD[1]
    ).view(3, 1, 1)
    before = photo.clone()
    assert torch.allclose(preprocessing.normalize(photo), expected, atol=1e-6)
    fractions = photo / 255
    assert torch.allclose(preprocessing.normalize(fractions[None])[0], expected, atol=1e-6)
    assert torch.equal(photo, before) and torch.equal(fractions, before / 255)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing(224, *IMAGENET_MEAN_STD, resize="crop", crop_pct=0.875)
    copy = Preprocessing(**json.loads(json.dumps(dataclasses.asdict(preprocessing))))
    assert copy == preprocessing and hash(copy) == hash(preprocessing)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"resize": "pad"},
        {"interpolation": "cubic"},
        {"crop_pct": 0.0},
        {"mean": (0.5,)},
        {"std": (0.5, 0.0, 0.5)},
    ],
)
def test_preprocessing_names_the_wrong_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocessing(**{"image_size": 32, **wrong})


def test_both_views_show_the_same_crop(photo):
    for key in range(20):
        ranges = {"scale": (0.2, 1.0), "color_jitter": 0.0, "hflip": 0.5}
        patches, tokens = make_two_views(
            photo, make_rng(0, 0, key), image_size=28, token_size=32, **ranges
        )
        assert patches.shape == (3, 28, 28) and tokens.shape == (3, 32, 32)
        assert patches.dtype == tokens.dtype == torch.uint8
        generator = make_rng(0, 0, key)
        top, left, box_height, box_width = transforms._sample_box(
            photo, generator, ranges["scale"], (3 / 4, 4 / 3)
        )
        crop = photo[:, top : top + box_height, left : left + box_width]
        crop = crop.flip(-1) if generator.random() < 0.5 else crop
        for view, size in ((patches, 28), (tokens, 32)):
            assert (view.int() - from_pillow(crop, size).int()).abs().max() <= 2


def test_boxes_stay_inside_and_keep_scale_and_ratio(photo):
    boxes = np.array(
        [
            transforms._sample_box(photo, make_rng(0, 0, key), (0.2, 1.0), (3 / 4, 4 / 3))
            for key in range(3000)
        ]
    )
    top, left, box_height, box_width = boxes.T
    assert (
        (boxes[:, :2] >= 0).all()
        and (top + box_height).max() == 60
        and (left + box_width).max() == 80
    )
    area, shape = box_height * box_width / 4800, box_width / box_height
    assert 0.18 < area.min() < 0.23 and area.max() > 0.95
    assert shape.min() > 0.7 and shape.max() < 1.4 and abs(np.log(shape).mean()) < 0.1
    assert (top == 0).any() and (left == 0).any() and len(np.unique(top)) > 25


LARGEST_BOXES = {
    **{(10, 10): (0, 0, 10, 10), (10, 13): (0, 0, 10, 13), (10, 40): (0, 13, 10, 13)},
    **{(40, 10): (13, 0, 13, 10), (1, 1): (0, 0, 1, 1), (1, 9): (0, 4, 1, 1)},
}


@pytest.mark.parametrize("size, expected", LARGEST_BOXES.items())
def test_the_largest_box_keeps_the_ratio(size, expected):
    image = torch.zeros((3, *size), dtype=torch.uint8)
    assert transforms._sample_box(image, make_rng(0, 0, 0), (1.0, 1.0), (3 / 4, 4 / 3)) == expected


def test_one_pixel_and_narrow_images():
    for size in ((1, 1), (1, 50), (50, 1), (2, 3)):
        image = torch.full((3, *size), 200, dtype=torch.uint8)
        for key in range(10):
            patches, tokens = make_two_views(
                image, make_rng(0, 0, key), image_size=16, token_size=8, color_jitter=0
            )
            assert (patches == 200).all() and tokens.shape == (3, 8, 8)


def test_color_changes_equal_torchvision(photo):
    operations = (F.adjust_brightness_image, F.adjust_contrast_image, F.adjust_saturation_image)
    seen = set()
    for key in range(12):
        generator, expected = make_rng(0, 0, key), photo.float() / 255
        order = generator.permutation(3).tolist()
        for change in order:
            expected = operations[change](expected, 0.6 + 0.8 * generator.random())
        changes = transforms._sample_color_changes(make_rng(0, 0, key), 0.4)
        changed = transforms._change_colors(photo, changes, (0, 0, 60, 80))
        assert changed.dtype == torch.uint8 and (changed - expected * 255).abs().max() < 0.6
        assert torch.equal(
            transforms._change_colors(photo, changes, (5, 7, 20, 30)), changed[:, 5:25, 7:37]
        ), "contrast is that of the whole image"
        seen.add(tuple(order))
    assert len(seen) > 3


def test_all_randomness_comes_from_the_generator(photo):
    def make_views(seed):
        return make_two_views(photo, make_rng(seed, 0, "x"), image_size=16, token_size=8)

    torch.manual_seed(0)
    first = make_views(0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, make_views(0), strict=True))
    assert not torch.equal(first[0], make_views(1)[0])


def test_random_resized_crops(photo):
    crops = [random_resized_crop(photo, make_rng(0, 0, key), image_size=24) for key in range(8)]
    assert all(crop.shape == (3, 24, 24) and crop.dtype == torch.uint8 for crop in crops)
    whole = random_resized_crop(photo, make_rng(0, 0, 0), image_size=24, scale=(1, 1), hflip=0)
    assert (whole.int() - from_pillow(photo, 24).int()).abs().max() <= 1
    flipped = random_resized_crop(photo, make_rng(0, 0, 0), image_size=24, scale=(1, 1), hflip=1)
    assert (flipped.int() - whole.flip(-1).int()).abs().max() <= 1
    # Red rises from left to right in the photo, so its order tells which crops were flipped.
    flips = [
        random_resized_crop(photo, make_rng(1, 0, key), image_size=8)[0].float()
        for key in range(400)
    ]
    assert 0.4 < np.mean([(view[:, 0] > view[:, -1]).all().item() for view in flips]) < 0.6


def test_a_crop_of_the_whole_has_a_ratio_of_three_to_four_unless_told():
    """Of 40 x 10 pixels that is the 13 x 10 in the middle."""
    tall = (6 * torch.arange(40, dtype=torch.uint8))[:, None].expand(3, 40, 10)
    for image, box in ((tall, tall[:, 13:26]), (tall.mT, tall.mT[..., 13:26])):
        view = random_resized_crop(image, make_rng(0, 0, 0), image_size=13, scale=(1, 1), hflip=0)
        assert torch.equal(view, transforms.resize(box, 13, 13))


def test_transforms_do_not_write_into_the_image(photo):
    before = photo.clone()
    square = photo[:, :, :60].contiguous()
    for image in (photo, square):
        make_two_views(image, make_rng(0, 0, 3), image_size=60, token_size=60)
        make_two_views(
            image, make_rng(0, 0, 3), image_size=60, token_size=60, scale=(1, 1), color_jitter=0
        )
        Preprocessing(60)(image)
        random_resized_crop(image, make_rng(0, 0, 1), image_size=60)
    assert torch.equal(photo, before) and torch.equal(square, before[:, :, :60])


def test_squares_of_every_size_stay_square():
    """In floating point some sides would be a pixel short: 107 x 107 as 224 x 223."""
    prepare = Preprocessing(28, resize="crop")
    for side in (*range(1, 60), 71, 107, 110, 222, 1999):
        assert prepare(torch.zeros(3, side, side, dtype=torch.uint8)).shape == (3, 28, 28), side
    assert Preprocessing(224, resize="crop")(torch.zeros(3, 111, 222, dtype=torch.uint8)).shape == (
        3,
        224,
        224,
    )
