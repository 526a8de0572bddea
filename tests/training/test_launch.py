"""The process and its place: device, seeds."""

import pytest
import torch

from beit3.recipe import RunConfig
from beit3.training.launch import init_device, seed_step


def test_alone_nothing_is_joined():
    assert init_device(RunConfig(device="cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_a_step_seeds_everything_by_its_number():
    draws = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        seed_step(seed, step)
        draws.append(float(torch.rand(1)))
    assert draws[0] == draws[1] and len(set(draws)) == 3


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_devices_that_are_not_here_are_the_users_fault(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"run\.device {device} .*: use auto or cpu"):
        init_device(RunConfig(device=device))
