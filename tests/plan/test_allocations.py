"""Storages of fake tensors are counted like real ones, with those that autograd saves."""

import pytest
import torch
import torch.nn.functional as F

from beit3.plan.allocations import AllocationTracker

KIB = 1024


@pytest.fixture
def tracker():
    with AllocationTracker() as tracker:
        yield tracker


def make_floats(tracker: AllocationTracker, *shape: int) -> torch.Tensor:
    return tracker.executor.empty(shape, torch.float32).requires_grad_()


def test_a_storage_counts_while_it_lives(tracker):
    first = torch.zeros(16, 16)
    assert tracker.live_bytes == KIB
    view, second = first[:4], first + first
    assert tracker.live_bytes == 2 * KIB and view.shape == (4, 16)
    del second
    assert tracker.live_bytes == KIB
    del first
    assert tracker.live_bytes == KIB, "a view keeps the storage of its base"
    del view
    assert tracker.live_bytes == 0 and tracker.activation_peak == tracker.peak == 2 * KIB
    assert tracker.largest_tensor == (KIB, "[16, 16] float32")


def test_saved_activations_count_and_weights_do_not():
    """GELU and square save their inputs, 1 KiB each; the weight has a gradient of its own."""
    tracker = AllocationTracker()
    weight = torch.nn.Parameter(make_floats(tracker, 16, 16))
    weight.register_post_accumulate_grad_hook(tracker.release_gradient)
    tracker.exclude(weight)
    with tracker:
        states = weight.view(256) * 2
        loss = F.gelu(states).square().sum()
        del states
        assert tracker.live_bytes == 2 * KIB + 4
        loss.backward()
    assert tracker.gradient_bytes == KIB and weight.grad is None
    assert tracker.live_bytes == 4
    assert 3 * KIB <= tracker.activation_peak <= tracker.peak <= tracker.activation_peak + KIB


def test_products_are_counted(tracker):
    left, right = make_floats(tracker, 3, 5), make_floats(tracker, 5, 7)
    assert (left @ right).shape == (3, 7)
    assert tracker.flops == 2 * 3 * 5 * 7
