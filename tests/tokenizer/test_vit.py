"""The plain ViT against the same formulas written with explicit loops, and its position rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.vit import ViT, ViTConfig, resample_learned_positions, to_unit_range

STYLES = ("beit", "dino", "clip")


def tiny(style: str, image_size: int = 12) -> ViT:
    vit = ViT(ViTConfig(image_size, 4, 16, 2, 4, 24, in_channels=5, ln_eps=1e-3, style=style))
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return vit.eval()


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-3)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def slow(state: dict[str, Tensor], image: Tensor, style: str) -> Tensor:
    """One image [5, 12, 12] -> [10, 16], patch by patch and head by head."""
    tokens = [state["class_token"][0, 0]]
    for row in range(3):
        for column in range(3):
            patch = image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            bias = 0 if style == "clip" else state["patch.bias"]
            tokens.append((state["patch.weight"] * patch).sum((1, 2, 3)) + bias)
    x = torch.stack(tokens) + state["positions"][0]
    if style == "clip":
        x = layer_norm(x, state, "pre_norm")
    for block in ("blocks.0", "blocks.1"):
        n = layer_norm(x, state, f"{block}.norm1")
        query, key, value = (n @ state[f"{block}.attention.qkv.weight"].T).split(16, 1)
        if style == "beit":
            query = query + state[f"{block}.attention.query_bias"]
            value = value + state[f"{block}.attention.value_bias"]
        else:
            q_bias, k_bias, v_bias = state[f"{block}.attention.qkv.bias"].split(16)
            query, key, value = query + q_bias, key + k_bias, value + v_bias
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            heads.append(
                torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(4), 1) @ value[:, part]
            )
        x = (
            x
            + torch.cat(heads, 1) @ state[f"{block}.attention.out.weight"].T
            + state[f"{block}.attention.out.bias"]
        )
        n = layer_norm(x, state, f"{block}.norm2")
        n = n @ state[f"{block}.ffn.fc1.weight"].T + state[f"{block}.ffn.fc1.bias"]
        n = (
            n / (1 + torch.exp(-1.702 * n))
            if style == "clip"
            else n * 0.5 * (1 + torch.erf(n / math.sqrt(2)))
        )
        x = x + n @ state[f"{block}.ffn.fc2.weight"].T + state[f"{block}.ffn.fc2.bias"]
    return layer_norm(x, state, "norm")


@pytest.mark.parametrize("style", STYLES)
def test_equals_the_slow_form(style: str):
    vit = tiny(style)
    images = torch.randn(2, 5, 12, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([slow(vit.state_dict(), image, style) for image in images])
    torch.testing.assert_close(vit(images).detach(), expected, atol=2e-5, rtol=1e-5)


def test_only_queries_and_values_have_a_bias_in_beit():
    names = {
        name for name, _ in tiny("beit").named_parameters() if name.startswith("blocks.0.attention")
    }
    assert names == {
        f"blocks.0.attention.{n}"
        for n in ("query_bias", "value_bias", "qkv.weight", "out.weight", "out.bias")
    }


def test_positions_of_another_grid_follow_the_published_rule():
    """Upstream's rule by hand: output cell i samples the table at (i + .5) * n / (rows + .1) - .5,
    cubic a = -0.75."""
    positions = torch.randn(1, 1 + 9, 2, generator=torch.Generator().manual_seed(0))
    table = positions[0, 1:].view(3, 3, 2)

    def cubic(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def weights(count: int) -> Tensor:
        matrix = torch.zeros(count, 3)
        for i in range(count):
            at = (i + 0.5) * 3 / (count + 0.1) - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                matrix[i, min(max(j, 0), 2)] += cubic(at - j)
        return matrix

    expected = torch.einsum("rh,cw,hwd->rcd", weights(5), weights(4), table).reshape(20, 2)
    result = resample_learned_positions(positions, (5, 4))
    assert torch.equal(result[:, 0], positions[:, 0])
    torch.testing.assert_close(result[0, 1:], expected, atol=1e-5, rtol=1e-5)
    plain = F.interpolate(table.permute(2, 0, 1)[None], size=(5, 4), mode="bicubic").flatten(2)[0].T
    assert (plain - expected).abs().max() > 1e-2  # the tenth matters
    assert resample_learned_positions(positions, (3, 3)) is positions


def test_other_sizes_and_sizes_that_do_not_fit():
    vit = tiny("beit")
    assert vit(torch.zeros(1, 5, 20, 8)).shape == (1, 1 + 5 * 2, 16)
    with pytest.raises(ValueError, match="13 x 12"):
        vit(torch.zeros(1, 5, 13, 12))
    with pytest.raises(ValueError, match="num_heads 5"):
        ViTConfig(12, 4, 16, 2, 5, 24)


def test_pixels_must_be_unnormalised():
    exact = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert torch.equal(to_unit_range(exact), exact.float() / 255)
    ones = torch.ones(1, 3, 2, 2)
    assert to_unit_range(ones) is ones
    for wrong in (
        ones * -0.5,
        ones * 1.2,
        ones * 255,
        ones * float("nan"),
        ones.long(),
        ones[0],
        ones[:, :1],
    ):
        with pytest.raises(ValueError, match="image"):
            to_unit_range(wrong)
