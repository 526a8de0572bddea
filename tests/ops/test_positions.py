"""Patches and positions at other sizes. (Position tables also have golden fixtures:
tests/weights.)"""

import torch
import torch.nn.functional as F

from beit3.ops.positions import resample_patches, resample_positions


def test_an_equal_grid_is_the_table_itself():
    table = torch.randn(3 + 14 * 14, 8)
    assert resample_positions(table, (14, 14), (14, 14), keep=3) is table


def test_larger_patches_answer_to_enlarged_pictures_as_the_old_ones_did():
    kernel = torch.randn(5, 3, 14, 14, dtype=torch.float64)
    patches = torch.rand(7, 3, 14, 14, dtype=torch.float64)
    before = F.conv2d(patches, kernel).flatten(1)
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    after = F.conv2d(enlarged, resample_patches(kernel, 16)).flatten(1)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_smaller_patches_answer_nearly_the_same_and_equal_ones_are_the_kernel_itself():
    smooth = lambda count: F.interpolate(  # noqa: E731
        torch.randn(count, 3, 4, 4, dtype=torch.float64), size=(16, 16), mode="bicubic"
    )
    kernel, patches = smooth(5), smooth(7)
    before = F.conv2d(patches, kernel).flatten(1)
    shrunk = F.interpolate(patches, size=(14, 14), mode="bicubic", align_corners=False)
    after = F.conv2d(shrunk, resample_patches(kernel, 14)).flatten(1)
    assert (after - before).norm() < 0.1 * before.norm()
    assert resample_patches(kernel, 16) is kernel
