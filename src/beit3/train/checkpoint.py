"""Checkpoints from which a run goes on exactly where it was: `checkpoints/step_00000400.pt`, written aside and renamed."""

import os
from pathlib import Path
from typing import Any

import torch

from beit3.task import Task
from beit3.weights.fill import stored


def save(run: Path, step: int, task: Task, optimizer: torch.optim.Optimizer, best: float | None, *, keep: int) -> Path:
    """Write the checkpoint after `step` steps, then delete all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"step": step, "task": stored(task), "optimizer": optimizer.state_dict(), "best": best}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    for old in sorted(folder.glob("step_*.pt"))[: -max(1, keep)]:
        old.unlink()
    return path


def newest(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max((run / "checkpoints").glob("step_*.pt"), default=None)


def restore(path: Path, task: Task, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Load a checkpoint into task and optimizer; returns its `step` and `best`."""
    state = torch.load(path, map_location=device, weights_only=True)
    missing, unexpected = task.load_state_dict(state["task"], strict=False)
    missing = [name for name in missing if name.split(".")[0] not in task.frozen]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit this run: missing {missing[:3]}, unknown {unexpected[:3]}; use another --out")
    optimizer.load_state_dict(state["optimizer"])
    return {"step": state["step"], "best": state["best"]}
