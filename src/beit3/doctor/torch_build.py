"""Checks of torch and torchvision: whether they import, fit each other, and use this machine."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.doctor.findings import describe_error, fault, note, ok, read_system_file
from beit3.doctor.packages import get_version
from beit3.machine import count_cores


def check_torch() -> str:
    """Returns a fault where torch does not import, else an empty string."""
    try:
        import torch

        torch.zeros(1)
    except Exception as error:  # a damaged installation may raise anything
        return fault(f"torch does not import ({describe_error(error)}): {suggest_reinstall()}")
    return ""


def check_torchvision() -> str:
    """Returns a fault where torchvision's compiled operators are of another torch, else nothing."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # ImportError, RuntimeError, AttributeError or OSError were seen
        torchvision_version, torch_version = get_version("torchvision"), get_version("torch")
        return fault(
            f"torchvision {torchvision_version} does not fit torch {torch_version} "
            f"({describe_error(error)}): {suggest_reinstall()}"
        )
    return ""


def suggest_reinstall() -> str:
    """Returns the command that installs torch and torchvision from one index.

    It is the index that torch came from, where its version says so.
    """
    build = get_version("torch").partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"install both from one index, pip install --force-reinstall torch torchvision{index}"


def check_jpeg() -> str:
    """Checks that torchvision decodes a JPEG of 16 x 16 red pixels as red."""
    try:
        import torch
        from PIL import Image
        from torchvision.io import ImageReadMode, decode_image

        file = io.BytesIO()
        Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "JPEG")
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        image = decode_image(data, ImageReadMode.RGB)  # [3, 16, 16]
        red, green, _ = image.float().mean(dim=(1, 2)).tolist()
        if tuple(image.shape) != (3, 16, 16) or abs(red - 200) > 8 or abs(green - 30) > 8:
            raise RuntimeError("it decodes wrongly")
    except Exception as error:
        return fault(
            f"torchvision does not decode JPEG ({describe_error(error)}): {suggest_reinstall()}"
        )
    return ok("torchvision decodes JPEG")


def check_threads() -> str:
    """Compares the threads that torch computes with to the cores of this process."""
    import torch

    num_threads, num_cores = torch.get_num_threads(), count_cores()
    setting = os.environ.get("OMP_NUM_THREADS", "")
    text = f"torch computes with {num_threads} threads"
    if setting:
        text += f" (OMP_NUM_THREADS={setting})"
    if num_threads > num_cores:
        return note(f"{text} on {num_cores} cores, which is slow: set OMP_NUM_THREADS={num_cores}")
    return ok(text)


def check_devices() -> Iterator[str]:
    """Checks driver and CUDA, then each CUDA device."""
    import torch

    driver = read_driver_version()
    if torch.cuda.is_available():
        yield ok(f"CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
        for index in range(torch.cuda.device_count()):
            yield check_device(torch, index)
        return
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "a build without CUDA"
    if driver:
        yield note(
            f"NVIDIA driver {driver} is installed, but torch sees no device; "
            f"this torch is {build}: install one that fits the driver, "
            "https://pytorch.org/get-started/locally"
        )
    else:
        yield note(f"no CUDA device ({build}): everything runs on the CPU")


def check_device(torch: Any, index: int) -> str:
    """Computes a sum on a CUDA device and reports its memory and whether it has bfloat16."""
    properties = torch.cuda.get_device_properties(index)
    text = (
        f"device {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GB, "
        f"capability {properties.major}.{properties.minor}"
    )
    try:
        torch.ones(2, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        return fault(
            f"{text}, does not compute ({describe_error(error)}): "
            "free it, or install a torch built for it"
        )
    if properties.major < 8:  # Ampere is the first generation with bfloat16 in its tensor cores
        return note(f"{text}, no bfloat16: train with --run.precision float32")
    return ok(f"{text}, bfloat16")


def read_driver_version(system: Path = Path("/")) -> str:
    """Returns the version of the NVIDIA kernel driver, or an empty string where there is none."""
    text = read_system_file(system / "proc/driver/nvidia/version")
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d+[\d.]*)", text)
    return match[1] if match else ""


def check_processes() -> str:
    """Reports the backends through which several processes can communicate."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return note(
            "this torch has no gloo, so a run is one process: "
            "install torch from pytorch.org for torchrun"
        )
    if not torch.cuda.is_available():
        return ok("several processes: gloo")
    if not dist.is_nccl_available():
        return note(
            "several processes: gloo, but no NCCL, so a run on several devices is not possible: "
            "install torch for Linux"
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return ok(f"several processes: gloo, NCCL {nccl}")
