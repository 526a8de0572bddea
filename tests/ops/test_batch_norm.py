"""The statistics of batch norms that several processes have accumulated."""

import pytest
import torch
from torch import nn

from beit3.ops import batch_norm
from beit3.ops.batch_norm import average_batch_norm_statistics


@pytest.mark.parametrize("num_processes", [1, 2])
def test_running_statistics_become_the_mean_over_processes(monkeypatch, num_processes):
    """The second process has statistics three times as large as this one."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm = network[1]
    norm.running_mean.copy_(torch.arange(4.0))
    norm.running_var.copy_(torch.arange(1.0, 5.0))
    norm.num_batches_tracked.fill_(7)
    weights = [parameter.clone() for parameter in network.parameters()]
    monkeypatch.setattr(batch_norm, "world_size", lambda: num_processes)
    monkeypatch.setattr(batch_norm, "all_reduce", lambda tensor: 4 * tensor)
    average_batch_norm_statistics(network)
    factor = 1 if num_processes == 1 else 2
    assert norm.running_mean.tolist() == [factor * value for value in (0, 1, 2, 3)]
    assert norm.running_var.tolist() == [factor * value for value in (1, 2, 3, 4)]
    assert norm.num_batches_tracked == 7
    assert all(map(torch.equal, network.parameters(), weights))
