"""Mixup and CutMix equal mixing pixel by pixel; boxes by hand; distributions."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from beit3.data.views.mixup import compute_cut_box, mix_batch

CLASSES = 5


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(count: int = 4, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes images i with value i everywhere, so that a mixed pixel shows the weights."""
    images = torch.arange(count).double().view(count, 1, 1, 1).expand(count, 3, size, size)
    return images.clone(), one_hot(torch.arange(count) % CLASSES, CLASSES).double()


def compute_weights(mixed: torch.Tensor) -> torch.Tensor:
    """Returns the weight [S, S] of image 0 in its pixels; its partner is the last image."""
    assert torch.equal(mixed[0, 0], mixed[0, 1]) and torch.equal(mixed[0, 0], mixed[0, 2])
    return 1 - mixed[0, 0] / (len(mixed) - 1)


def mix_by_pixel(
    images: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes slowly with the weight [S, S] of every pixel; targets [B, C] with the mean weight."""
    mixed, soft = torch.empty_like(images), torch.empty_like(targets)
    count, _, height, width = images.shape
    smoothed = [
        [smoothing / CLASSES + (1 - smoothing) * float(value) for value in row] for row in targets
    ]
    for i in range(count):
        j = count - 1 - i
        for y in range(height):
            for x in range(width):
                mixed[i, :, y, x] = (
                    weights[y, x] * images[i, :, y, x] + (1 - weights[y, x]) * images[j, :, y, x]
                )
        mean = float(weights.mean())
        for c in range(CLASSES):
            soft[i, c] = mean * smoothed[i][c] + (1 - mean) * smoothed[j][c]
    return mixed, soft


def test_mixing_equals_mixing_pixel_by_pixel():
    images, targets = make_batch(5, 8)
    seen = set()
    for seed in range(12):
        mixed, soft = mix_batch(images, targets, make_generator(seed), smoothing=0.2)
        weights = compute_weights(mixed)
        expected = mix_by_pixel(images, targets, weights, 0.2)
        assert torch.allclose(mixed, expected[0], atol=1e-12) and torch.allclose(
            soft, expected[1], atol=1e-12
        )
        seen.add(set(weights.flatten().tolist()) <= {0.0, 1.0})
    assert seen == {True, False}, "both methods were used"
    assert torch.equal(images, make_batch(5, 8)[0])
    assert torch.equal(targets, make_batch(5, 8)[1])


@pytest.mark.parametrize(
    ("weight", "center", "size", "box"),
    [
        (
            0.75,
            (5, 10),
            (10, 20),
            (3, 7, 5, 15),
        ),  # half of either side, 5 and 10, of which 2 and 5 to both sides
        (0.75, (0, 19), (10, 20), (0, 2, 14, 20)),  # the part outside is lost
        (0.0, (5, 10), (10, 20), (0, 10, 0, 20)),  # all of it from the middle
        (0.0, (0, 0), (10, 20), (0, 5, 0, 10)),
        (1.0, (5, 10), (10, 20), (5, 5, 10, 10)),
        (0.51, (4, 4), (9, 9), (1, 7, 1, 7)),  # 9 x 0.7 = 6.3
        (0.5, (5, 5), (11, 11), (2, 8, 2, 8)),  # 11 x 0.707 = 7.8, cut to 7, and to 3 on both sides
    ],
)
def test_boxes_worked_by_hand(weight, center, size, box):
    rows, columns = compute_cut_box(weight, center, size)
    assert (rows.start, rows.stop, columns.start, columns.stop) == box


def test_one_hot_targets_are_smoothed():
    images, targets = make_batch(2)
    unmixed, soft = mix_batch(images, targets, make_generator(0), rate=0.0, smoothing=0.1)
    assert torch.equal(unmixed, images)
    assert torch.allclose(
        soft,
        torch.tensor([[0.92, 0.02, 0.02, 0.02, 0.02], [0.02, 0.92, 0.02, 0.02, 0.02]]).double(),
    )
    assert torch.equal(
        mix_batch(images, targets, make_generator(0), mixup=0.0, cutmix=0.0, smoothing=0.0)[1],
        targets,
    )


def test_soft_targets_stay_probabilities():
    images = torch.randn(6, 3, 8, 8, generator=make_generator(0))
    targets = torch.rand(6, CLASSES, generator=make_generator(1)).softmax(1)
    for seed in range(10):
        soft = mix_batch(images, targets, make_generator(seed))[1]
        assert (
            torch.allclose(soft.sum(1), torch.ones(6))
            and (soft > 0).all()
            and not torch.allclose(soft, targets)
        )


@pytest.mark.parametrize("options", [{}, {"mixup": 0.0}, {"cutmix": 0.0}])
def test_a_batch_of_one_is_unchanged_up_to_smoothing(options):
    image, target = (
        torch.randn(1, 3, 16, 16, generator=make_generator(0)),
        one_hot(torch.tensor([2]), CLASSES).float(),
    )
    for seed in range(10):
        same, soft = mix_batch(image, target, make_generator(seed), **options)
        assert torch.equal(same, image) and torch.allclose(
            soft, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02]])
        )


def test_mixing_weights_follow_their_distributions():
    images, targets = make_batch(2, 4)
    count = 1500
    kinds, means = 0, []
    for seed in range(count):
        weights = compute_weights(mix_batch(images, targets, make_generator(seed))[0])
        if set(weights.flatten().tolist()) <= {0.0, 1.0}:
            kinds += 1
        else:
            means.append(float(weights.mean()))
    assert abs(kinds - count / 2) < 4 * math.sqrt(count) / 2  # four deviations of a fair coin
    samples = torch.tensor(means)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)), 0.0962 for 0.8. That of a uniform
    # distribution would be 0.0833.
    assert (
        abs(samples.mean() - 0.5) < 4 * math.sqrt(0.0962 / len(samples))
        and abs(samples.var() - 0.0962) < 0.008
    )


def test_boxes_are_as_large_and_as_often_clipped_as_uniform_draws_say():
    size, count = 64, 1500
    images, targets = make_batch(2, size)
    taken = []
    for seed in range(count):
        mixed, soft = mix_batch(images, targets, make_generator(seed), mixup=0.0, smoothing=0.0)
        taken.append(float(1 - compute_weights(mixed).mean()))
        assert abs(soft[0, 0] - (1 - taken[-1])) < 1e-12, "the target knows the true area"
    # Of a side r, r (1 - r/4) stays inside on average. With r = sqrt(u), u uniform,
    # u (1 - sqrt(u)/4)^2 has the mean 1/2 - 1/5 + 1/48 = 0.321. Even sides lose 1 of 64 pixels on
    # average, 0.013. Four standard errors of the mean are 0.022.
    assert -0.035 < sum(taken) / count - (1 / 2 - 1 / 5 + 1 / 48) < 0.01


def test_a_rate_of_the_batches_is_mixed():
    images, targets = make_batch(2, 8)
    mixed = sum(
        not torch.equal(
            mix_batch(images, targets, make_generator(seed), rate=0.3, cutmix=0.0)[0], images
        )
        for seed in range(600)
    )
    assert abs(mixed - 180) < 4 * 11.3


@pytest.mark.parametrize("options", [{"switch": 1.0}, {"mixup": 0.0, "switch": 0.0}])
def test_cutmix_without_mixup(options):
    images, targets = make_batch(2, 8)
    for seed in range(100):
        assert set(
            compute_weights(mix_batch(images, targets, make_generator(seed), **options)[0])
            .flatten()
            .tolist()
        ) <= {
            0.0,
            1.0,
        }


@pytest.mark.parametrize("options", [{"switch": 0.0}, {"cutmix": 0.0, "switch": 1.0}])
def test_mixup_without_cutmix(options):
    images, targets = make_batch(2, 8)
    for seed in range(100):
        weights = compute_weights(mix_batch(images, targets, make_generator(seed), **options)[0])
        assert (weights == weights[0, 0]).all() and 0 < weights[0, 0] < 1


def test_one_number_of_the_generator_decides_everything():
    images, targets = make_batch(4, 8)
    first, second = make_generator(3), make_generator(3)
    for options in ({}, {"mixup": 0.0}, {"cutmix": 0.0}):
        one, two = (
            mix_batch(images, targets, first, **options),
            mix_batch(images, targets, second, **options),
        )
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    mix_batch(images, targets, first, cutmix=0.0)
    mix_batch(images, targets, second, rate=0.0)
    assert torch.equal(first.get_state(), second.get_state())
    assert not torch.equal(
        mix_batch(images, targets, first)[0], mix_batch(images, targets, first)[0]
    )


def test_no_generator_is_torchs_global_one():
    images, targets = make_batch(4, 8)
    with torch.random.fork_rng():
        draws = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            draws.append(mix_batch(images, targets, None)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], mix_batch(images, targets, make_generator(7))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept_under_autocast(dtype):
    images, targets = make_batch(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(4):
            mixed, soft = mix_batch(images.to(dtype), targets.float(), make_generator(seed))
            assert mixed.dtype == dtype and soft.dtype == torch.float32
            assert torch.allclose(soft.sum(1), torch.ones(4))
