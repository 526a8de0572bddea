"""How a run is asked to stop: by Ctrl-C or by a scheduler's signal, after the step at hand."""

import signal
from typing import Any

from beit3.ops.collectives import all_gather_objects, world_size


class Interrupted(KeyboardInterrupt):
    """Raised when a run was asked to stop and has saved a checkpoint; the same command resumes it.

    Attributes:
        status: The exit status of the process, 128 + the number of the signal.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """Pickles both arguments: workers send it to the process that waits for them."""
        return type(self), (str(self), self.status - 128)


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop answers after the step at
    hand. Windows has no SIGUSR1, and SIGBREAK instead (Ctrl-Break).

    A second Ctrl-C raises KeyboardInterrupt at once. Schedulers announce the end of a machine by
    SIGTERM (Kubernetes, SLURM) or by a signal of the user's choice (SLURM's --signal=USR1@60).
    """

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
        if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.requested = 0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            try:
                self.previous_handlers[number] = signal.signal(number, self._handle)
            except ValueError:  # only the main thread can handle signals
                continue
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def agree(self) -> int:
        """Returns the signal that any process received, or 0, so that all stop after one step."""
        return max(all_gather_objects(self.requested)) if world_size() > 1 else self.requested

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
