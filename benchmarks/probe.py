"""Functions of all benchmarks: a matrix product as a probe, timing, and the file of results."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from beit3.files import write_text


def measure_product_rate(size: int = 1536) -> float:
    """Measures the FLOP/s of a square float32 matrix product now, the best of three."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: left @ right) for _ in range(3))


def seconds(call: Callable[[], object]) -> float:
    """Measures the wall time of one call in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read_peak_memory() -> float:
    """Returns the peak resident memory of this process in bytes.

    `getrusage` would include that of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def save_results(path: Path, table: str, figures: Any) -> None:
    """Writes a JSON file of the printed table, all its numbers, the machine, date and commit.

    `benchmarks/results.py` puts the tables into RESULTS.md.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    result = {
        "table": table.strip(),
        "machine": describe_machine(),
        "date": f"{date.today()}",
        "commit": commit,
        "figures": figures,
    }
    write_text(path, json.dumps(result, indent=1) + "\n")


def describe_machine() -> str:
    """Describes the cores with their vector instructions, the GPU and torch."""
    capabilities = torch.cpu.get_capabilities()
    instructions = [
        name for name in ("avx2", "avx512_f", "avx512_vnni", "amx_int8") if capabilities.get(name)
    ]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores ({', '.join(instructions)})"
    return f"{gpu}{cores}, torch {torch.__version__}"
