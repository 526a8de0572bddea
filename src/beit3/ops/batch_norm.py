"""Batch norms in a network that several processes train."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from beit3.ops.collectives import all_reduce, world_size


def sync_batch_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns `module` with batch norms that normalize over all processes, if these use CUDA.

    Otherwise returns it unchanged: torch's SyncBatchNorm raises on CPU, and without a process
    group it is a plain batch norm. Works on the meta device; call it before sharding.
    """
    if world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


@torch.no_grad()
def average_batch_norm_statistics(module: nn.Module) -> None:
    """Replaces the running statistics of all batch norms by their mean over processes.

    Where batch norms are not synchronized, each process has accumulated its own.
    """
    if world_size() == 1:
        return
    for norm in module.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        for buffer in norm.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.copy_(all_reduce(buffer) / world_size())
