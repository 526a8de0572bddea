"""The network is exported and compiled whole; empty inputs are named."""

import pytest
import torch

from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY


@pytest.fixture(scope="module")
def model() -> BEiT3:
    model = BEiT3(TINY)
    model.init_weights(seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 9:] = True
    image = torch.rand(2, 3, 32, 32, generator=generator)
    return image, torch.randint(4, 60, (2, 12), generator=generator), padding


class First(torch.nn.Module):
    """The first states of padded pairs."""

    def __init__(self, model: BEiT3):
        super().__init__()
        self.model = model

    def forward(self, image, text, padding):
        return self.model(image=image, text=text, text_padding=padding, read="first").tokens


@torch.no_grad()
def test_padded_pairs_are_exported_and_compiled_whole(model, inputs):
    network = First(model)
    expected = network(*inputs)
    exported = torch.export.export(network, inputs).module()
    torch.testing.assert_close(exported(*inputs), expected)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)


def test_empty_inputs_are_named(model, inputs):
    image, text, _ = inputs
    with pytest.raises(ValueError, match=r"image of shape \[0, 3, 32, 32\] is empty"):
        model(image=image[:0], text=text[:0])
    with pytest.raises(ValueError, match=r"text of shape \[2, 0\] is empty"):
        model(image=image, text=text[:, :0], read="first")
