"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL = 10
"""Seconds between two lines where standard error is not a terminal."""

Advance = Callable[[int, int], None]
"""`advance(done, total)`; a total of 0 means that it is not known."""


@contextmanager
def show_progress(label: str, *, unit: str = "") -> Iterator[Advance]:
    """Yields a function `advance(done, total)` to call as the work goes on. Writes to stderr.

    A total of 0 means that it is not known. With a `unit`, such as "images", the rate per second
    is shown too.
    """
    console = Console(highlight=False, stderr=True)
    if not console.is_terminal:
        yield _make_line_printer(console, label, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, rate="")

        def advance(done: int, total: int) -> None:
            rate = _format_rate(done, time.monotonic() - start, unit)
            progress.update(task, completed=done, total=total or None, rate=rate)

        yield advance


def _format_rate(done: int, seconds: float, unit: str) -> str:
    """Returns a rate as in "12.3 images/s", "" without a unit."""
    return f"{done / max(seconds, 1e-3):.1f} {unit}/s" if unit else ""


def _make_line_printer(console: Console, label: str, unit: str) -> Advance:
    """Returns an `advance` that prints count, rate and remaining time, at most every 10 s."""
    start = last_line = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line <= LINE_INTERVAL:
            return
        last_line = now
        remaining = ""
        if total:
            seconds = (now - start) / max(1, done) * (total - done)
            remaining = f"/{total}  {seconds:.0f}s left"
        rate = _format_rate(done, now - start, unit)
        console.print(f"{label}  {done}{remaining}{'  ' * bool(rate)}{rate}")

    return advance
