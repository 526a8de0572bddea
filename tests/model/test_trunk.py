"""The image trunk equals the network without class token, and a loop over windows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from beit3.model.beit3 import BEiT3
from beit3.model.config import GIANT, TINY, TINY_RELEASE
from beit3.model.trunk import (
    ImageBlock,
    ImageTrunk,
    join_windows,
    make_image_layout,
    space_global_layers,
    split_windows,
)

PAPER = replace(
    TINY,
    dim=32,
    depth=3,
    ffn_dim=48,
    image_size=32,
    patch_size=8,
    vocab_size=40,
    text_positions=20,
    final_norm=False,
)
RELEASE = replace(
    TINY_RELEASE,
    dim=32,
    depth=3,
    ffn_dim=48,
    image_size=32,
    vocab_size=40,
    text_positions=20,
    final_norm=False,
)
BOTH_FORMS = pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])


def randomize(module, seed=1):
    """Returns the module in float64, with all parameters away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval().init_weights(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2
            )
    return module


def make_images(height=32, width=32):
    return torch.rand(
        2, 3, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


@BOTH_FORMS
def test_the_trunk_equals_the_network_whose_patches_ignore_the_class_token(config):
    network = randomize(BEiT3(config))
    trunk = ImageTrunk(config).double().eval()
    names = set(trunk.state_dict())
    assert names < set(network.state_dict())
    trunk.load_state_dict(
        {name: value for name, value in network.state_dict().items() if name in names}
    )
    attention_mask = torch.ones(17, 17, dtype=torch.bool)
    attention_mask[1:, 0] = False
    expected = network(image=make_images(), attention_mask=attention_mask).of("image")[:, 1:]
    torch.testing.assert_close(trunk(make_images()).flatten(1, 2), expected, rtol=1e-12, atol=1e-12)


@BOTH_FORMS
def test_the_trunk_has_no_parameters_of_text_or_fusion(config):
    assert not [
        name
        for name, _ in ImageTrunk(config).named_parameters()
        if ".text" in name or ".fusion" in name or "text_" in name
    ]


@BOTH_FORMS
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_window_of_the_size_of_the_grid_changes_nothing(config, size):
    plain = randomize(ImageTrunk(config))
    windowed = ImageTrunk(config, window=5 if size == (24, 40) else 4, num_global=1).double().eval()
    windowed.load_state_dict(plain.state_dict())
    image = make_images(*size)
    if size == (24, 40):  # 3 x 5 patches in a window of 5 x 5: two rows of zeros are attended to
        assert (windowed(image) - plain(image)).abs().max() > 1e-3
        return
    torch.testing.assert_close(windowed(image), plain(image), rtol=1e-12, atol=1e-12)


@BOTH_FORMS
@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 7)])
def test_a_windowed_block_equals_a_loop_over_windows(config, grid):
    height, width = grid
    block = ImageBlock(config, 1, window=2)
    with torch.no_grad():
        for parameter in block.double().eval().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    states = torch.randn(2, height, width, config.dim, dtype=torch.float64)
    normed = block.norm1((states.flatten(1, 2),), ("image",))[0].unflatten(1, grid)
    attended = torch.zeros_like(states)
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            patches = normed[:, top : top + 2, left : left + 2]
            num_rows, num_columns = patches.shape[1:3]
            padded = F.pad(patches, (0, 0, 0, 2 - num_columns, 0, 2 - num_rows)).flatten(1, 2)
            result = block.attention((padded,), make_image_layout(4))[0].unflatten(1, (2, 2))
            attended[:, top : top + 2, left : left + 2] = result[:, :num_rows, :num_columns]
    middle = states + attended
    normed = block.norm2((middle.flatten(1, 2),), ("image",))
    expected = middle + block.ffn(normed, ("image",))[0].unflatten(1, grid)
    torch.testing.assert_close(block(states), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("height, width, window", [(4, 6, 2), (5, 7, 3), (1, 1, 4), (8, 8, 8)])
def test_joining_windows_inverts_splitting(height, width, window):
    states = torch.randn(3, height, width, 5)
    windows = split_windows(states, window)
    assert windows.shape[1:] == (window, window, 5)
    assert torch.equal(join_windows(windows, height, width), states)


def test_global_blocks_are_spaced_evenly():
    """The positions are those of ViTDet, continued to 40 layers."""
    assert space_global_layers(12, 4) == (2, 5, 8, 11)
    assert space_global_layers(24, 4) == (5, 11, 17, 23)
    assert space_global_layers(32, 4) == (7, 15, 23, 31)
    assert space_global_layers(40, 4) == (9, 19, 29, 39)
    assert [
        block.window for block in ImageTrunk(replace(PAPER, depth=4), window=2, num_global=2).blocks
    ] == [2, 0, 2, 0]


def test_stochastic_depth_drops_images_not_windows():
    block = ImageBlock(replace(PAPER, drop_path_rate=0.5), 2, window=2).train()
    torch.manual_seed(0)
    states = torch.randn(16, 4, 4, 32)
    changed = (block(states) - states).abs().amax(-1) > 0  # [B, h, w]
    assert all(bool(image.all()) or not bool(image.any()) for image in changed)
    assert 0 < sum(bool(image.any()) for image in changed) < 16


def test_all_parameters_but_the_unused_have_gradients():
    trunk = ImageTrunk(PAPER, window=2, num_global=1)
    trunk.init_weights(0)
    (trunk(make_images().float()) ** 2).sum().backward()
    without_gradient = {
        name
        for name, parameter in trunk.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without_gradient == set(trunk.unused_parameters)


def test_the_giant_takes_images_of_1280_pixels():
    with torch.device("meta"):
        trunk = ImageTrunk(replace(GIANT, image_size=224, patch_size=16), window=16)
        assert trunk(torch.empty(1, 3, 1280, 1280)).shape == (1, 80, 80, 1408)


def test_impossible_windows_and_global_blocks_are_refused():
    with pytest.raises(ValueError, match="window -1"):
        ImageTrunk(PAPER, window=-1)
    with pytest.raises(ValueError, match="9 global blocks of 3"):
        ImageTrunk(PAPER, window=2, num_global=9)
