"""Notices steps that take unusually long and steps that do not end, and says where the time goes."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

from beit3.training.log import Log, duration

SLOW = 5.0
"""A step this many times the median is slow."""
SHORT = 1.0
"""Seconds below which no step is worth a word."""
QUIET = 60.0
"""Seconds between two warnings of slow steps."""
STALL = 60.0
"""A step that lasts this many seconds, and STALLED times the median, is stalled."""
STALLED = 20.0
WINDOW = 50
"""Steps whose median counts; none is judged before a fifth of them are done."""


class Watch:
    """Times the steps of a run: `begin`, `loaded` when the records are there, `done`. Outside a step nothing is watched."""

    def __init__(self, log: Log, *, stall: float = STALL):
        self.log, self.stall = log, stall
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.step, self.began, self.records = 0, 0.0, 0.0
        self.laps: list[tuple[float, float]] = []
        self.warned = -QUIET
        self.over = threading.Event()
        self.main = threading.current_thread().ident
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def begin(self, step: int) -> None:
        """Step `step` (from 0) begins: its records are asked for."""
        self.step, self.records, self.began = step, 0.0, time.monotonic()

    def loaded(self) -> None:
        self.records = time.monotonic() - self.began

    def done(self) -> None:
        """The step is over; evaluation and checkpoints that follow are not part of it."""
        seconds = time.monotonic() - self.began
        self.began = 0.0
        self.laps.append((seconds, self.records))
        usual = self.median()
        if usual and seconds > max(SHORT, SLOW * usual) and time.monotonic() - self.warned > QUIET:
            self.warned = time.monotonic()
            self.log.say(
                f"WARNING step {self.step + 1} took {seconds:.1f} s, the median is {usual:.2f} s; "
                f"{self.records:.1f} s of it were waiting for records"
            )
        self.recent.append(seconds)

    def median(self) -> float:
        """Seconds of a usual step; 0 while too few are known."""
        return statistics.median(self.recent) if len(self.recent) >= WINDOW / 5 else 0.0

    def lap(self) -> dict[str, float]:
        """Mean `seconds` a step since the last call, and how many of them were spent waiting for records."""
        laps, self.laps = self.laps, []
        return {
            "seconds": statistics.mean(s for s, _ in laps),
            "seconds_waiting": statistics.mean(r for _, r in laps),
        }

    def _look(self) -> None:
        told = 0.0
        while not self.over.wait(min(1.0, self.stall / 4)):
            began = self.began
            seconds = time.monotonic() - began
            if began and began != told and seconds > max(self.stall, STALLED * self.median()):
                told = began
                doing = "computing" if self.records else "waiting for records"
                self.log.say(
                    f"WARNING step {self.step + 1} has not ended for {duration(seconds)}, {doing}, at {self._where()}"
                )

    def _where(self) -> str:
        """The innermost line of this package that the main thread is in."""
        frame = sys._current_frames().get(self.main or 0)
        package = Path(__file__).parents[1]
        stack = [
            entry
            for entry in traceback.extract_stack(frame)
            if Path(entry.filename).is_relative_to(package)
        ]
        return (
            f"{Path(stack[-1].filename).relative_to(package)}:{stack[-1].lineno} in {stack[-1].name}"
            if stack
            else "an unknown place"
        )
