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
def show_progress(label: str) -> Iterator[Advance]:
    """Yields a function `advance(done, total)` to call as the work goes on. Writes to stderr.

    A total of 0 means that it is not known.
    """
    console = Console(highlight=False, stderr=True)
    if not console.is_terminal:
        yield _make_line_printer(console, label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def _make_line_printer(console: Console, label: str) -> Advance:
    """Returns an `advance` that prints count and remaining time, at most every ten seconds."""
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
        console.print(f"{label}  {done}{remaining}")

    return advance
