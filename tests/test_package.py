"""The wheel and the sdist hold the package with its data, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
DATA = ("shipped/world", "serve/page")
"""Folders of the package whose files are no modules."""
ROOT_FILES = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg", "PKG-INFO", "MANIFEST.in"}
MAX_WHEEL = 13_000_000
"""Bytes: weights of 12 MB and the code."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy of the project, tests and benchmarks included."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "runs", "build", "dist", "recorded", "images"
    )
    shutil.copytree(PROJECT, folder / "project", ignore=ignored)
    for kind in ("wheel", "sdist"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder / "project", check=True, capture_output=True
        )
    return folder


def list_package_files() -> set[str]:
    """Returns the paths of the package's modules and data files below src."""
    source = PROJECT / "src"
    files = list((source / "beit3").rglob("*.py"))
    for folder in DATA:
        files += [path for path in (source / "beit3" / folder).rglob("*") if path.is_file()]
    return {path.relative_to(source).as_posix() for path in files if "__pycache__" not in str(path)}


def test_the_wheel_holds_the_package_and_its_data(built):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == list_package_files()
    assert "beit3/shipped/world/vqa/model.safetensors" in package
    assert wheel.stat().st_size <= MAX_WHEEL


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        paths = [Path(member.name) for member in file.getmembers() if member.isfile()]
    names = {Path(*path.parts[1:]).as_posix() for path in paths}
    package = {name.removeprefix("src/") for name in names if name.startswith("src/beit3/")}
    assert package == list_package_files()
    others = {name for name in names if not name.startswith(("src/beit3/", "src/beit3.egg-info/"))}
    assert others <= ROOT_FILES


def test_an_installed_wheel_finds_its_weights(built, tmp_path):
    """Unpacked elsewhere, with nothing of the repository on the path."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import beit3, numpy; print(beit3.__file__); "
        "print(beit3.load('world/vqa')(numpy.zeros((32, 32, 3), 'uint8'), 'is it red ?')[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    file, answer = run.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path) and "answer" in answer
