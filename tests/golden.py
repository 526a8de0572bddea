"""Reads the numeric fixtures that were recorded from the original code."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2] / "shared" / "golden"


def find_fixture(name: str) -> Path:
    """Returns the folder of a fixture; skips the calling test where fixtures are not installed."""
    if not (ROOT / name).exists():
        pytest.skip(f"no golden fixtures at {ROOT / name}")
    return ROOT / name


def load_tensors(name: str, file: str) -> dict[str, Tensor]:
    """Returns all tensors of `<name>/<file>.safetensors`."""
    return load_file(find_fixture(name) / f"{file}.safetensors")


def load_config(name: str) -> dict:
    """Returns the `config.json` of a fixture."""
    return json.loads((find_fixture(name) / "config.json").read_text())
