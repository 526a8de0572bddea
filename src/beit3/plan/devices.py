"""Lists accelerators with their makers' specifications: memory, and the peak rate of dense bfloat16
matrix products.

Both are from data sheets (SXM or HGX form where there are several); sheets that print the doubled
rate of sparse products are halved. A sheet's GB is a GiB as the driver shows it. `cpu` is this
machine: its memory, and a rate that is measured at the call.
"""

import os
import time
from dataclasses import dataclass

import torch

from beit3.config import suggest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU."""

    name: str
    memory: int
    """GiB."""
    teraflops: float
    """Dense bfloat16; of a CPU float32."""


DEVICES = {
    device.name: device
    for device in (
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


def find_device(name: str) -> Device:
    """Returns the device of this name; raises ValueError for one that is not listed."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", memory // GIB, measure_cpu_teraflops())
    if name not in DEVICES:
        hint = suggest(name, list(DEVICES))
        raise ValueError(f"--gpu {name} is not listed{hint} (known: {', '.join(DEVICES)}, cpu)")
    return DEVICES[name]


def measure_cpu_teraflops(size: int = 1024) -> float:
    """Returns the rate of float32 matrix products on this machine: the best of five, with torch's
    threads."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12
