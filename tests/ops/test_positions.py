"""Resampled patches and positions. Golden fixtures of position tables are in tests/weights."""

import torch
import torch.nn.functional as F

from beit3.ops.positions import resample_patches, resample_positions


def make_smooth_patches(count):
    coarse = torch.randn(count, 3, 4, 4, dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode="bicubic")


def test_an_equal_grid_returns_the_table_itself():
    table = torch.randn(3 + 14 * 14, 8)
    assert resample_positions(table, (14, 14), (14, 14), keep=3) is table


def test_a_larger_kernel_gives_the_same_output_on_enlarged_patches():
    kernel = torch.randn(5, 3, 14, 14, dtype=torch.float64)
    patches = torch.rand(7, 3, 14, 14, dtype=torch.float64)
    before = F.conv2d(patches, kernel).flatten(1)
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    after = F.conv2d(enlarged, resample_patches(kernel, 16)).flatten(1)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_a_smaller_kernel_gives_nearly_the_same_output():
    kernel, patches = make_smooth_patches(5), make_smooth_patches(7)
    before = F.conv2d(patches, kernel).flatten(1)
    shrunk = F.interpolate(patches, size=(14, 14), mode="bicubic", align_corners=False)
    after = F.conv2d(shrunk, resample_patches(kernel, 14)).flatten(1)
    assert (after - before).norm() < 0.1 * before.norm()


def test_an_equal_size_returns_the_kernel_itself():
    kernel = torch.randn(5, 3, 16, 16)
    assert resample_patches(kernel, 16) is kernel
