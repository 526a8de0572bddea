"""The feature pyramid: sizes and receptive fields of its maps, one map by hand."""

import math

import pytest
import torch
from torch import Tensor

from beit3.detection.pyramid import SCALES, FeaturePyramid


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 1)])
def test_map_sizes_round_up(grid):
    maps = FeaturePyramid(16, 8)(torch.randn(2, *grid, 16))
    assert [tuple(features.shape) for features in maps] == [
        (2, 8, *(math.ceil(side / scale) for side in grid)) for scale in SCALES
    ]


@pytest.mark.parametrize("level", range(4))
def test_a_cell_depends_on_the_patches_around_it(level):
    """The last convolution is 3 x 3, so a cell depends on the patches below its neighbors too."""
    torch.manual_seed(level)
    features = torch.randn(1, 12, 12, 16, requires_grad=True)
    scale, y, x = SCALES[level], 3, 2
    FeaturePyramid(16, 8)(features)[level][0, :, y, x].square().sum().backward()
    has_gradient = features.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    top, left = math.floor((y - 1) * scale), math.floor((x - 1) * scale)
    expected[top : math.ceil((y + 2) * scale), left : math.ceil((x + 2) * scale)] = True
    if level == 3:  # max pooling passes one patch per channel, not all
        assert (has_gradient <= expected).all() and has_gradient.any()
    else:
        assert torch.equal(has_gradient, expected)


def test_the_map_of_stride_one_patch_equals_that_by_hand():
    pyramid = FeaturePyramid(16, 8)
    features = torch.randn(1, 3, 4, 16)
    conv1x1, _, conv3x3, _ = pyramid.project[2]
    projected = normalize(features @ conv1x1.weight[:, :, 0, 0].T)  # [1, 3, 4, 8]
    padded = torch.zeros(1, 5, 6, 8)
    padded[:, 1:-1, 1:-1] = projected
    expected = sum(
        padded[:, i : i + 3, j : j + 4] @ conv3x3.weight[:, :, i, j].T
        for i in range(3)
        for j in range(3)
    )
    torch.testing.assert_close(
        pyramid(features)[2].permute(0, 2, 3, 1), normalize(expected), atol=1e-5, rtol=1e-5
    )


def test_the_coarsest_map_is_every_second_cell():
    maps = FeaturePyramid(16, 8)(torch.randn(1, 10, 6, 16))
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])


def test_a_dim_that_cannot_be_halved_twice_is_refused():
    with pytest.raises(ValueError, match="dim 66 twice.*multiple of 4"):
        FeaturePyramid(66, 8)


def normalize(states: Tensor) -> Tensor:
    centered = states - states.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
