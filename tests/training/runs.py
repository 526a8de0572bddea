"""Helpers that read the metrics and checkpoints of a run and compare two runs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMINGS = ("seconds", "seconds_waiting", "memory")
"""Metrics that differ between two equal runs."""


def read_metrics(out: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def find_newest_checkpoint(out: Path) -> Path:
    """Returns the directory of the newest checkpoint."""
    return max((out / "checkpoints").glob("step_*"))


def load_checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint that one process wrote."""
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def assert_equal(value: Any, expected: Any) -> None:
    """Asserts equality to the bit, through nested containers."""
    assert type(value) is type(expected)
    if isinstance(value, dict):
        assert sorted(value) == sorted(expected)
        for key in value:
            assert_equal(value[key], expected[key])
    elif isinstance(value, list | tuple):
        assert len(value) == len(expected)
        for item, expected_item in zip(value, expected, strict=True):
            assert_equal(item, expected_item)
    elif isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype and torch.equal(value, expected)
    else:
        assert value == expected


def assert_same_run(run: Path, expected_run: Path) -> None:
    """Asserts that weights, optimizer, log and scores are equal to the bit."""
    for folder in ("last", "best"):
        assert_equal(
            load_file(run / folder / "model.safetensors"),
            load_file(expected_run / folder / "model.safetensors"),
        )
    assert_equal(read_metrics(run), read_metrics(expected_run))
    assert (run / "scores.json").read_text() == (expected_run / "scores.json").read_text()
    assert find_newest_checkpoint(run).name == find_newest_checkpoint(expected_run).name
    tensors, expected_tensors = (
        load_checkpoint_tensors(find_newest_checkpoint(run)),
        load_checkpoint_tensors(find_newest_checkpoint(expected_run)),
    )
    assert any(name.startswith("optimizer.") and name.endswith(".exp_avg") for name in tensors)
    assert_equal(tensors, expected_tensors)
