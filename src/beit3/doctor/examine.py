"""The examination: all checks in order, those that need no torch first."""

import platform
from collections.abc import Iterator

from beit3.doctor.findings import note, ok
from beit3.doctor.machine import (
    check_compiler,
    check_cores,
    check_disk,
    check_host_name,
    check_memory,
)
from beit3.doctor.packages import check_packages
from beit3.doctor.torch_build import (
    check_devices,
    check_jpeg,
    check_processes,
    check_threads,
    check_torch,
    check_torchvision,
)
from beit3.doctor.weights import check_text_tokenizers, check_weights


def examine(*, text_model: str = "", weights: str = "") -> Iterator[str]:
    """Yields the findings, each as soon as it is known.

    Args:
        text_model: A SentencePiece file to check in place of those of the cached worlds.
        weights: A weights directory or run to check completely; empty = none.
    """
    yield ok(f"python {platform.python_version()}")
    yield from check_packages()
    yield check_cores()
    yield check_memory()
    yield from check_disk()
    yield check_compiler()
    yield check_host_name()
    yield from check_text_tokenizers(text_model)

    and_weights = ", the weights" if weights else ""
    torch_fault = check_torch()
    if torch_fault:
        yield torch_fault
        yield note(
            "not checked until torch imports: torchvision, threads, accelerator, processes"
            f"{and_weights}"
        )
        return
    yield check_threads()
    yield from check_devices()
    yield check_processes()
    torchvision_fault = check_torchvision()
    if torchvision_fault:
        yield torchvision_fault
        yield note(f"not checked until torchvision fits: decoding of images{and_weights}")
        return
    yield ok("torchvision fits torch")
    yield check_jpeg()
    if weights:
        yield check_weights(weights, text_model)
