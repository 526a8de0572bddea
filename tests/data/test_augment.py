"""RandAugment: the release's ten operations at its magnitude."""

import numpy as np
import torch

from beit3.data.augment import ENHANCE, OPERATIONS, SHIFT, rand_augment


def picture(height: int = 40, width: int = 50) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_operation_keeps_shape_and_type():
    for operation in OPERATIONS:
        for sign in (1, -1):
            changed = operation(picture(), sign)
            assert changed.shape == (3, 40, 50) and changed.dtype == torch.uint8


def test_magnitudes_by_hand():
    image = picture()
    assert abs(ENHANCE - 1.36) < 1e-12 and SHIFT == 7
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
        # The side that leaves the picture loses what the row has moved; the other side is filled with grey.
        lost = [32 - min((row < 60).sum().item(), (row > 180).sum().item()) for row in sheared]
        assert abs((lost[60] - lost[10]) / 50 - 0.21) < 0.03


def test_half_of_the_draws_do_nothing_and_chance_is_the_generators():
    image = picture() // 2 + 40  # neither contrast nor histogram is full already
    same = sum(torch.equal(rand_augment(image, np.random.default_rng(seed), count=1), image) for seed in range(400))
    assert 400 * 0.47 < same < 400 * 0.63  # one half, and of the other half the tenth that is the identity
    first, second = (rand_augment(image, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, second)
