"""Starting a process: its device and its seeds."""

import pytest
import torch

from beit3.recipe import RunConfig
from beit3.training import launch
from beit3.training.launch import init_device, seed_step


def test_one_process_joins_no_process_group():
    assert init_device(RunConfig(device="cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_seeds_depend_on_run_and_step():
    numbers = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        seed_step(seed, step)
        numbers.append(float(torch.rand(1)))
    assert numbers[0] == numbers[1] and len(set(numbers)) == 3


def test_every_process_draws_random_numbers_of_its_own(monkeypatch):
    numbers = []
    for rank in (0, 1, 2, 0):
        monkeypatch.setattr(launch, "rank", lambda rank=rank: rank)
        seed_step(0, 1)
        numbers.append(float(torch.rand(1)))
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_absent_devices_are_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"run\.device {device} .*: use auto or cpu"):
        init_device(RunConfig(device=device))
