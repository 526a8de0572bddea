"""Windows, scales and mirrored views of networks with known scores, against slow loops."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from beit3.data.views.segmentation import compute_evaluation_size, resize_image
from beit3.segmentation import inference
from beit3.segmentation.inference import (
    InferenceConfig,
    list_window_starts,
    segment_image,
    slide_windows,
)

SMALL = InferenceConfig(crop=32, stride=20, short=40, long=160, multiple=8)


def make_image(height=50, width=70, seed=0):
    """Returns an image of smooth colors, which resizing changes little."""
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1))[0].to(
        torch.uint8
    )


def normalize(pixels):
    return pixels / 127.5 - 1


def score_pixels(pixels):
    """Scores four classes by the colors of a pixel alone, at full size."""
    red, green, blue = pixels.unbind(1)
    return torch.stack((red, green, blue, red * green), 1)


def score_cells(pixels):
    """Scores as `score_pixels` does, at a quarter of the size: [B, 4, S / 4, S / 4]."""
    return F.avg_pool2d(score_pixels(pixels), 4)


def score_positions(pixels):
    """Scores by the position inside the window, so that every window scores a pixel differently."""
    side = torch.linspace(0, 1, pixels.shape[-1])
    return torch.cat((pixels * side, (pixels[:, :1] + side[:, None]) * side[:, None]), 1)


def slide_slowly(pixels, score_windows, config):
    """Returns every pixel's mean score over the windows that contain it."""
    crop, (_, height, width) = config.crop, pixels.shape
    padded = torch.zeros(3, max(height, crop), max(width, crop))
    padded[:, :height, :width] = pixels
    starts = []
    for side in padded.shape[1:]:
        num_windows = math.ceil(max(side - crop, 0) / config.stride) + 1
        starts.append([min(index * config.stride, side - crop) for index in range(num_windows)])
    total, counts = None, torch.zeros(padded.shape[1:])
    for top, left in product(*starts):
        scores = score_windows(padded[None, :, top : top + crop, left : left + crop])
        scores = F.interpolate(scores, size=(crop, crop), mode="bilinear")[0]
        if total is None:
            total = torch.zeros(len(scores), *padded.shape[1:])
        for row in range(crop):
            total[:, top + row, left : left + crop] += scores[:, row]
            counts[top + row, left : left + crop] += 1
    assert (counts > 0).all()
    return (total / counts)[:, :height, :width]


@pytest.mark.parametrize("score_windows", [score_positions, score_cells])
@pytest.mark.parametrize("size", [(32, 32), (33, 52), (84, 61), (20, 90), (12, 17)])
@pytest.mark.parametrize("windows", [1, 3])
def test_sliding_windows_equal_a_slow_loop(score_windows, size, windows):
    pixels = normalize(make_image(*size))
    config = replace(SMALL, windows=windows)
    torch.testing.assert_close(
        slide_windows(pixels, score_windows, config), slide_slowly(pixels, score_windows, config)
    )


@pytest.mark.parametrize("side", range(8, 40))
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_cover_every_position_and_stay_inside(side, stride):
    starts = list_window_starts(side, 8, stride)
    assert starts[0] == 0 and starts[-1] == side - 8 and starts == sorted(set(starts))
    assert all(after - before <= stride for before, after in zip(starts, starts[1:], strict=False))


def test_a_batch_holds_no_more_windows_than_configured():
    shapes = []

    def score_windows(pixels):
        shapes.append(tuple(pixels.shape))
        return score_pixels(pixels)

    config = InferenceConfig(crop=32, stride=20, windows=4)
    slide_windows(normalize(make_image(60, 60)), score_windows, config)
    assert shapes == [(4, 3, 32, 32), (4, 3, 32, 32), (1, 3, 32, 32)], "three rows of three"


def test_one_window_gives_the_scores_of_the_network():
    image = make_image(32, 32)
    views = InferenceConfig(crop=32, stride=32, short=32, long=128)
    labels = segment_image(image, score_positions, views, normalize=normalize)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, score_positions(normalize(image)[None])[0].argmax(0))


def test_scores_of_the_padding_are_ignored():
    """The image is smaller than the window and is not resized."""
    image = make_image(24, 16)

    def score_windows(pixels):
        scores = score_pixels(pixels)
        scores[:, 3, 24:] = scores[:, 3, :, 16:] = 1e6
        return scores

    config = InferenceConfig(crop=32, stride=32, short=16, long=64, multiple=8)
    labels = segment_image(image, score_windows, config, normalize=normalize)
    assert labels.shape == (24, 16)
    assert torch.equal(labels, score_pixels(normalize(image)[None])[0].argmax(0))


@pytest.mark.parametrize(
    ("scales", "flip"),
    [((1.0,), False), ((1.0,), True), ((0.5, 1.0, 1.5), False), ((0.75, 1.25), True)],
)
@pytest.mark.parametrize("size", [(50, 70), (30, 33)])
def test_views_are_averaged_at_the_size_of_the_image(scales, flip, size):
    image = make_image(*size)
    views = InferenceConfig(
        crop=32, stride=20, short=64, long=160, multiple=8, scales=scales, flip=flip
    )
    total = torch.zeros(4, *size)
    for scale in scales:
        view_size = compute_evaluation_size(*size, short=64 * scale, long=160 * scale, multiple=8)
        pixels = normalize(resize_image(image, *view_size))
        view_scores = [slide_slowly(pixels, score_positions, views)]
        if flip:
            view_scores.append(slide_slowly(pixels.flip(-1), score_positions, views).flip(-1))
        for scores in view_scores:
            total += F.interpolate(scores[None], size=size, mode="bilinear")[0]
    labels = segment_image(image, score_positions, views, normalize=normalize)
    agreement = (labels == total.argmax(0)).float().mean()
    assert agreement > 0.999, "equal but for ties of rounding"


def test_resizing_a_few_rows_at_a_time_equals_resizing_all(monkeypatch):
    """The image is larger than every view."""
    image = make_image(150, 210)
    pixels = normalize(resize_image(image, 40, 56))
    scores = slide_slowly(pixels, score_cells, SMALL)[None]
    expected = F.interpolate(scores, size=(150, 210), mode="bilinear")[0].argmax(0)
    for piece_numel in (1, 5000, 1 << 26):
        monkeypatch.setattr(inference, "MAX_PIECE_NUMEL", piece_numel)
        labels = segment_image(image, score_cells, SMALL, normalize=normalize)
        assert (labels == expected).float().mean() > 0.999
    two_scales = replace(SMALL, scales=(0.8, 1.0))
    labels = segment_image(image, score_cells, two_scales, normalize=normalize)
    assert (labels == expected).float().mean() > 0.95


def test_mirrored_views_make_labels_independent_of_mirroring():
    image = make_image(48, 64)
    config = InferenceConfig(crop=32, stride=20, short=48, long=160, multiple=16)
    for flip in (True, False):
        views = replace(config, flip=flip)
        labels = segment_image(image, score_positions, views, normalize=normalize)
        mirrored = segment_image(image.flip(-1), score_positions, views, normalize=normalize)
        assert torch.equal(labels, mirrored.flip(-1)) == flip


def test_half_precision_scores_are_added_in_float32():
    scores = slide_windows(
        normalize(make_image(60, 60)), lambda pixels: score_cells(pixels).bfloat16(), SMALL
    )
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 64, "stride": 65}, "stride 65 of windows of 64"),
        ({"stride": 0}, "stride 0"),
        ({"short": 100, "long": 50}, "short 100"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"windows": 0}, "windows 0"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**settings)
