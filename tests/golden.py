"""Where the numeric fixtures recorded from the official code lie, and how tests read them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2] / "shared" / "golden"


def find_fixture(name: str) -> Path:
    """The folder of fixture `name`; the calling test is skipped, visibly, where the fixtures are
    not at hand."""
    if not (ROOT / name).exists():
        pytest.skip(f"golden fixtures not at hand: {ROOT / name}")
    return ROOT / name


def load_tensors(name: str, file: str) -> dict[str, Tensor]:
    """All tensors of `<name>/<file>.safetensors`."""
    return load_file(find_fixture(name) / f"{file}.safetensors")


def load_config(name: str) -> dict:
    """The fixture's `config.json`."""
    return json.loads((find_fixture(name) / "config.json").read_text())
