"""Reading what a run left: lines of metrics without their timings, and the tensors of a
checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMINGS = ("seconds", "seconds_waiting", "memory")
"""What differs between two equal runs."""


def read_metrics(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl, timings left out."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def find_newest_checkpoint(out: Path) -> Path:
    """The newest checkpoint."""
    return max((out / "checkpoints").glob("step_*"))


def load_checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that one process wrote."""
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def assert_equal(one: Any, two: Any) -> None:
    """Equality to the bit, through nested containers."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert sorted(one) == sorted(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    else:
        assert one == two


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, optimizer, log and scores, to the bit."""
    for folder in ("last", "best"):
        assert_equal(
            load_file(one / folder / "model.safetensors"),
            load_file(two / folder / "model.safetensors"),
        )
    assert_equal(read_metrics(one), read_metrics(two))
    assert (one / "scores.json").read_text() == (two / "scores.json").read_text()
    assert find_newest_checkpoint(one).name == find_newest_checkpoint(two).name
    mine, theirs = (
        load_checkpoint_tensors(find_newest_checkpoint(one)),
        load_checkpoint_tensors(find_newest_checkpoint(two)),
    )
    assert any(name.startswith("optimizer.") and name.endswith(".exp_avg") for name in mine)
    assert_equal(mine, theirs)
