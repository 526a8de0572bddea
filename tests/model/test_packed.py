"""Packed weights give equal products for any number of rows, and keep names and gradients."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.model.packed import MAX_ROWS, PackedLinear, pack

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="this torch has no MKL"
)


@torch.no_grad()
def test_packed_products_equal_plain_ones_for_any_number_of_rows():
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40)
    packed_layer = pack(copy.deepcopy(layer))
    assert isinstance(packed_layer, PackedLinear)
    packed_rows = []
    for shape in (
        (3, 5),
        (15,),
        (5, 3),
        (1,),
        (1,),
        (15,),
        (2, 15),
        (30,),
        (0, 3),
        (MAX_ROWS + 1,),
        (MAX_ROWS + 1,),
    ):
        states = torch.randn(*shape, 24)
        torch.testing.assert_close(
            packed_layer(states), F.linear(states, layer.weight, layer.bias), rtol=1e-5, atol=1e-6
        )
        packed_rows.append(packed_layer.packed_rows)
    assert packed_rows == [0, 15, 15, 15, 1, 1, 1, 30, 30, 30, 30]


@pytest.mark.parametrize("config", [TINY, TINY_RELEASE], ids=["paper", "release"])
def test_a_packed_network_keeps_its_states_and_parameter_names(config):
    torch.manual_seed(0)
    network = BEiT3(config).eval()
    network.init_weights()
    names = set(network.state_dict())
    image, text = torch.randn(2, 3, 32, 32), torch.randint(4, 90, (2, 7))
    with torch.no_grad():
        plain = network(image, text).tokens
        pack(network)
        for _ in range(3):
            torch.testing.assert_close(network(image, text).tokens, plain, rtol=1e-4, atol=1e-5)
    assert set(network.state_dict()) == names
    network(image, text).tokens.sum().backward()
    assert network.blocks[0].ffn.image.fc1.weight.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs a C++ compiler")
def test_compiled_blocks_use_the_packed_weights_of_their_own_layer():
    torch.manual_seed(0)
    network = BEiT3(TINY_RELEASE).eval()
    network.init_weights()
    pack(network)
    changed = copy.deepcopy(network)  # a copy has packed weights of its own
    changed.load_state_dict({name: value + 0.01 for name, value in network.state_dict().items()})
    image, text = torch.randn(2, 3, 32, 32), torch.randint(4, 90, (2, 7))
    with torch.no_grad():
        for packed in (network, changed):
            expected = packed(image, text).tokens
            for block in packed.blocks:
                block.compile(fullgraph=True)
                block.ffn.image.fc1.packed, block.ffn.image.fc1.last_rows = None, 0
            for _ in range(3):
                tokens = packed(image, text).tokens
                torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
            assert packed.blocks[0].ffn.image.fc1.packed_rows > 0


def test_float64_weights_are_refused():
    with pytest.raises(ValueError, match="float64"):
        pack(torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.float64)))
