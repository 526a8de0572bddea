"""Half precision is raised, more than float32 kept."""

import pytest
import torch

from beit3.ops.precision import promote_to_float32


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_dtypes(given, kept):
    values = torch.tensor([[0, 1], [3, 1]]).to(given)
    raised = promote_to_float32(values)
    assert raised.dtype == kept and torch.equal(raised, values.to(kept))
    assert (raised is values) == (given == kept), "nothing is copied where nothing changes"


def test_gradients_come_back_as_they_were():
    values = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    (promote_to_float32(values) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert (
        values.grad is not None
        and values.grad.dtype == torch.bfloat16
        and values.grad.tolist() == [1, 2, 3]
    )


def test_sums_of_halves_lose_nothing():
    """4096 + 1 is 4096 in float16."""
    values = torch.tensor([4096.0, 1.0], dtype=torch.float16)
    assert float(promote_to_float32(values).sum()) == 4097.0 != float(values.sum())
