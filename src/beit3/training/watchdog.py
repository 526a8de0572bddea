"""Notices steps that take unusually long and steps that do not end, and says where the time
goes."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

from beit3.training.log import Log, format_duration

SLOW_FACTOR = 5.0
"""A step that takes this many times the median is slow."""
MIN_SLOW_SECONDS = 1.0
"""Shorter steps are never reported."""
WARNING_INTERVAL = 60.0
"""Seconds between two warnings of slow steps."""
STALL_SECONDS = 60.0
"""A step that lasts this long, and STALL_FACTOR times the median, is stalled."""
STALL_FACTOR = 20.0
WINDOW = 50
"""Steps whose median counts; none is judged before a fifth of them are done."""


class Watchdog:
    """Times the steps of a run and warns of slow ones and, from a thread, of stalled ones.

    The loop calls `begin_step`, `mark_loaded` when the records have arrived, and `end_step`.
    Nothing is watched between steps, so evaluations and checkpoints may take their time.
    """

    def __init__(self, log: Log, *, stall_seconds: float = STALL_SECONDS):
        self.log, self.stall_seconds = log, stall_seconds
        self.recent_seconds: deque[float] = deque(maxlen=WINDOW)
        self.step, self.start_time, self.loading_seconds = 0, 0.0, 0.0
        self.timings: list[tuple[float, float]] = []  # (seconds, seconds of loading)
        self.last_warning = -WARNING_INTERVAL
        self.stopped = threading.Event()
        self.main_thread_id = threading.current_thread().ident
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def begin_step(self, step: int) -> None:
        """Starts the clock of step `step` (counted from 0), before its records are loaded."""
        self.step, self.loading_seconds, self.start_time = step, 0.0, time.monotonic()

    def mark_loaded(self) -> None:
        """Notes that the records of the step have arrived."""
        self.loading_seconds = time.monotonic() - self.start_time

    def end_step(self) -> None:
        """Stops the clock of the step and warns if the step was slow."""
        now = time.monotonic()
        seconds = now - self.start_time
        self.start_time = 0.0
        self.timings.append((seconds, self.loading_seconds))
        median = self.compute_median()
        is_slow = median > 0 and seconds > max(MIN_SLOW_SECONDS, SLOW_FACTOR * median)
        if is_slow and now - self.last_warning > WARNING_INTERVAL:
            self.last_warning = now
            self.log.info(
                f"WARNING step {self.step + 1} took {seconds:.1f} s, the median is {median:.2f} s; "
                f"{self.loading_seconds:.1f} s of it were spent waiting for records"
            )
        self.recent_seconds.append(seconds)

    def compute_median(self) -> float:
        """Returns the median seconds of recent steps, or 0 while there are too few."""
        if len(self.recent_seconds) < WINDOW / 5:
            return 0.0
        return statistics.median(self.recent_seconds)

    def pop_timings(self) -> dict[str, float]:
        """Returns the mean `seconds` of a step since the last call, and how many of them loaded."""
        timings, self.timings = self.timings, []
        return {
            "seconds": statistics.mean(seconds for seconds, _ in timings),
            "seconds_waiting": statistics.mean(loading for _, loading in timings),
        }

    def _watch(self) -> None:
        """Reports each stalled step once; runs in a thread of its own."""
        reported = 0.0
        while not self.stopped.wait(min(1.0, self.stall_seconds / 4)):
            start_time = self.start_time
            if not start_time or start_time == reported:
                continue
            seconds = time.monotonic() - start_time
            if seconds > max(self.stall_seconds, STALL_FACTOR * self.compute_median()):
                reported = start_time
                activity = "computing" if self.loading_seconds else "waiting for records"
                self.log.info(
                    f"WARNING step {self.step + 1} has not ended for {format_duration(seconds)}, "
                    f"{activity}, at {self._locate_main_thread()}"
                )

    def _locate_main_thread(self) -> str:
        """Returns the innermost line of this package that the main thread is in."""
        frame = sys._current_frames().get(self.main_thread_id or 0)
        package = Path(__file__).parents[1]
        for entry in reversed(traceback.extract_stack(frame)):
            file = Path(entry.filename)
            if file.is_relative_to(package):
                return f"{file.relative_to(package)}:{entry.lineno} in {entry.name}"
        return "an unknown place"
