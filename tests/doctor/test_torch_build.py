"""Checks of torch and torchvision, with made-up builds and devices."""

import sys
from types import SimpleNamespace

import pytest

from beit3.doctor import packages, torch_build
from tests.doctor.findings import write_files


def test_a_torchvision_of_another_build_is_a_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    versions = {"torch": "2.11.0+cpu", "torchvision": "0.26.0"}
    monkeypatch.setattr(packages, "version", versions.__getitem__)
    finding = torch_build.check_torchvision()
    assert finding.startswith(
        "FAULT torchvision 0.26.0 does not fit torch 2.11.0+cpu (import of torchvision halted"
    )
    command = "pip install --force-reinstall torch torchvision"
    assert finding.endswith(f"{command} --index-url https://download.pytorch.org/whl/cpu")
    versions = {"torch": "2.11.0", "torchvision": "0.26.0+cpu"}
    monkeypatch.setattr(packages, "version", versions.__getitem__)
    assert torch_build.check_torchvision().endswith(command)


def test_a_jpeg_that_decodes_wrongly_is_a_fault(monkeypatch):
    torch, io = pytest.importorskip("torch"), pytest.importorskip("torchvision.io")
    assert torch_build.check_jpeg() == "ok    torchvision decodes JPEG"
    black = torch.zeros(3, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(io, "decode_image", lambda *_: black)
    assert torch_build.check_jpeg().startswith(
        "FAULT torchvision does not decode JPEG (it decodes wrongly)"
    )


def test_more_threads_than_cores_are_noted(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch_build, "count_cores", lambda: 2)
    finding = torch_build.check_threads()
    assert finding.startswith("note ") and finding.endswith("set OMP_NUM_THREADS=2")


# Devices -----------------------------------------------------------------------------------------


class FakeCuda:
    """The members of `torch.cuda` that the doctor uses; one device per major capability."""

    nccl = SimpleNamespace(version=lambda: (2, 27, 3))

    def __init__(self, *majors: int):
        self.majors = majors

    def is_available(self) -> bool:
        return bool(self.majors)

    def device_count(self) -> int:
        return len(self.majors)

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=f"card {index}", total_memory=80 * 2**30, major=self.majors[index], minor=0
        )


def fake_devices(
    monkeypatch, cuda: FakeCuda, *, build: str | None = "13.0", driver: str = "580.1"
) -> None:
    """Replaces torch's devices, the CUDA version it was built for, and the driver."""
    torch = pytest.importorskip("torch")
    total = SimpleNamespace(item=lambda: 2.0)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch, "ones", lambda size, device: SimpleNamespace(sum=lambda: total))
    monkeypatch.setattr(torch_build, "read_driver_version", lambda: driver)


def test_each_device_is_checked(monkeypatch):
    fake_devices(monkeypatch, FakeCuda(9, 7))
    assert list(torch_build.check_devices()) == [
        "ok    CUDA 13.0, driver 580.1",
        "ok    device 0: card 0, 80 GB, capability 9.0, bfloat16",
        "note  device 1: card 1, 80 GB, capability 7.0, no bfloat16: "
        "train with --run.precision float32",
    ]

    def fail(size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(sys.modules["torch"], "ones", fail)
    findings = list(torch_build.check_devices())
    assert [finding[:5] for finding in findings] == ["ok   ", "FAULT", "FAULT"]


@pytest.mark.parametrize(
    ("build", "driver", "text"),
    [
        ("13.0", "", "no CUDA device (built for CUDA 13.0): everything runs on the CPU"),
        (None, "", "no CUDA device (a build without CUDA): everything runs on the CPU"),
        (
            None,
            "580.1",
            "NVIDIA driver 580.1 is installed, but torch sees no device; "
            "this torch is a build without CUDA: install",
        ),
    ],
)
def test_a_machine_without_device_is_noted(build, driver, text, monkeypatch):
    fake_devices(monkeypatch, FakeCuda(), build=build, driver=driver)
    (finding,) = torch_build.check_devices()
    assert finding.startswith("note ") and text in finding


def test_backends_of_several_processes_are_reported(monkeypatch):
    dist = pytest.importorskip("torch.distributed")
    fake_devices(monkeypatch, FakeCuda(9))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert torch_build.check_processes() == "ok    several processes: gloo, NCCL 2.27.3"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert torch_build.check_processes().startswith("note  several processes: gloo, but no NCCL")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert torch_build.check_processes().startswith("note  this torch has no gloo")


@pytest.mark.parametrize(
    "kind", ["NVIDIA UNIX x86_64 Kernel Module  ", "NVIDIA UNIX Open Kernel Module for x86_64  "]
)
def test_the_drivers_version_is_read(kind, tmp_path):
    assert torch_build.read_driver_version(tmp_path) == ""
    text = f"NVRM version: {kind}580.65.06  Release Build\nGCC version: 12\n"
    system = write_files(tmp_path, {"proc/driver/nvidia/version": text})
    assert torch_build.read_driver_version(system) == "580.65.06"
