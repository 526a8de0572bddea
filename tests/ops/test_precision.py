"""Half precision is promoted to float32, and float64 stays."""

import pytest
import torch

from beit3.ops.precision import promote_to_float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_only_float64_is_not_converted_to_float32(dtype, expected):
    values = torch.tensor([[0, 1], [3, 1]]).to(dtype)
    promoted = promote_to_float32(values)
    assert promoted.dtype == expected and torch.equal(promoted, values.to(expected))
    assert (promoted is values) == (dtype == expected), "an equal type is not copied"


def test_gradients_have_the_original_type():
    values = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    (promote_to_float32(values) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.bfloat16
    assert values.grad.tolist() == [1, 2, 3]


def test_sums_of_float16_values_are_exact():
    """4096 + 1 is 4096 in float16."""
    values = torch.tensor([4096.0, 1.0], dtype=torch.float16)
    assert float(promote_to_float32(values).sum()) == 4097.0 != float(values.sum())
