"""Mapping rows in batches changes neither outputs nor gradients."""

import pytest
import torch

from beit3.ops.row_map import map_rows


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_give_the_outputs_and_gradients_of_one_call(batch_size):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 5).double()
    rows, offsets = torch.randn(7, 4).double(), torch.randn(7, 1).double()
    expected = layer(rows) + offsets
    expected.square().sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None

    num_rows = []

    def function(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(rows))
        return layer(rows) + offsets

    outputs = map_rows(function, rows, offsets, batch_size=batch_size)
    torch.testing.assert_close(outputs, expected)
    assert max(num_rows) <= batch_size and sum(num_rows) == 7
    outputs.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient)
    recomputed = batch_size < 7
    assert sum(num_rows) == (14 if recomputed else 7)
