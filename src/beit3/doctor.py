"""What this machine has, and what stands in the way: one line a finding, the remedy with it."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from beit3.train.root import cache

REQUIRED = ("torch", "torchvision", "numpy", "pillow", "sentencepiece", "safetensors", "tyro", "rich", "matplotlib", "tensorboard")
DEVELOPMENT = ("pytest", "hypothesis", "ruff", "mypy")
DISK = 2 * 2**30
"""Bytes below which a run may fill the disk."""


def examine() -> Iterator[str]:
    """Findings in order: Python, packages, torch beside torchvision, processors, accelerator, disk, cache."""
    yield f"ok    python {platform.python_version()}"
    for name in REQUIRED:
        try:
            yield f"ok    {name} {version(name)}"
        except PackageNotFoundError:
            yield f"FAULT {name} is missing: pip install beit3"
    missing = [name for name in DEVELOPMENT if importlib.util.find_spec(name) is None]
    if missing:
        yield f"note  not installed, needed only to develop: {', '.join(missing)} (pip install 'beit3[dev]')"
    yield vision()
    yield f"ok    {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} processor cores"
    yield accelerator()
    place = cache()
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    verdict, remedy = ("ok   ", "") if free > DISK else ("FAULT", ": set BEIT3_CACHE to a larger place")
    yield f"{verdict} {free / 2**30:.1f} GB free at the cache {place}{remedy}"


def vision() -> str:
    """Whether torchvision's compiled operators belong to this torch."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        return f"FAULT torchvision does not fit torch ({reason}): install both from one index"
    return "ok    torchvision fits torch"


def accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        return f"ok    {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"note  no CUDA device: everything runs on the CPU with {torch.get_num_threads()} threads"
