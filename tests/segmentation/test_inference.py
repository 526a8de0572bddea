"""Windows, scales and mirrored views with callables whose scores are known, against slow loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from beit3.data.views.segmentation import compute_evaluation_size, resize_image
from beit3.segmentation import inference
from beit3.segmentation.inference import (
    InferenceConfig,
    segment_image,
    slide_windows,
    window_starts,
)

SMALL = InferenceConfig(crop=32, stride=20, short=40, long=160, multiple=8)


def picture(height=50, width=70, seed=0):
    """Smooth colours, so that resizing changes little."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1))[0].to(
        torch.uint8
    )


def normalize(pixels):
    return pixels / 127.5 - 1


def per_pixel(pixels):
    """Four classes from the colours of a pixel alone, at full size."""
    red, green, blue = pixels.unbind(1)
    return torch.stack((red, green, blue, red * green), 1)


def quarter(pixels):
    """The same a quarter of the size: [B, 4, S / 4, S / 4]."""
    return F.avg_pool2d(per_pixel(pixels), 4)


def in_window(pixels):
    """Depends on the place inside the window, so that every window says something else of a
    pixel."""
    side = torch.linspace(0, 1, pixels.shape[-1])
    return torch.cat((pixels * side, (pixels[:, :1] + side[:, None]) * side[:, None]), 1)


def slow_slide(pixels, scores, views):
    """Every pixel's mean over the windows that see it."""
    _, height, width = pixels.shape
    padded = torch.zeros(3, max(height, views.crop), max(width, views.crop))
    padded[:, :height, :width] = pixels
    corners = []
    for side in padded.shape[1:]:
        count = math.ceil(max(side - views.crop, 0) / views.stride) + 1
        corners.append([min(index * views.stride, side - views.crop) for index in range(count)])
    total, seen = None, torch.zeros(padded.shape[1:])
    for top in corners[0]:
        for left in corners[1]:
            found = scores(padded[None, :, top : top + views.crop, left : left + views.crop])
            found = F.interpolate(found, size=(views.crop, views.crop), mode="bilinear")[0]
            total = torch.zeros(len(found), *padded.shape[1:]) if total is None else total
            for row in range(views.crop):
                total[:, top + row, left : left + views.crop] += found[:, row]
                seen[top + row, left : left + views.crop] += 1
    assert (seen > 0).all()
    return (total / seen)[:, :height, :width]


@pytest.mark.parametrize("scores", [in_window, quarter])
@pytest.mark.parametrize("size", [(32, 32), (33, 52), (84, 61), (20, 90), (12, 17)])
@pytest.mark.parametrize("windows", [1, 3])
def test_slide_equals_a_slow_reference(scores, size, windows):
    pixels = normalize(picture(*size))
    views = InferenceConfig(crop=32, stride=20, short=40, long=160, multiple=8, windows=windows)
    torch.testing.assert_close(
        slide_windows(pixels, scores, views), slow_slide(pixels, scores, views)
    )


@pytest.mark.parametrize("side", range(8, 40))
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_cover_every_place_and_stay_inside(side, stride):
    begins = window_starts(side, 8, stride)
    assert begins[0] == 0 and begins[-1] == side - 8 and begins == sorted(set(begins))
    assert all(after - before <= stride for before, after in zip(begins, begins[1:], strict=False))


def test_no_more_windows_at_once_than_asked_for():
    seen = []

    def scores(pixels):
        seen.append(tuple(pixels.shape))
        return per_pixel(pixels)

    slide_windows(
        normalize(picture(60, 60)), scores, InferenceConfig(crop=32, stride=20, windows=4)
    )
    assert seen == [(4, 3, 32, 32), (4, 3, 32, 32), (1, 3, 32, 32)], "three rows of three"


def test_one_window_is_the_network_alone():
    image = picture(32, 32)
    views = InferenceConfig(crop=32, stride=32, short=32, long=128)
    found = segment_image(image, in_window, views, normalize=normalize)
    assert (
        torch.equal(found, in_window(normalize(image)[None])[0].argmax(0))
        and found.dtype == torch.int64
    )


def test_padding_is_taken_off_again():
    """A picture smaller than the window at its own size: what is said of the padding never
    matters."""
    image = picture(24, 16)

    def scores(pixels):
        found = per_pixel(pixels)
        found[:, 3, 24:] = found[:, 3, :, 16:] = 1e6
        return found

    found = segment_image(
        image,
        scores,
        InferenceConfig(crop=32, stride=32, short=16, long=64, multiple=8),
        normalize=normalize,
    )
    assert found.shape == (24, 16) and torch.equal(
        found, per_pixel(normalize(image)[None])[0].argmax(0)
    )


@pytest.mark.parametrize(
    "scales, flip",
    [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.5), False), ((0.75, 1.25), True)],
)
@pytest.mark.parametrize("size", [(50, 70), (30, 33)])
def test_views_are_averaged_at_the_size_of_the_image(scales, flip, size):
    image = picture(*size)
    views = InferenceConfig(
        crop=32, stride=20, short=64, long=160, multiple=8, scales=scales, flip=flip
    )
    total = torch.zeros(4, *size)
    for scale in scales:
        tall, wide = compute_evaluation_size(*size, short=64 * scale, long=160 * scale, multiple=8)
        pixels = normalize(resize_image(image, tall, wide))
        for mirrored in (False, True)[: 1 + flip]:
            found = slow_slide(pixels.flip(-1) if mirrored else pixels, in_window, views)
            found = found.flip(-1) if mirrored else found
            total += F.interpolate(found[None], size=size, mode="bilinear")[0]
    found = segment_image(image, in_window, views, normalize=normalize)
    agree = (found == total.argmax(0)).float().mean()
    assert agree > 0.999, "but for ties of rounding"


def test_images_larger_than_every_view(monkeypatch):
    """Scores are resized a few rows at a time, and equal those of the whole."""
    image = picture(150, 210)
    views = InferenceConfig(crop=32, stride=20, short=40, long=160, multiple=8)
    pixels = normalize(resize_image(image, 40, 56))
    expected = F.interpolate(
        slow_slide(pixels, quarter, views)[None], size=(150, 210), mode="bilinear"
    )[0].argmax(0)
    for piece in (1, 5000, 1 << 26):
        monkeypatch.setattr(inference, "PIECE", piece)
        assert (
            segment_image(image, quarter, views, normalize=normalize) == expected
        ).float().mean() > 0.999
    several = InferenceConfig(crop=32, stride=20, short=40, long=160, multiple=8, scales=(0.8, 1.0))
    assert (
        segment_image(image, quarter, several, normalize=normalize) == expected
    ).float().mean() > 0.95


def test_mirrored_views_make_it_blind_to_mirroring():
    image = picture(48, 64)
    views = InferenceConfig(crop=32, stride=20, short=48, long=160, multiple=16, flip=True)
    found = segment_image(image, in_window, views, normalize=normalize)
    mirrored = segment_image(image.flip(-1), in_window, views, normalize=normalize).flip(-1)
    assert torch.equal(found, mirrored)
    alone = InferenceConfig(crop=32, stride=20, short=48, long=160, multiple=16)
    assert not torch.equal(
        segment_image(image, in_window, alone, normalize=normalize),
        segment_image(image.flip(-1), in_window, alone, normalize=normalize).flip(-1),
    )


def test_half_precision_scores_are_added_in_float32():
    seen = slide_windows(
        normalize(picture(60, 60)), lambda pixels: quarter(pixels).bfloat16(), SMALL
    )
    assert seen.dtype == torch.float32


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"crop": 64, "stride": 65}, "stride 65 of windows of 64"),
        ({"stride": 0}, "stride 0"),
        ({"short": 100, "long": 50}, "short 100"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"windows": 0}, "windows 0"),
    ],
)
def test_settings_that_leave_gaps_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        InferenceConfig(**settings)
