"""Mixup and CutMix: against pixel-by-pixel mixing, hand-worked boxes, and the distributions asked for."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from beit3.data.views.mixup import cut_box, mix

CLASSES = 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 4, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is i everywhere, so that a mixed pixel tells the share of either."""
    images = torch.arange(count).double().view(count, 1, 1, 1).expand(count, 3, size, size)
    return images.clone(), one_hot(torch.arange(count) % CLASSES, CLASSES).double()


def shares(mixed: torch.Tensor) -> torch.Tensor:
    """The share of its own in every pixel [S, S] of image 0 of `batch`, whose partner is the last image."""
    assert torch.equal(mixed[0, 0], mixed[0, 1]) and torch.equal(mixed[0, 0], mixed[0, 2])
    return 1 - mixed[0, 0] / (len(mixed) - 1)


def by_pixel(
    images: torch.Tensor, targets: torch.Tensor, own: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow mixing by a share [S, S] of every pixel; targets [B, C] by the mean share."""
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
                    own[y, x] * images[i, :, y, x] + (1 - own[y, x]) * images[j, :, y, x]
                )
        mean = float(own.mean())
        for c in range(CLASSES):
            soft[i, c] = mean * smoothed[i][c] + (1 - mean) * smoothed[j][c]
    return mixed, soft


def test_equals_mixing_pixel_by_pixel():
    images, targets = batch(5, 8)
    seen = set()
    for seed in range(12):
        mixed, soft = mix(images, targets, generator(seed), smoothing=0.2)
        own = shares(mixed)
        expected = by_pixel(images, targets, own, 0.2)
        assert torch.allclose(mixed, expected[0], atol=1e-12) and torch.allclose(
            soft, expected[1], atol=1e-12
        )
        seen.add(set(own.flatten().tolist()) <= {0.0, 1.0})
    assert seen == {True, False}, "both ways were met"
    assert torch.equal(images, batch(5, 8)[0]) and torch.equal(targets, batch(5, 8)[1])


@pytest.mark.parametrize(
    ("own", "centre", "size", "box"),
    [
        (
            0.75,
            (5, 10),
            (10, 20),
            (3, 7, 5, 15),
        ),  # half of either side, 5 and 10, of which 2 and 5 to both sides
        (0.75, (0, 19), (10, 20), (0, 2, 14, 20)),  # what juts out is lost
        (0.0, (5, 10), (10, 20), (0, 10, 0, 20)),  # all of it from the middle
        (0.0, (0, 0), (10, 20), (0, 5, 0, 10)),
        (1.0, (5, 10), (10, 20), (5, 5, 10, 10)),
        (0.51, (4, 4), (9, 9), (1, 7, 1, 7)),  # 9 x 0.7 = 6.3
        (0.5, (5, 5), (11, 11), (2, 8, 2, 8)),  # 11 x 0.707 = 7.8, cut to 7, and to 3 on both sides
    ],
)
def test_boxes_by_hand(own, centre, size, box):
    rows, columns = cut_box(own, centre, size)
    assert (rows.start, rows.stop, columns.start, columns.stop) == box


def test_one_hot_targets_smoothed_by_hand():
    images, targets = batch(2)
    unmixed, soft = mix(images, targets, generator(0), rate=0.0, smoothing=0.1)
    assert torch.equal(unmixed, images)
    assert torch.allclose(
        soft,
        torch.tensor([[0.92, 0.02, 0.02, 0.02, 0.02], [0.02, 0.92, 0.02, 0.02, 0.02]]).double(),
    )
    assert torch.equal(
        mix(images, targets, generator(0), mixup=0.0, cutmix=0.0, smoothing=0.0)[1], targets
    )


def test_soft_targets_stay_probabilities():
    images = torch.randn(6, 3, 8, 8, generator=generator(0))
    targets = torch.rand(6, CLASSES, generator=generator(1)).softmax(1)
    for seed in range(10):
        soft = mix(images, targets, generator(seed))[1]
        assert (
            torch.allclose(soft.sum(1), torch.ones(6))
            and (soft > 0).all()
            and not torch.allclose(soft, targets)
        )


@pytest.mark.parametrize("ways", [{}, {"mixup": 0.0}, {"cutmix": 0.0}])
def test_a_batch_of_one_is_unchanged_up_to_smoothing(ways):
    image, target = (
        torch.randn(1, 3, 16, 16, generator=generator(0)),
        one_hot(torch.tensor([2]), CLASSES).float(),
    )
    for seed in range(10):
        same, soft = mix(image, target, generator(seed), **ways)
        assert torch.equal(same, image) and torch.allclose(
            soft, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02]])
        )


def test_shares_follow_their_distributions():
    images, targets = batch(2, 4)
    count = 1500
    kinds, means = 0, []
    for seed in range(count):
        own = shares(mix(images, targets, generator(seed))[0])
        if set(own.flatten().tolist()) <= {0.0, 1.0}:
            kinds += 1
        else:
            means.append(float(own.mean()))
    assert abs(kinds - count / 2) < 4 * math.sqrt(count) / 2  # four deviations of a fair coin
    found = torch.tensor(means)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)), 0.0962 for 0.8; uniform would be 0.0833, 0.009 away.
    assert (
        abs(found.mean() - 0.5) < 4 * math.sqrt(0.0962 / len(found))
        and abs(found.var() - 0.0962) < 0.008
    )


def test_boxes_are_as_large_and_as_often_clipped_as_uniform_draws_say():
    size, count = 64, 1500
    images, targets = batch(2, size)
    taken = []
    for seed in range(count):
        mixed, soft = mix(images, targets, generator(seed), mixup=0.0, smoothing=0.0)
        taken.append(float(1 - shares(mixed).mean()))
        assert abs(soft[0, 0] - (1 - taken[-1])) < 1e-12, "the target knows the true area"
    # Of a side r, r (1 - r/4) stays inside on average. With r = sqrt(u), u uniform, u (1 - sqrt(u)/4)^2 has the mean
    # 1/2 - 1/5 + 1/48 = 0.321; sides made even lose 1 of 64 pixels on average: 0.013. Four errors of the mean: 0.022.
    assert -0.035 < sum(taken) / count - (1 / 2 - 1 / 5 + 1 / 48) < 0.01


def test_a_rate_of_the_batches_is_mixed():
    images, targets = batch(2, 8)
    mixed = sum(
        not torch.equal(mix(images, targets, generator(seed), rate=0.3, cutmix=0.0)[0], images)
        for seed in range(600)
    )
    assert abs(mixed - 180) < 4 * 11.3


@pytest.mark.parametrize("ways", [{"switch": 1.0}, {"mixup": 0.0, "switch": 0.0}])
def test_cutmix_alone(ways):
    images, targets = batch(2, 8)
    for seed in range(100):
        assert set(shares(mix(images, targets, generator(seed), **ways)[0]).flatten().tolist()) <= {
            0.0,
            1.0,
        }


@pytest.mark.parametrize("ways", [{"switch": 0.0}, {"cutmix": 0.0, "switch": 1.0}])
def test_mixup_alone(ways):
    images, targets = batch(2, 8)
    for seed in range(100):
        own = shares(mix(images, targets, generator(seed), **ways)[0])
        assert (own == own[0, 0]).all() and 0 < own[0, 0] < 1


def test_chance_is_the_generators_and_goes_on_alike_whatever_came_of_it():
    images, targets = batch(4, 8)
    first, second = generator(3), generator(3)
    for ways in ({}, {"mixup": 0.0}, {"cutmix": 0.0}):
        one, two = mix(images, targets, first, **ways), mix(images, targets, second, **ways)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    mix(images, targets, first, cutmix=0.0)
    mix(images, targets, second, rate=0.0)
    assert torch.equal(first.get_state(), second.get_state())
    assert not torch.equal(mix(images, targets, first)[0], mix(images, targets, first)[0])


def test_no_generator_is_torchs_global_one():
    images, targets = batch(4, 8)
    with torch.random.fork_rng():
        found = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            found.append(mix(images, targets, None)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[0], mix(images, targets, generator(7))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept_under_autocast(dtype):
    images, targets = batch(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(4):
            mixed, soft = mix(images.to(dtype), targets.float(), generator(seed))
            assert mixed.dtype == dtype and soft.dtype == torch.float32
            assert torch.allclose(soft.sum(1), torch.ones(4))
