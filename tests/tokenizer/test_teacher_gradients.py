"""The hand-made features of the gradients teacher, by their meaning."""

import pytest
import torch
from torch import Tensor

from beit3.tokenizer.teacher_gradients import Gradients
from beit3.tokenizer.teacher_loading import load_teacher


def pixels(size: int, batch: int) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def test_gradients_are_per_patch_and_both_groups_count():
    teacher = Gradients(8)
    images = pixels(32, 3)
    features = teacher.extract_features(images)
    assert features.shape == (3, 16, teacher.dim)
    means = [
        float(images[1, c, 8 + 4 * y : 12 + 4 * y, 16 + 4 * x : 20 + 4 * x].mean()) - 0.5
        for c in range(3)
        for y in range(2)
        for x in range(2)
    ]
    close(features[1, 4 + 2, :12], torch.tensor(means) / 3**0.5)
    edges = features[:, :, 12:-1].norm(dim=2)
    assert edges.max() <= 1 and edges.min() > 0.5 and features[:, :, :12].norm(dim=2).max() <= 1
    assert torch.equal(features, Gradients(8).extract_features(images))
    changed = images.clone()
    changed[:, :, 20:, 20:] = 0.5  # two pixels beyond the patches of the upper left quarter
    close(Gradients(8).extract_features(changed)[:, [0, 1, 4, 5]], features[:, [0, 1, 4, 5]])


@pytest.mark.parametrize("turn", range(8))
def test_gradients_tell_directions_apart(turn: int):
    angle = torch.tensor(turn * torch.pi / 8)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = 0.5 + 0.02 * ((x - 11.5) * torch.cos(angle) + (y - 11.5) * torch.sin(angle))
    histogram = (
        Gradients(8).extract_features(ramp.expand(1, 3, 24, 24))[0, 4, 12:-1].view(8, 4).sum(1)
    )  # the middle patch
    assert histogram[turn] > 0.999 * histogram.sum()
    upside = (
        Gradients(8)
        .extract_features((1 - ramp).expand(1, 3, 24, 24))[0, 4, 12:-1]
        .view(8, 4)
        .sum(1)
    )
    close(upside, histogram, 1e-4)  # dark to light is light to dark


def test_flat_patches_have_a_defined_direction():
    features = Gradients(8).extract_features(torch.full((1, 3, 16, 16), 0.5))
    assert torch.isfinite(features).all() and (features.norm(dim=2) > 0.2).all()
    noisy = 0.5 + 0.002 * (pixels(16, 1) - 0.5)
    assert (
        torch.cosine_similarity(Gradients(8).extract_features(noisy), features, dim=-1).min() > 0.95
    )


def test_gradients_take_an_even_patch():
    with pytest.raises(ValueError, match="patch_size 7"):
        load_teacher("gradients", patch_size=7)
    assert load_teacher("gradients", patch_size=8).extract_features(pixels(32, 64)).isfinite().all()
