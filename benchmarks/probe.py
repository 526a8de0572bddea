"""Shared by all benchmarks: the rate of a plain matrix product, and the file of the results."""

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


def probe(size: int = 1536) -> float:
    """FLOP/s of a square matrix product in float32 at this moment: the best of three."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: one @ other) for _ in range(3))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_memory() -> float:
    """Most resident memory of this program so far, bytes. Not `getrusage`'s, which a program
    inherits from what started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def save(path: Path, table: str, figures: Any) -> None:
    """A JSON file of the printed table, all figures behind it, and where, when and from which
    commit they are.

    `benchmarks/results.py` puts the tables into RESULTS.md.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    result = {
        "table": table.strip(),
        "machine": machine(),
        "date": f"{date.today()}",
        "commit": commit,
        "figures": figures,
    }
    write_text(path, json.dumps(result, indent=1) + "\n")


def machine() -> str:
    """Cores, the widest instructions of their kind, and torch."""
    able = torch.cpu.get_capabilities()
    kinds = [name for name in ("avx2", "avx512_f", "avx512_vnni", "amx_int8") if able.get(name)]
    chip = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores ({', '.join(kinds)})"
    return f"{chip}{cores}, torch {torch.__version__}"
