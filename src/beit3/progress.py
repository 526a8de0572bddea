"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(done, total)`, to be called as the work goes on; total 0 = not known. What it says goes to stderr."""
    console = Console(highlight=False, stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total or None)
        return
    started = spoken = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken > 10:
            spoken = now
            left = (
                f"/{total}  {(now - started) / max(1, done) * (total - done):.0f}s left"
                if total
                else ""
            )
            console.print(f"{label}  {done}{left}")

    yield advance
