"""Checks of the machine that need no torch: cores, memory, disk, compiler, host name."""

import math
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from beit3.doctor.findings import fault, note, ok, read_system_file
from beit3.files import cache_directory
from beit3.machine import count_cores

MIN_DISK_BYTES = 2 * 2**30
"""A run may fill a disk with less."""

MIN_MEMORY_BYTES = 2 * 2**30
"""Training is tight with less: the demo's runs take 0.8 GB each."""

RESOLVE_TIMEOUT = 2.0
"""Seconds that a name server may take."""


def check_cores(system: Path = Path("/")) -> str:
    """Compares the cores of this process with the CPU quota of its control group."""
    num_cores, (quota, _) = count_cores(), read_group_limits(system)
    num_machine_cores = os.cpu_count() or num_cores
    text = f"{num_cores} CPU cores"
    if num_cores < num_machine_cores:
        text += f" of the machine's {num_machine_cores}"
    if quota >= num_cores:
        return ok(text)
    text += f", the control group allows the time of {quota:g}"
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    if num_threads.isdigit() and int(num_threads) <= math.ceil(quota):
        return ok(f"{text}; OMP_NUM_THREADS={num_threads}")
    fitting = max(1, math.floor(quota))
    return note(f"{text}: set OMP_NUM_THREADS={fitting}, or threads wait for each other")


def check_memory(system: Path = Path("/")) -> str:
    """Reports the machine's memory, how much is free, and what the control group allows."""
    _, limit = read_group_limits(system)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return note("this system does not tell how much memory it has")
    free = re.search(r"MemAvailable:\s*(\d+) kB", read_system_file(system / "proc/meminfo"))
    text = f"{total / 2**30:.1f} GB memory"
    if free:
        text += f", {int(free[1]) / 2**20:.1f} free"
    if limit < total:
        text += f", the control group allows {limit / 2**30:.1f}"
    if min(limit, total) < MIN_MEMORY_BYTES:
        return note(
            f"{text}, which is little: lower data.batch or run.micro_batch, or raise the limit"
        )
    return ok(text)


def read_group_limits(system: Path = Path("/")) -> tuple[float, float]:
    """Returns the CPUs and bytes of memory that this process's control groups allow.

    Control groups of versions 1 and 2 are read. A value is infinite where there is no limit.
    """
    cpus = memory = math.inf
    for folder in _list_group_folders(system):
        quota = read_system_file(folder / "cpu.max").split()
        if not quota:
            period = read_system_file(folder / "cpu.cfs_period_us")
            quota = (read_system_file(folder / "cpu.cfs_quota_us") + period).split()
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():  # "max", -1: no limit
            cpus = min(cpus, int(quota[0]) / int(quota[1]))
        limit = read_system_file(folder / "memory.max").strip()
        limit = limit or read_system_file(folder / "memory.limit_in_bytes").strip()
        if limit.isdigit() and int(limit) < 2**60:  # version 1 writes nearly 2**63 for none
            memory = min(memory, int(limit))
    return cpus, memory


def _list_group_folders(system: Path) -> Iterator[Path]:
    """Yields the folders of this process's control groups and of all groups above them.

    Each of them may set a limit.
    """
    for line in read_system_file(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            mount = system / "sys/fs/cgroup" / controller
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield folder


def check_disk() -> Iterator[str]:
    """Checks space and permission where worlds are cached and where runs are written."""
    yield _check_folder("the cache", cache_directory(), "set BEIT3_CACHE to another folder")
    runs = Path("runs") if Path("runs").is_dir() else Path(".")
    yield _check_folder("runs", runs.resolve(), "train with --out on another disk")


def _check_folder(purpose: str, folder: Path, remedy: str) -> str:
    """Checks a folder, or the nearest existing one above it; no folder is created."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return fault(f"cannot write in {existing} for {purpose} ({error.strerror}): {remedy}")
    text = f"{free / 2**30:.1f} GB free for {purpose} at {folder}"
    return ok(text) if free > MIN_DISK_BYTES else fault(f"{text}: {remedy}")


def check_compiler() -> str:
    """Looks for a C++ compiler, which `run.compile` needs."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return ok(f"C++ compiler {path}")
    return note("no C++ compiler, only run.compile needs one: apt install g++")


def check_host_name(name: str = "") -> str:
    """Checks that this machine's name has an address, by which torchrun's processes meet."""
    name = name or socket.gethostname()
    addresses: list[str] = []

    def resolve() -> None:
        addresses.extend(_resolve_host(name))

    resolver = threading.Thread(target=resolve, daemon=True)
    resolver.start()
    resolver.join(RESOLVE_TIMEOUT)
    if addresses:
        return ok(f"host name {name} is {addresses[0]}")
    return note(
        f"host name {name} has no address, torchrun needs one: add '127.0.1.1 {name}' to /etc/hosts"
    )


def _resolve_host(name: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except OSError:
        return []
