"""Checks of the machine: small control groups, full disks, missing compilers and host names."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from beit3.doctor import machine
from tests.doctor.findings import write_files

GROUPS = {
    "version 2, the limit of a group above": (
        {
            "proc/self/cgroup": "0::/pod/job\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/job/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/memory.max": "max\n",
        },
        (1.5, 2**30),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        (0.5, 2**29),
    ),
    "version 1 without limits": (
        {
            "proc/self/cgroup": "2:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        (math.inf, math.inf),
    ),
    "version 2 seen from inside a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        (2.0, math.inf),
    ),
    "no control groups": ({}, (math.inf, math.inf)),
}


@pytest.mark.parametrize(("files", "limits"), GROUPS.values(), ids=GROUPS)
def test_limits_of_control_groups_are_read(files, limits, tmp_path):
    assert machine.read_group_limits(write_files(tmp_path, files)) == limits


def test_cores_are_limited_by_affinity_and_by_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "count_cores", lambda: 4)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    assert machine.check_cores(tmp_path) == "ok    4 CPU cores of the machine's 64"
    system = write_files(tmp_path, GROUPS["version 2, the limit of a group above"][0])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    finding = machine.check_cores(system)
    assert finding.startswith("note ") and "the time of 1.5: set OMP_NUM_THREADS=1" in finding
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine.check_cores(system).startswith("ok ")


def test_little_memory_is_noted(tmp_path):
    assert machine.check_memory().startswith("ok ")
    files = GROUPS["version 1"][0] | {
        "proc/meminfo": "MemTotal: 4 kB\nMemAvailable:    3145728 kB\n"
    }
    finding = machine.check_memory(write_files(tmp_path, files))
    assert finding.startswith("note ")
    assert "3.0 free, the control group allows 0.5, which is little" in finding


def test_full_and_forbidden_disks_are_faults(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.chdir(tmp_path)
    assert [finding[:5] for finding in machine.check_disk()] == ["ok   ", "ok   "]
    assert list(tmp_path.iterdir()) == [], "the check leaves nothing behind"

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    cache, runs = machine.check_disk()
    assert cache == (
        f"FAULT 1.0 GB free for the cache at {tmp_path}/not/there: "
        "set BEIT3_CACHE to another folder"
    )
    assert runs.endswith("train with --out on another disk")

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert next(machine.check_disk()).startswith(
        f"FAULT cannot write in {tmp_path} for the cache (Permission denied): set BEIT3_CACHE"
    )


def test_a_compiler_may_be_missing(monkeypatch):
    paths = {"clang++": "/bin/clang++"}
    monkeypatch.setattr(machine.shutil, "which", paths.get)
    assert machine.check_compiler() == "ok    C++ compiler /bin/clang++"
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    finding = machine.check_compiler()
    assert finding.startswith("note ") and "apt install" in finding


def test_a_host_name_without_address_or_answer_is_noted(monkeypatch):
    assert machine.check_host_name("localhost").startswith("ok    host name localhost is ")
    monkeypatch.setattr(machine, "RESOLVE_TIMEOUT", 0.05)

    def resolve_late(name: str) -> list[str]:
        time.sleep(0.5)
        return ["1.2.3.4"]

    for resolve in (lambda name: [], resolve_late):
        monkeypatch.setattr(machine, "_resolve_host", resolve)
        finding = machine.check_host_name("nowhere")
        assert finding.startswith("note ") and "torchrun" in finding
