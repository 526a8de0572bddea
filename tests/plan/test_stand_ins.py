"""Stand-in values replace outputs on which the amount of work depends; batches stay real."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from beit3.plan.allocations import AllocationTracker
from beit3.plan.stand_ins import rising_values


@pytest.fixture
def make_floats():
    """Returns a function that makes tensors without values, while operations are traced."""
    with AllocationTracker() as tracker:
        yield lambda *shape: tracker.executor.empty(shape, torch.float32)


def test_real_masks_select_their_positions(make_floats):
    states = make_floats(4, 6, 8).requires_grad_()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, :5] = True
    selected = states[mask]
    assert selected.shape == (5, 8) and int(mask.sum()) == 5
    selected.sum().backward()
    assert states.grad is not None and states.grad.shape == states.shape


def test_numbers_are_zero_so_that_checks_pass(make_floats):
    states = make_floats(3, 4)
    assert not bool((states < 0).any()) and float(states.max()) == 0


def test_masks_without_values_select_everything(make_floats):
    states = make_floats(3, 4)
    assert (states > 0).nonzero().shape == (12, 2)
    assert states[states > 0].shape == (12,)
    assert torch.bincount(states.argmax(1), minlength=7).shape == (7,)


def test_integers_are_real(make_floats):
    assert torch.arange(3).tolist() == [0, 1, 2]


def test_maxima_along_a_dimension_rise_evenly(make_floats):
    """So a threshold on them selects a known fraction."""
    values, indices = make_floats(4, 5).max(0)
    assert values.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert indices.tolist() == [0] * 5
    assert len((values >= 0.6).nonzero()) == 2
    assert make_floats(4, 5).max(1, keepdim=True).values.shape == (4, 1)


def test_integers_without_values_compare_as_zeros(make_floats):
    levels = make_floats(5).floor().long() - 2
    assert isinstance(levels, FakeTensor)
    selected = [len((levels == level).nonzero()) for level in range(3)]
    assert selected == [5, 0, 0]


def test_arrays_have_rising_values(make_floats):
    array = make_floats(2, 4).numpy()
    assert array.tolist() == [[0, 0.125, 0.25, 0.375], [0.5, 0.625, 0.75, 0.875]]
    assert torch.arange(2).numpy().tolist() == [0, 1], "real tensors keep their values"


def test_rising_values_keep_shape_and_type():
    half = rising_values(torch.ones(2, 2, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.tolist() == [[0, 0.25], [0.5, 0.75]]
    integers = rising_values(torch.ones(3, dtype=torch.int64))
    assert integers.dtype == torch.int64 and integers.tolist() == [0, 0, 0]
    assert rising_values(torch.ones(0, 4)).shape == (0, 4)
