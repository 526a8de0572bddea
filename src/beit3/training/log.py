"""The log of a run: `metrics.jsonl`, TensorBoard, and a console line with the time that is left."""

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

from beit3.files import write_text

METRICS_FILE = "metrics.jsonl"


class Log:
    """Writes the metrics of a run and prints its progress; only the first process's is enabled."""

    def __init__(self, run: Path, name: str, num_steps: int, *, enabled: bool = True):
        """Args: the run directory, the name shown on the console, and the steps of the whole
        run."""
        self.run, self.name, self.num_steps, self.enabled = run, name, num_steps, enabled
        self.first_step, self.num_samples = 0, 0
        self.start_time, self.last_printed = time.monotonic(), 0.0
        self.console = Console(highlight=False, markup=False)  # names of records may hold brackets
        self.file: TextIO | None = None
        self.tensorboard: TensorBoardWriter | None = None

    def begin(self, step: int, *, repeats_evaluation: bool = False) -> None:
        """Opens the files after `step` steps; what a killed run wrote beyond them is dropped.

        So are the scores of that step itself where its evaluation is made again.
        """
        self.first_step, self.start_time = step, time.monotonic()
        if self.enabled:
            truncate_metrics(self.run / METRICS_FILE, step, drop_scores=repeats_evaluation)
            self.file = (self.run / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
            self.tensorboard = TensorBoardWriter(self.run / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl and the same scalars to TensorBoard."""
        if self.file is None or self.tensorboard is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.tensorboard.write(step, values)

    def print_progress(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the console line: every second on a terminal, in place, else every ten seconds."""
        now = time.monotonic()
        on_terminal = self.console.is_terminal
        is_last = step == self.num_steps
        interval = 1 if on_terminal else 10
        if not self.enabled or (not is_last and now - self.last_printed < interval):
            return
        self.last_printed = now
        line = self._format_progress(step, values, now - self.start_time)
        if on_terminal:
            end = "\n" if is_last else "\r"
            self.console.print(line, end=end, no_wrap=True, overflow="ellipsis")
        else:
            print(line, flush=True)

    def _format_progress(self, step: int, values: Mapping[str, float], seconds: float) -> str:
        """Returns the console line after `seconds` of training."""
        samples_per_second = self.num_samples / max(1e-9, seconds)
        seconds_per_step = seconds / max(1, step - self.first_step)
        seconds_left = seconds_per_step * (self.num_steps - step)
        names = ["loss"]
        parts = [name for name in values if name.startswith("loss/")]
        if len(parts) > 1:
            names += parts
        losses = "  ".join(f"{name.removeprefix('loss/')} {values[name]:.3f}" for name in names)
        return (
            f"{self.name}  step {step}/{self.num_steps}  {losses}  lr {values['lr']:.1e}  "
            f"{samples_per_second:.0f} samples/s  {measure_peak_memory():.1f} GB  "
            f"{format_duration(seconds_left)} left"
        )

    def info(self, text: str) -> None:
        """Prints a line of text."""
        if self.enabled:
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Closes the files."""
        if self.file is not None:
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.file.close()


class TensorBoardWriter:
    """Writes TensorBoard's event file in the caller's thread.

    SummaryWriter has a thread of its own, which prints a traceback when the disk is full.
    """

    def __init__(self, directory: Path, first_step: int):
        """Opens a file in `directory`; TensorBoard no longer shows earlier files' later steps."""
        directory.mkdir(parents=True, exist_ok=True)
        self.file = (directory / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("wb")
        self.records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        """Writes one event and flushes it."""
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        self.records.flush()


def truncate_metrics(path: Path, step: int, *, drop_scores: bool = False) -> None:
    """Drops the lines of a killed run after step `step`, and a last line that was cut short.

    `drop_scores` also drops the scores of step `step`.
    """
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.endswith("}"):
            continue
        values = json.loads(line)
        is_score = any(name.startswith("val/") for name in values)
        if values["step"] < step or (values["step"] == step and not (drop_scores and is_score)):
            lines.append(line)
    write_text(path, "".join(line + "\n" for line in lines))


def format_duration(seconds: float) -> str:
    """Formats seconds as '2h05m', '3m20s' or '12s'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def measure_peak_memory() -> float:
    """Returns the peak memory in GB: of the accelerator where there is one, else of this
    process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
