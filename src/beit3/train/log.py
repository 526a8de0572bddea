"""What a run says of itself: `metrics.jsonl`, TensorBoard, and a console line with the time that is left."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter


def truncate(path: Path, step: int) -> None:
    """Drop the lines of a killed run that come after the checkpoint it resumes from, and one that was cut short."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.rename(path)


def duration(seconds: float) -> str:
    """'2h05m', '3m20s' or '12s'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def memory() -> float:
    """Peak memory in GB: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class Log:
    """Writes every step that is due; only the first process has one that speaks."""

    def __init__(self, run: Path, name: str, steps: int, *, speak: bool = True):
        self.run, self.name, self.steps, self.speak = run, name, steps, speak
        self.first_step, self.spoken, self.samples = 0, 0.0, 0
        self.started = time.monotonic()
        self.console = Console(highlight=False, markup=False)  # names of records may hold brackets
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Go on after `step` steps: what a killed run wrote beyond them goes."""
        self.first_step, self.started = step, time.monotonic()
        if self.speak:
            truncate(self.run / "metrics.jsonl", step)
            self.file = (self.run / "metrics.jsonl").open("a", buffering=1)
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and the same scalars in TensorBoard."""
        if self.file is None or self.board is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def surroundings(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """`lr/<group>` of every named group, and the peak `memory` so far in GB."""
        return {f"lr/{group['label']}": group["lr"] for group in optimizer.param_groups} | {"memory": memory()}

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The console line: every second on a terminal (rewritten in place), every ten elsewhere."""
        now = time.monotonic()
        terminal = self.console.is_terminal
        last = step == self.steps
        if not self.speak or (not last and now - self.spoken < (1 if terminal else 10)):
            return
        self.spoken = now
        done = step - self.first_step
        rate = self.samples / max(1e-9, now - self.started)
        left = (now - self.started) / max(1, done) * (self.steps - step)
        parts = [name for name in values if name.startswith("loss/")]
        shown = ["loss", *parts] if len(parts) > 1 else ["loss"]
        losses = "  ".join(f"{name.removeprefix('loss/')} {values[name]:.3f}" for name in shown)
        line = (
            f"{self.name}  step {step}/{self.steps}  {losses}  lr {values['lr']:.1e}  "
            f"{rate:.0f} samples/s  {memory():.1f} GB  {duration(left)} left"
        )
        if terminal:
            self.console.print(line, end="\n" if last else "\r", no_wrap=True, overflow="ellipsis")
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        if self.speak:
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        for each in (self.file, self.board):
            if each is not None:
                each.close()
