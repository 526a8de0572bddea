"""The doctor works where torch is broken, and a fault gives status 2."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import beit3.doctor
from beit3.cli import main
from beit3.doctor.examine import examine
from tests.doctor.findings import group_findings

SOURCE = Path(beit3.doctor.__file__).resolve().parents[2]
BROKEN_PACKAGES = {
    "torch": 'raise OSError("libcudart.so.12: cannot open shared object file\\nNo such file")',
    "torchvision": 'raise RuntimeError("operator torchvision::nms does not exist")',
}


@pytest.fixture
def cached_world(root, cache) -> Iterator[Path]:
    """Writes the text tokenizer of a cached world, as `prepare_embedded_world` does."""
    folder = cache / "world-0-doctor-records"
    folder.mkdir(exist_ok=True)
    shutil.copy(root / "text.model", folder)
    yield folder
    shutil.rmtree(folder)


def test_importing_the_doctor_needs_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import beit3.doctor.examine; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE)},
    )
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - set(sys.stdlib_module_names) == {"beit3"}


def test_the_doctor_works_where_torch_does_not_import(tmp_path):
    """This runs `python -m beit3 doctor` in a damaged installation."""
    for name, code in BROKEN_PACKAGES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    environment = {
        "PYTHONPATH": f"{tmp_path}:{SOURCE}",
        "BEIT3_CACHE": str(tmp_path / "cache"),
        "PATH": "/usr/bin:/bin",
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "beit3", "doctor", "--weights", "any"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and time.monotonic() - start < 30
    findings = group_findings(done.stdout.splitlines())
    (fault,) = findings["FAULT"]
    assert fault.startswith(
        "torch does not import (libcudart.so.12: cannot open shared object file No such file): "
        "install both from"
    )
    assert any("CPU cores" in text for text in findings["ok   "])
    assert any("free for the cache" in text for text in findings["ok   "])
    last_note = findings["note "][-1]
    assert last_note.startswith("not checked until torch imports: torchvision")
    assert "the weights" in last_note
    assert done.stderr == "beit3: 1 of these lines name a fault and its remedy\n"


def test_images_and_weights_wait_for_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    findings = group_findings(examine(weights="any"))
    assert len(findings["FAULT"]) == 1
    expected = "not checked until torchvision fits: decoding of images, the weights"
    assert expected in findings["note "]


def test_this_machine_has_no_fault(cached_world, capsys):
    assert main(["doctor"]) == 0
    findings = group_findings(capsys.readouterr().out.splitlines())
    assert not findings["FAULT"]
    tokenizers = [text for text in findings["ok   "] if text.startswith("text tokenizer ")]
    assert tokenizers[0].startswith(f"text tokenizer {cached_world / 'text.model'}: ")


def test_a_fault_ends_with_status_2(weights, tmp_path, capsys):
    assert main(["doctor", "--weights", str(tmp_path / "absent")]) == 2
    output = capsys.readouterr()
    assert len(group_findings(output.out.splitlines())["FAULT"]) == 1
    assert output.err == "beit3: 1 of these lines name a fault and its remedy\n"
    options = ["--weights", str(weights), "--text-model", str(weights / "text.model")]
    assert main(["doctor", *options]) == 0
