"""What a run says of itself: `metrics.jsonl`, TensorBoard, and a console line with the time that is left."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def truncate(path: Path, step: int) -> None:
    """Drop the lines of a killed run that come after the checkpoint it resumes from, and one that was cut short."""
    if path.exists():
        lines = [
            line
            for line in path.read_text().splitlines()
            if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.rename(path)


def duration(seconds: float) -> str:
    """'2h05m', '3m20s' or '12s'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    )


def memory() -> float:
    """Peak memory in GB: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class Board:
    """TensorBoard's event file, written in the caller's thread: SummaryWriter's own prints a traceback where the disk is full."""

    def __init__(self, folder: Path, first_step: int):
        """What a killed process wrote of the steps after `first_step` is no longer shown."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("wb")
        self.records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(
            Event(
                step=step,
                summary=Summary(
                    value=[
                        Summary.Value(tag=name, simple_value=value)
                        for name, value in values.items()
                    ]
                ),
            )
        )

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        self.records.flush()


class Log:
    """Writes every step that is due; only the first process has one that speaks."""

    def __init__(self, run: Path, name: str, steps: int, *, speak: bool = True):
        self.run, self.name, self.steps, self.speak = run, name, steps, speak
        self.first_step, self.spoken, self.samples = 0, 0.0, 0
        self.started = time.monotonic()
        self.console = Console(highlight=False, markup=False)  # names of records may hold brackets
        self.file: TextIO | None = None
        self.board: Board | None = None

    def begin(self, step: int) -> None:
        """Go on after `step` steps: what a killed run wrote beyond them goes."""
        self.first_step, self.started = step, time.monotonic()
        if self.speak:
            truncate(self.run / "metrics.jsonl", step)
            self.file = (self.run / "metrics.jsonl").open("a", buffering=1)
            self.board = Board(self.run / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and the same scalars in TensorBoard."""
        if self.file is None or self.board is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.board.write(step, values)

    def surroundings(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """`lr/<group>` of every named group, and the peak `memory` so far in GB."""
        return {f"lr/{group['label']}": group["lr"] for group in optimizer.param_groups} | {
            "memory": memory()
        }

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
        for file in (self.file, self.board.file if self.board else None):
            if file is not None:
                file.close()
