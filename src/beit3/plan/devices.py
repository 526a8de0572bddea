"""Accelerators by name, with their makers' figures: memory, and the peak of dense bfloat16 matrix products.

Both are of data sheets (SXM or HGX form where there are several); sheets that print the doubled rate of sparse products
are halved. A sheet's GB is a GiB of what the driver shows. `cpu` is this machine: its memory, and a product measured now.
"""

import os
import time
from dataclasses import dataclass

import torch

from beit3.config import suggestion

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or a processor."""

    name: str
    memory: int
    """GiB."""
    teraflops: float
    """Dense bfloat16; of a processor float32."""


DEVICES = {
    each.name: each
    for each in (
        Device("a100-40", 40, 312),
        Device("a100-80", 80, 312),
        Device("h100-pcie", 80, 756),
        Device("h100", 80, 989),
        Device("h200", 141, 989),
        Device("b200", 180, 2250),
        Device("mi300x", 192, 1307),
        Device("l4", 24, 121),
        Device("l40s", 48, 362),
        Device("a6000", 48, 155),
        Device("rtx3090", 24, 71),
        Device("rtx4090", 24, 165),
        Device("rtx5090", 32, 209),
    )
}


def device(name: str) -> Device:
    """The device of this name. ValueError for one that is not listed."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", memory // GIB, processor_teraflops())
    if name not in DEVICES:
        raise ValueError(
            f"--gpu {name} is not listed{suggestion(name, list(DEVICES))} (known: {', '.join(DEVICES)}, cpu)"
        )
    return DEVICES[name]


def processor_teraflops(size: int = 1024) -> float:
    """Rate of float32 matrix products here, the best of five, with the threads that torch has."""
    one, other = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12
