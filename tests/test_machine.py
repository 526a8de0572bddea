"""What is asked of the machine's allocator."""

import ctypes
import subprocess
import sys

import pytest

from beit3.machine import keep_freed_memory

COUNT_PAGES = """
import resource
import torch
from beit3.machine import keep_freed_memory
if {keeps}:
    keep_freed_memory()
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill()
print(fill())
"""


def count_new_pages(keeps: bool) -> int:
    """Returns how many pages a second tensor of 64 MiB gets from the system."""
    code = COUNT_PAGES.format(keeps=keeps)
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the option is glibc's")
def test_memory_of_a_freed_tensor_serves_the_next_one():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not glibc")
    assert count_new_pages(keeps=False) > 1000
    assert count_new_pages(keeps=True) < 100


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
