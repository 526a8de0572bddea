"""The doctor speaks where things are broken: without torch, in small control groups, on full disks,
with other people's tokenizers."""

import math
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from beit3 import doctor
from beit3.cli import main

SOURCE = Path(doctor.__file__).resolve().parents[1]
BROKEN = {
    "torch": 'raise OSError("libcudart.so.12: cannot open shared object file\\nNo such file")',
    "torchvision": 'raise RuntimeError("operator torchvision::nms does not exist")',
}


def found(lines) -> dict[str, list[str]]:
    """Findings by verdict; each is one line."""
    kinds: dict[str, list[str]] = {"ok   ": [], "note ": [], "FAULT": []}
    for line in lines:
        assert "\n" not in line and line[5] == " "
        kinds[line[:5]].append(line[6:])
    return kinds


@pytest.fixture
def world(root, cache) -> Path:
    """A cached world's text tokenizer, as `prepare_embedded_world` leaves it."""
    place = cache / "world-0-doctor-records"
    place.mkdir(exist_ok=True)
    shutil.copy(root / "text.model", place)
    yield place
    shutil.rmtree(place)


def test_it_needs_nothing_but_the_standard_library_to_begin():
    code = "import sys; before = set(sys.modules); import beit3.doctor; print(*set(sys.modules) - before)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE)},
    )
    assert {name.partition(".")[0] for name in said.stdout.split()} - set(
        sys.stdlib_module_names
    ) == {"beit3"}


def test_it_speaks_where_torch_does_not_import(tmp_path):
    """As a user has it: `python -m beit3 doctor` beside a damaged installation."""
    for name, body in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    environment = {
        "PYTHONPATH": f"{tmp_path}:{SOURCE}",
        "BEIT3_CACHE": str(tmp_path / "cache"),
        "PATH": "/usr/bin:/bin",
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "beit3", "doctor", "--weights", "any"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and time.monotonic() - began < 30
    kinds = found(done.stdout.splitlines())
    (fault,) = kinds["FAULT"]
    assert fault.startswith(
        "torch does not import (libcudart.so.12: cannot open shared object file No such file): "
        "install both from"
    )
    assert any("processor cores" in line for line in kinds["ok   "]) and any(
        "free for the cache" in line for line in kinds["ok   "]
    )
    assert (
        kinds["note "][-1].startswith("not looked at until torch imports: torchvision")
        and "the weights" in kinds["note "][-1]
    )
    assert done.stderr == "beit3: 1 of these lines name a fault and its remedy\n"


def test_torchvision_of_another_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(
        doctor, "version", {"torch": "2.11.0+cpu", "torchvision": "0.26.0"}.__getitem__
    )
    said = doctor.vision()
    assert said.startswith(
        "FAULT torchvision 0.26.0 does not fit torch 2.11.0+cpu (import of torchvision halted"
    )
    assert said.endswith(
        "pip install --force-reinstall torch torchvision --index-url "
        "https://download.pytorch.org/whl/cpu"
    )
    monkeypatch.setattr(
        doctor, "version", {"torch": "2.11.0", "torchvision": "0.26.0+cpu"}.__getitem__
    )
    assert doctor.vision().endswith("pip install --force-reinstall torch torchvision")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    kinds = found(doctor.examine(weights="any"))
    assert len(kinds["FAULT"]) == 1
    assert (
        "not looked at until torchvision fits: decoding of pictures, the weights" in kinds["note "]
    )


def test_a_jpeg_that_comes_out_wrong(monkeypatch):
    torch, io = pytest.importorskip("torch"), pytest.importorskip("torchvision.io")
    assert doctor.jpeg() == "ok    torchvision decodes JPEG"
    monkeypatch.setattr(io, "decode_image", lambda *_: torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert doctor.jpeg().startswith("FAULT torchvision does not decode JPEG (it comes out wrong)")


def test_nothing_is_wrong_here(world, capsys):
    assert main(["doctor"]) == 0
    kinds = found(capsys.readouterr().out.splitlines())
    assert not kinds["FAULT"]
    assert [line for line in kinds["ok   "] if line.startswith("text tokenizer ")][0].startswith(
        f"text tokenizer {world / 'text.model'}: "
    )


# Packages -----------------------------------------------------------------------------------------


def test_what_is_missing_old_or_an_extra(monkeypatch):
    extras = [
        'pytest>=8; extra == "dev"',
        "faiss-cpu>=1.7; extra == 'search'",
        'beit3[dev]; extra == "all"',
    ]
    needs = ["torch>=2.11", "numpy>=1.26", "rich >= 13", *extras]
    have = {"torch": "2.9.1+cpu", "numpy": "1.26", "pytest": "9.0"}

    def version(name: str) -> str:
        if name not in have:
            raise PackageNotFoundError
        return have[name]

    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "version", version)
    assert list(doctor.packages()) == [
        "FAULT torch 2.9.1+cpu is older than 2.11: pip install 'torch>=2.11'",
        "ok    numpy 1.26",
        "FAULT rich is missing: pip install beit3",
        "note  the extra search is not complete, faiss-cpu missing or old: pip install "
        "'beit3[search]' if you need it",
    ]


@pytest.mark.parametrize(
    ("have", "least", "expected"),
    [
        ("2.15.0", "2.11", False),
        ("2.9", "2.11", True),
        ("1.26", "1.26", False),
        ("10.0rc1", "9", False),
        ("", "1", True),
        ("3", "", False),
    ],
)
def test_versions_are_compared_by_number(have, least, expected):
    assert doctor.older(have, least) is expected


def test_a_source_that_is_not_installed_says_what_it_needs(monkeypatch):
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError

    monkeypatch.setattr(doctor, "requires", absent)
    needs = [doctor.requirement(line) for line in doctor.requirements()]
    assert ("torch", "") in [(name, extra) for name, _, extra in needs] and ("pytest", "dev") in [
        (name, extra) for name, _, extra in needs
    ]


# The machine --------------------------------------------------------------------------------------


def system(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


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
def test_limits_of_control_groups(files, limits, tmp_path):
    assert doctor.group_limits(system(tmp_path, files)) == limits


def test_cores_by_affinity_and_by_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "count_cores", lambda: 4)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    assert doctor.processors(tmp_path) == "ok    4 processor cores of the machine's 64"
    here = system(tmp_path, GROUPS["version 2, the limit of a group above"][0])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.processors(here).startswith(
        "note "
    ) and "gives the time of 1.5: set OMP_NUM_THREADS=1" in doctor.processors(here)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.processors(here).startswith("ok ")


def test_memory_and_what_is_allowed_of_it(tmp_path):
    assert doctor.memory().startswith("ok ")
    here = system(
        tmp_path,
        GROUPS["version 1"][0] | {"proc/meminfo": "MemTotal: 4 kB\nMemAvailable:    3145728 kB\n"},
    )
    assert doctor.memory(here).startswith(
        "note "
    ) and "3.0 free, the control group allows 0.5, which is little" in doctor.memory(here)


def test_more_threads_than_cores_are_noted(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(doctor, "count_cores", lambda: 2)
    assert doctor.threads().startswith("note ") and doctor.threads().endswith(
        "set OMP_NUM_THREADS=2"
    )


def test_room_and_permission(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.chdir(tmp_path)
    assert [line[:5] for line in doctor.disk()] == ["ok   ", "ok   "]
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    cache, runs = doctor.disk()
    assert (
        cache
        == f"FAULT 1.0 GB free for the cache at {tmp_path}/not/there: set BEIT3_CACHE to another place"
    )
    assert runs.endswith("train with --out on another disk")

    def refused(dir: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    assert (
        f"FAULT cannot write in {tmp_path} for the cache (Permission denied): set BEIT3_CACHE"
        in next(doctor.disk())
    )


@pytest.mark.parametrize(
    "variables", [{"BEIT3_CACHE": "mine"}, {"XDG_CACHE_HOME": "/x"}, {"HOME": "/h"}]
)
def test_the_cache_is_the_one_that_training_uses(variables, monkeypatch):
    from beit3.files import cache_directory

    for name in ("BEIT3_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert doctor.cache_directory().absolute() == cache_directory().absolute()


def test_a_compiler_may_be_missing(monkeypatch):
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: "/bin/clang++" if name == "clang++" else None
    )
    assert doctor.compiler() == "ok    C++ compiler /bin/clang++"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler().startswith("note ") and "apt install" in doctor.compiler()


def test_a_host_name_without_address_or_answer(monkeypatch):
    assert doctor.host("localhost").startswith("ok    host name localhost is ")
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    for answer in (lambda name: [], lambda name: time.sleep(0.5) or ["1.2.3.4"]):
        monkeypatch.setattr(doctor, "_addresses", answer)
        assert doctor.host("nowhere").startswith("note ") and "torchrun" in doctor.host("nowhere")


# Devices, played by others ------------------------------------------------------------------------


class Cuda:
    """As much of `torch.cuda` as is asked."""

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


def play(monkeypatch, cuda: Cuda, *, built: str | None = "13.0", driver: str = "580.1") -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(
        torch,
        "ones",
        lambda size, device: SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: 2.0)),
    )
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)


def test_devices(monkeypatch):
    play(monkeypatch, Cuda(9, 7))
    assert list(doctor.accelerator()) == [
        "ok    CUDA 13.0, driver 580.1",
        "ok    device 0: card 0, 80 GB, capability 9.0, bfloat16",
        "note  device 1: card 1, 80 GB, capability 7.0, no bfloat16: train with --run.precision "
        "float32",
    ]

    def fails(size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(sys.modules["torch"], "ones", fails)
    assert [line[:5] for line in doctor.accelerator()] == ["ok   ", "FAULT", "FAULT"]


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        ("13.0", "", "no CUDA device (built for CUDA 13.0): everything runs on the CPU"),
        (None, "", "no CUDA device (a build without CUDA): everything runs on the CPU"),
        (
            None,
            "580.1",
            "NVIDIA driver 580.1 is here, but torch sees no device; this torch is a build without "
            "CUDA: install",
        ),
    ],
)
def test_no_device(built, driver, words, monkeypatch):
    play(monkeypatch, Cuda(), built=built, driver=driver)
    (line,) = doctor.accelerator()
    assert line.startswith("note ") and words in line


def test_what_processes_talk_through(monkeypatch):
    dist = pytest.importorskip("torch.distributed")
    play(monkeypatch, Cuda(9))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert doctor.processes() == "ok    several processes: gloo, NCCL 2.27.3"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert doctor.processes().startswith("note  several processes: gloo, but no NCCL")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert doctor.processes().startswith("note  this torch has no gloo")


@pytest.mark.parametrize(
    "kind", ["NVIDIA UNIX x86_64 Kernel Module  ", "NVIDIA UNIX Open Kernel Module for x86_64  "]
)
def test_the_drivers_version(kind, tmp_path):
    assert doctor.driver_version(tmp_path) == ""
    here = system(
        tmp_path,
        {
            "proc/driver/nvidia/version": f"NVRM version: {kind}580.65.06  Release Build\nGCC version: 12\n"
        },
    )
    assert doctor.driver_version(here) == "580.65.06"


# Tokenizers and weights ---------------------------------------------------------------------------


def test_text_tokenizers_by_ids_and_digest(root, tmp_path, monkeypatch):
    from beit3.tokenizer.text import TextTokenizer

    tokenizer = TextTokenizer(root / "text.model")
    (line,) = doctor.text_tokenizers(str(root / "text.model"))
    assert line.startswith(
        f"ok    text tokenizer {root / 'text.model'}: {tokenizer.vocab_size} ids (the released "
        "one has 64002"
    )
    assert line.endswith(tokenizer.digest)
    monkeypatch.setattr(doctor, "RELEASED_IDS", tokenizer.vocab_size)
    assert "as many as the released one" in next(doctor.text_tokenizers(str(root / "text.model")))
    (tmp_path / "x.spm").write_text("no model")
    for name, words in (
        ("x.spm", "is not a complete SentencePiece model"),
        ("absent.spm", "no text tokenizer at"),
    ):
        (line,) = doctor.text_tokenizers(str(tmp_path / name))
        assert line.startswith("FAULT ") and words in line
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path))
    assert list(doctor.text_tokenizers()) == []


@pytest.fixture(scope="module")
def weights(root, tmp_path_factory) -> Path:
    """Untrained weights with a text tokenizer."""
    from dataclasses import replace

    from beit3.data.views.preprocessing import Preprocessing
    from beit3.model.config import TINY
    from beit3.tasks.vqa import VQA, VQAConfig
    from beit3.tokenizer.text import TextTokenizer
    from beit3.weights import store

    model = replace(
        TINY,
        dim=32,
        depth=1,
        num_heads=2,
        ffn_dim=32,
        image_size=16,
        patch_size=8,
        final_norm=False,
    )
    config = VQAConfig(
        model=model, image=Preprocessing(16), text_length=16, num_answers=2, answers=("yes", "no")
    )
    task = VQA(config, tokenizer=TextTokenizer(root / "text.model"))
    task.init_weights(0)
    out = tmp_path_factory.mktemp("doctor") / "run" / "best"
    store.save_weights(task, out)
    return out


def test_weights_that_are_whole(weights):
    said = doctor.stored_weights(str(weights))
    assert said.startswith(f"ok    weights {weights} (vqa): ") and "whole, text tokenizer " in said
    assert doctor.stored_weights(str(weights.parent)) == said, "a run's directory will do"


def test_weights_that_are_not(weights, tmp_path):
    from beit3.tokenizer.text import TextTokenizer

    other = tmp_path / "other.spm"
    TextTokenizer.train(
        ["completely other words than theirs"] * 3, vocab_size=40, model_type="bpe"
    ).save(other)
    damages = {
        "text.model is missing": lambda copy: (copy / "text.model").unlink(),
        "does not fit the weights": lambda copy: shutil.copy(other, copy / "text.model"),
        "is not a whole safetensors file": lambda copy: (copy / "model.safetensors").write_bytes(
            (weights / "model.safetensors").read_bytes()[:-8]
        ),
        "is not JSON": lambda copy: (copy / "config.json").write_text("{"),
        "holds neither weights nor a run's best or last": lambda copy: (
            copy / "config.json"
        ).unlink(),
    }
    for words, damage in damages.items():
        copy = tmp_path / words
        shutil.copytree(weights, copy)
        damage(copy)
        said = doctor.stored_weights(str(copy))
        assert said.startswith("FAULT weights ") and words in said, said
    assert "does not fit the weights" in doctor.stored_weights(str(weights), str(other))
    assert "holds neither" in doctor.stored_weights(str(tmp_path / "absent"))


def test_a_fault_ends_with_status_2(weights, tmp_path, capsys):
    assert main(["doctor", "--weights", str(tmp_path / "absent")]) == 2
    said = capsys.readouterr()
    assert (
        len(found(said.out.splitlines())["FAULT"]) == 1
        and said.err == "beit3: 1 of these lines name a fault and its remedy\n"
    )
    assert (
        main(["doctor", "--weights", str(weights), "--text-model", str(weights / "text.model")])
        == 0
    )
