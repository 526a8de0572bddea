"""The watchdog: slow steps by a clock set by hand, stalls by a short limit in real time."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beit3.data.stores import records
from beit3.training import watchdog as watchdog_module
from beit3.training.watchdog import Watchdog

STALL = 0.2
FEW = watchdog_module.WINDOW // 5


class Clock:
    """Replaces `time`; it advances only when a test sets `now`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    return clock


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def log(messages) -> Any:
    return SimpleNamespace(info=messages.append)


def run_step(
    watchdog: Watchdog, clock: Clock, number: int, seconds: float, waiting: float = 0.0
) -> None:
    watchdog.begin_step(number)
    clock.now += waiting
    watchdog.mark_loaded()
    clock.now += seconds - waiting
    watchdog.end_step()


# Slow steps ---------------------------------------------------------------------------------------


def test_a_slow_step_is_reported_with_its_waiting_time(clock, log, messages):
    watchdog = Watchdog(log)
    for number in range(FEW):
        run_step(watchdog, clock, number, 0.5 + 0.02 * number)
    run_step(watchdog, clock, FEW, 4.0, waiting=3.5)
    assert messages == [
        f"WARNING step {FEW + 1} took 4.0 s, the median is 0.59 s; 3.5 s of it were spent waiting "
        "for records"
    ]


def test_warnings_are_a_minimum_interval_apart(clock, log, messages):
    watchdog = Watchdog(log)
    for number in range(FEW):
        run_step(watchdog, clock, number, 1.0)
    for number in range(FEW, FEW + 4):
        run_step(watchdog, clock, number, 6.0)
    assert len(messages) == 1
    clock.now += watchdog_module.WARNING_INTERVAL
    run_step(watchdog, clock, FEW + 4, 6.0)
    assert len(messages) == 2


def test_short_and_first_steps_are_not_slow(clock, log, messages):
    watchdog = Watchdog(log)
    run_step(watchdog, clock, 0, 1000.0)  # the first step compiles; there is no median yet
    for number in range(1, FEW):
        run_step(watchdog, clock, number, 0.01)
    run_step(watchdog, clock, FEW, 0.9)  # 90 times the median, but under a second
    for number in range(FEW + 1, FEW + watchdog_module.WINDOW + 1):
        run_step(watchdog, clock, number, 1.0)
    run_step(watchdog, clock, FEW + watchdog_module.WINDOW + 1, watchdog_module.SLOW_FACTOR - 0.01)
    assert messages == []
    run_step(watchdog, clock, FEW + watchdog_module.WINDOW + 2, watchdog_module.SLOW_FACTOR + 0.01)
    assert len(messages) == 1


def test_the_median_is_that_of_the_last_steps(clock, log):
    watchdog = Watchdog(log)
    for number in range(FEW - 1):
        run_step(watchdog, clock, number, 9.0)
    assert watchdog.compute_median() == 0.0, "too few steps"
    run_step(watchdog, clock, FEW - 1, 9.0)
    assert watchdog.compute_median() == pytest.approx(9.0)
    for number in range(FEW, FEW + watchdog_module.WINDOW):
        run_step(watchdog, clock, number, 2.0)
    assert watchdog.compute_median() == pytest.approx(2.0)


def test_timings_are_means_since_they_were_last_read(clock, log):
    watchdog = Watchdog(log)
    run_step(watchdog, clock, 0, 2.0, waiting=0.5)
    clock.now += 100.0  # an evaluation
    run_step(watchdog, clock, 1, 4.0, waiting=1.5)
    assert watchdog.pop_timings() == pytest.approx({"seconds": 3.0, "seconds_waiting": 1.0})
    run_step(watchdog, clock, 2, 8.0)
    assert watchdog.pop_timings() == pytest.approx({"seconds": 8.0, "seconds_waiting": 0.0})


# Stalls -------------------------------------------------------------------------------------------


def wait_for_messages(messages: list[str], count: int) -> None:
    end = time.monotonic() + 60
    while len(messages) < count:
        assert time.monotonic() < end, f"only {messages} were logged"
        time.sleep(0.01)


def test_a_stalled_step_is_reported_while_it_lasts(log, messages):
    with Watchdog(log, stall_seconds=STALL) as watchdog:
        watchdog.begin_step(6)
        wait_for_messages(messages, 1)
        assert messages[0].startswith(
            "WARNING step 7 has not ended for 0s, waiting for records, at "
        )
        time.sleep(3 * STALL)
        assert len(messages) == 1, "a step is reported once"
        watchdog.mark_loaded()
        watchdog.end_step()
        watchdog.begin_step(7)
        watchdog.mark_loaded()
        wait_for_messages(messages, 2)
        assert messages[1].startswith("WARNING step 8 has not ended for 0s, computing, at ")
        watchdog.end_step()


def test_a_stall_is_located_at_the_innermost_line_of_the_package(log, messages, tmp_path):
    def yield_record() -> Iterator[dict]:
        wait_for_messages(messages, 1)
        yield {}

    with Watchdog(log, stall_seconds=STALL) as watchdog:
        watchdog.begin_step(0)
        records.write_records(tmp_path / "rows.jsonl", yield_record())
        watchdog.end_step()
    location = messages[0].rpartition(" at ")[2]
    file, _, line = location.removesuffix(" in write_records").partition(":")
    assert Path(file) == Path("data/stores/records.py")
    assert (
        Path(records.__file__).read_text().splitlines()[int(line) - 1].strip()
        == "for record in records:"
    )


def test_a_stall_outside_the_package_has_an_unknown_place(log, messages):
    with Watchdog(log, stall_seconds=STALL) as watchdog:
        watchdog.begin_step(0)
        wait_for_messages(messages, 1)
    assert messages[0].endswith("at an unknown place")


def test_time_between_steps_is_not_watched(log, messages):
    """Evaluations and checkpoints may take any time."""
    with Watchdog(log, stall_seconds=STALL) as watchdog:
        time.sleep(2 * STALL)
        watchdog.begin_step(0)
        watchdog.mark_loaded()
        watchdog.end_step()
        time.sleep(4 * STALL)
        assert watchdog.pop_timings()["seconds"] < STALL
    assert messages == []


def test_the_stall_limit_grows_with_the_median(log, messages):
    """The limit is at least a multiple of the median."""
    with Watchdog(log, stall_seconds=STALL) as watchdog:
        watchdog.recent_seconds.extend([STALL] * FEW)
        watchdog.begin_step(0)
        time.sleep(4 * STALL)
        watchdog.end_step()
    assert messages == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_context(log, error):
    threads = set(threading.enumerate())
    try:
        with Watchdog(log) as watchdog:
            watchdog.begin_step(0)
            assert set(threading.enumerate()) - threads == {watchdog.thread}
            if error:
                raise error
    except (KeyboardInterrupt, ValueError) as caught:
        assert type(caught) is error
    assert set(threading.enumerate()) == threads
