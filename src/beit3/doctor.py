"""What this machine has, and what stands in the way: one line a finding, `ok`, `note` or `FAULT`,
the remedy with it.

Only the standard library, and modules of this package that need no more, are imported at the top:
this must speak where torch does not import,
so everything that can be told without torch is told first.
"""

import io
import math
import os
import platform
import re
import shutil
import socket
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from beit3.files import cache_directory
from beit3.machine import count_cores

RELEASED_IDS = 64002
"""Ids of the tokenizer released with BEiT-3: 64000 pieces, <mask> and the shift by one."""

DISK = 2 * 2**30
"""Bytes below which a run may fill the disk."""

MEMORY = 2 * 2**30
"""Bytes below which training is tight: the demo's runs take 0.8 GB each."""

PATIENCE = 2.0
"""Seconds that a name server may take."""


def examine(*, text_model: str = "", weights: str = "") -> Iterator[str]:
    """Findings in order: packages, processors, memory, disk, compiler, host name, text tokenizers;
    then torch and what stands on it.

    text_model: a SentencePiece file to look at instead of the cached worlds'. weights: a directory
    or run to check whole.
    """
    yield f"ok    python {platform.python_version()}"
    yield from packages()
    yield processors()
    yield memory()
    yield from disk()
    yield compiler()
    yield host()
    yield from text_tokenizers(text_model)
    broken = broken_torch()
    if broken:
        yield broken
        yield (
            "note  not looked at until torch imports: torchvision, threads, accelerator, processes"
            + (", the weights" if weights else "")
        )
        return
    yield threads()
    yield from accelerator()
    yield processes()
    fits = vision()
    yield fits
    if fits.startswith("FAULT"):
        yield "note  not looked at until torchvision fits: decoding of pictures" + (
            ", the weights" if weights else ""
        )
        return
    yield jpeg()
    if weights:
        yield stored_weights(weights, text_model)


# Without torch ------------------------------------------------------------------------------------


def packages() -> Iterator[str]:
    """What the package needs, and for each of its extras what is missing."""
    lacking: dict[str, list[str]] = {}
    for name, least, extra in map(requirement, requirements()):
        have = installed(name)
        if not extra:
            yield package(name, have, least)
        elif older(have, least) and name != "beit3":  # an extra may be made of others
            lacking.setdefault(extra, []).append(name)
    for extra, names in lacking.items():
        yield f"note  the extra {extra} is not complete, {', '.join(names)} missing or old: pip install 'beit3[{extra}]' if you need it"


def requirements() -> list[str]:
    """What the package asks for: by its metadata, else by the pyproject.toml of the source that it
    runs from."""
    try:
        return requires("beit3") or []
    except PackageNotFoundError:
        project = tomllib.loads(_text(Path(__file__).parents[2] / "pyproject.toml")).get(
            "project", {}
        )
    extras = project.get("optional-dependencies", {})
    return project.get("dependencies", []) + [
        f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines
    ]


def requirement(line: str) -> tuple[str, str, str]:
    """(name, least version or "", extra or "") of a requirement as package metadata has it."""
    name = re.match(r"[\w.-]+", line)
    least, extra = (
        re.search(r">=\s*([\w.]+)", line),
        re.search(r"extra\s*==\s*['\"]([\w.-]+)", line),
    )
    assert name
    return name[0], least[1] if least else "", extra[1] if extra else ""


def installed(name: str) -> str:
    """The version of a package; empty where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def older(have: str, least: str) -> bool:
    """Whether a version is missing or below the least that will do; they are compared number by
    number."""
    return not have or _numbers(have) < _numbers(least)


def package(name: str, have: str, least: str) -> str:
    if not have:
        return f"FAULT {name} is missing: pip install beit3"
    if older(have, least):
        return f"FAULT {name} {have} is older than {least}: pip install '{name}>={least}'"
    return f"ok    {name} {have}"


def processors(system: Path = Path("/")) -> str:
    """Cores of this process by affinity and by its control group's share of time."""
    cores, quota = count_cores(), group_limits(system)[0]
    all_cores = os.cpu_count() or cores
    said = f"{cores} processor cores" + (
        f" of the machine's {all_cores}" if cores < all_cores else ""
    )
    if quota >= cores:
        return f"ok    {said}"
    fit = max(1, math.floor(quota))
    if (chosen := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(chosen) <= math.ceil(
        quota
    ):
        return (
            f"ok    {said}, the control group gives the time of {quota:g}; OMP_NUM_THREADS={chosen}"
        )
    return f"note  {said}, but the control group gives the time of {quota:g}: set OMP_NUM_THREADS={fit}, or threads wait for each other"


def memory(system: Path = Path("/")) -> str:
    """Memory of the machine, what is free of it, and what the control group allows."""
    limit = group_limits(system)[1]
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "note  this system does not say how much memory it has"
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text(system / "proc/meminfo"))
    said = f"{total / 2**30:.1f} GB memory" + (f", {int(free[1]) / 2**20:.1f} free" if free else "")
    said += f", the control group allows {limit / 2**30:.1f}" if limit < total else ""
    if min(limit, total) < MEMORY:
        return f"note  {said}, which is little: lower data.batch or run.micro_batch, or raise the limit"
    return f"ok    {said}"


def group_limits(system: Path = Path("/")) -> tuple[float, float]:
    """(processors, bytes) that this process's control groups allow, of versions 1 and 2; infinite
    where there is no limit."""
    cpus = size = math.inf
    for folder in _groups(system):
        quota = (
            _text(folder / "cpu.max")
            or _text(folder / "cpu.cfs_quota_us") + _text(folder / "cpu.cfs_period_us")
        ).split()
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():  # "max" and -1: no limit
            cpus = min(cpus, int(quota[0]) / int(quota[1]))
        limit = (
            _text(folder / "memory.max").strip() or _text(folder / "memory.limit_in_bytes").strip()
        )
        if limit.isdigit() and int(limit) < 2**60:  # version 1 writes nearly 2**63 for none
            size = min(size, int(limit))
    return cpus, size


def _groups(system: Path) -> Iterator[Path]:
    """The folders of this process's control groups, and all above them, since each may set a
    limit."""
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            mount = system / "sys/fs/cgroup" / name
            inner = mount / path.lstrip("/")
            yield from (
                folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount)
            )


def disk() -> Iterator[str]:
    """Room and permission where worlds are cached and where runs go."""
    runs = Path("runs") if Path("runs").is_dir() else Path(".")
    for what, place, remedy in (
        ("the cache", cache_directory(), "set BEIT3_CACHE to another place"),
        ("runs", runs.resolve(), "train with --out on another disk"),
    ):
        there = next(
            folder for folder in (place, *place.parents) if folder.exists()
        )  # nothing is made that is not there
        free = shutil.disk_usage(there).free
        try:
            with tempfile.TemporaryFile(dir=there):
                verdict = "ok   " if free > DISK else "FAULT"
        except OSError as error:
            yield f"FAULT cannot write in {there} for {what} ({error.strerror}): {remedy}"
            continue
        yield f"{verdict} {free / 2**30:.1f} GB free for {what} at {place}" + (
            f": {remedy}" if verdict == "FAULT" else ""
        )


def compiler() -> str:
    """A C++ compiler, which `run.compile` needs."""
    found = next(
        (
            path
            for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++")
            if name and (path := shutil.which(name))
        ),
        "",
    )
    return (
        f"ok    C++ compiler {found}"
        if found
        else "note  no C++ compiler, only run.compile needs one: apt install g++"
    )


def host(name: str = "") -> str:
    """Whether this machine's name leads to an address: processes of torchrun find each other by
    it."""
    name, found = name or socket.gethostname(), []
    ask = threading.Thread(target=lambda: found.extend(_addresses(name)), daemon=True)
    ask.start()
    ask.join(PATIENCE)
    if found:
        return f"ok    host name {name} is {found[0]}"
    return f"note  host name {name} leads to no address, torchrun needs one: add '127.0.1.1 {name}' to /etc/hosts"


def _addresses(name: str) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None)]
    except OSError:
        return []


def text_tokenizers(text_model: str = "") -> Iterator[str]:
    """Ids and digest of the given tokenizer, else of the cached worlds'; nothing where there is
    none yet."""
    files = (
        [Path(text_model)]
        if text_model
        else sorted(cache_directory().glob("world-*-records/text.model"))
    )
    for path in files:
        try:
            from beit3.tokenizer.text import TextTokenizer

            tokenizer = TextTokenizer(path)
        except (ValueError, OSError, ImportError) as error:
            yield f"FAULT text tokenizer: {_reason(error)}"
            continue
        released = tokenizer.vocab_size == RELEASED_IDS
        fit = (
            "as many as the released one"
            if released
            else f"the released one has {RELEASED_IDS}, and released weights need it"
        )
        yield f"ok    text tokenizer {path}: {tokenizer.vocab_size} ids ({fit}), SHA-256 {tokenizer.digest}"


# With torch ---------------------------------------------------------------------------------------


def broken_torch() -> str:
    """Why torch does not import, as a finding; empty where it does."""
    try:
        import torch

        torch.zeros(1)
    except Exception as error:  # whatever a damaged installation raises
        return f"FAULT torch does not import ({_reason(error)}): {reinstall()}"
    return ""


def vision() -> str:
    """Whether torchvision's compiled operators belong to this torch."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (
        Exception
    ) as error:  # of another build it raises ImportError, RuntimeError, AttributeError or OSError
        pair = f"torchvision {installed('torchvision')} does not fit torch {installed('torch')}"
        return f"FAULT {pair} ({_reason(error)}): {reinstall()}"
    return "ok    torchvision fits torch"


def reinstall() -> str:
    """The command that takes torch and torchvision from one index, the one that torch came from
    where its version says so."""
    build = installed("torch").partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"install both from one index, pip install --force-reinstall torch torchvision{index}"


def jpeg() -> str:
    """Whether torchvision decodes a JPEG of 16 x 16 red pixels as red."""
    try:
        import torch
        from PIL import Image
        from torchvision.io import ImageReadMode, decode_image

        written = io.BytesIO()
        Image.new("RGB", (16, 16), (200, 30, 30)).save(written, "JPEG")
        image = decode_image(
            torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8), ImageReadMode.RGB
        )  # [3, 16, 16]
        red, green, _ = image.float().mean(dim=(1, 2)).tolist()
        if tuple(image.shape) != (3, 16, 16) or abs(red - 200) > 8 or abs(green - 30) > 8:
            raise RuntimeError("it comes out wrong")
    except Exception as error:
        return f"FAULT torchvision does not decode JPEG ({_reason(error)}): {reinstall()}"
    return "ok    torchvision decodes JPEG"


def threads() -> str:
    """Threads that torch computes with, beside the cores that there are."""
    import torch

    used, cores, chosen = (
        torch.get_num_threads(),
        count_cores(),
        os.environ.get("OMP_NUM_THREADS", ""),
    )
    said = f"torch computes with {used} threads" + (
        f" (OMP_NUM_THREADS={chosen})" if chosen else ""
    )
    if used > cores:
        return f"note  {said} on {cores} cores, which is slow: set OMP_NUM_THREADS={cores}"
    return f"ok    {said}"


def accelerator() -> Iterator[str]:
    """Each CUDA device with its memory and a sum done on it; the versions of driver, CUDA and
    NCCL."""
    import torch

    driver = driver_version()
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        )
        if driver:
            yield (
                f"note  NVIDIA driver {driver} is here, but torch sees no device; this torch is "
                f"{built}: "
                "install one that fits the driver, https://pytorch.org/get-started/locally"
            )
        else:
            yield f"note  no CUDA device ({built}): everything runs on the CPU"
        return
    yield f"ok    CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
    for index in range(torch.cuda.device_count()):
        yield device(torch, index)


def device(torch: Any, index: int) -> str:
    """One CUDA device; a FAULT where it cannot add, a note where it has no bfloat16."""
    properties = torch.cuda.get_device_properties(index)
    said = f"device {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GB, capability {properties.major}.{properties.minor}"
    try:
        torch.ones(2, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        return f"FAULT {said}, does not compute ({_reason(error)}): free it, or install a torch built for it"
    if properties.major < 8:  # Ampere is the first generation with bfloat16 in its tensor cores
        return f"note  {said}, no bfloat16: train with --run.precision float32"
    return f"ok    {said}, bfloat16"


def driver_version(system: Path = Path("/")) -> str:
    """Version of the NVIDIA kernel driver; empty where there is none."""
    found = re.search(
        r"Kernel Module(?: for \S+)?\s+(\d+[\d.]*)", _text(system / "proc/driver/nvidia/version")
    )
    return found[1] if found else ""


def processes() -> str:
    """What several processes would talk through."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return "note  this torch has no gloo, so a run is one process: install torch from pytorch.org for torchrun"
    if not torch.cuda.is_available():
        return "ok    several processes: gloo"
    if not dist.is_nccl_available():
        return "note  several processes: gloo, but no NCCL, so a run on several devices is not possible: install torch for Linux"
    return f"ok    several processes: gloo, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def stored_weights(path: str, text_model: str = "") -> str:
    """Whether weights are whole: every tensor of the network the config describes, and the text
    tokenizer they were trained with."""
    from beit3.weights import loading, store

    try:
        place = store.find_weights(path)
        known = store.read_config(place)
        if known.tokenizer and not text_model and not (place / store.TOKENIZER_FILE).is_file():
            return f"FAULT weights {place}: {store.TOKENIZER_FILE} is missing, copy it from the run (SHA-256 {known.tokenizer})"
        task = loading.load_weights(place, text_model=text_model or None)
    except (ValueError, OSError, RuntimeError) as error:
        return f"FAULT weights {path}: {_reason(error)}"
    texts = (
        f", text tokenizer {known.tokenizer} as {store.CONFIG_FILE} says"
        if known.tokenizer
        else ", no text tokenizer"
    )
    return f"ok    weights {place} ({known.task}): {sum(1 for _ in task.parameters())} tensors, whole{texts}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def _text(path: Path) -> str:
    """What a small file of the system says; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _reason(error: BaseException) -> str:
    """An error as one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
