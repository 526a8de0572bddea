"""The watch: slow steps by a clock set by hand, stalls by a short limit in real time."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beit3.data.stores import records
from beit3.training import watchdog as module
from beit3.training.watchdog import Watchdog

STALL = 0.2
FEW = module.WINDOW // 5


class Clock:
    """Stands in for `time`: moves when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def log(said) -> Any:
    return SimpleNamespace(info=said.append)


def step(watch: Watchdog, clock: Clock, number: int, seconds: float, waiting: float = 0.0) -> None:
    watch.begin_step(number)
    clock.now += waiting
    watch.mark_loaded()
    clock.now += seconds - waiting
    watch.end_step()


# Slow steps ---------------------------------------------------------------------------------------


def test_a_slow_step_is_named_with_what_it_waited_for(clock, log, said):
    watch = Watchdog(log)
    for number in range(FEW):
        step(watch, clock, number, 0.5 + 0.02 * number)
    step(watch, clock, FEW, 4.0, waiting=3.5)
    assert said == [
        f"WARNING step {FEW + 1} took 4.0 s, the median is 0.59 s; 3.5 s of it were spent waiting "
        "for records"
    ]


def test_warnings_do_not_crowd(clock, log, said):
    watch = Watchdog(log)
    for number in range(FEW):
        step(watch, clock, number, 1.0)
    for number in range(FEW, FEW + 4):
        step(watch, clock, number, 6.0)
    assert len(said) == 1
    clock.now += module.WARNING_INTERVAL
    step(watch, clock, FEW + 4, 6.0)
    assert len(said) == 2


def test_what_is_no_slow_step(clock, log, said):
    watch = Watchdog(log)
    step(watch, clock, 0, 1000.0)  # the first compiles; there is nothing to compare with
    for number in range(1, FEW):
        step(watch, clock, number, 0.01)
    step(watch, clock, FEW, 0.9)  # 90 times the median, but under a second
    for number in range(FEW + 1, FEW + module.WINDOW + 1):
        step(watch, clock, number, 1.0)
    step(watch, clock, FEW + module.WINDOW + 1, module.SLOW_FACTOR - 0.01)
    assert said == []
    step(watch, clock, FEW + module.WINDOW + 2, module.SLOW_FACTOR + 0.01)
    assert len(said) == 1


def test_the_median_follows_the_last_steps(clock, log):
    watch = Watchdog(log)
    for number in range(FEW - 1):
        step(watch, clock, number, 9.0)
    assert watch.compute_median() == 0.0, "too few to tell"
    step(watch, clock, FEW - 1, 9.0)
    assert watch.compute_median() == pytest.approx(9.0)
    for number in range(FEW, FEW + module.WINDOW):
        step(watch, clock, number, 2.0)
    assert watch.compute_median() == pytest.approx(2.0)


def test_a_lap_is_the_mean_since_the_last_one(clock, log):
    watch = Watchdog(log)
    step(watch, clock, 0, 2.0, waiting=0.5)
    clock.now += 100.0  # an evaluation
    step(watch, clock, 1, 4.0, waiting=1.5)
    assert watch.pop_timings() == pytest.approx({"seconds": 3.0, "seconds_waiting": 1.0})
    step(watch, clock, 2, 8.0)
    assert watch.pop_timings() == pytest.approx({"seconds": 8.0, "seconds_waiting": 0.0})


# Stalls -------------------------------------------------------------------------------------------


def until(said: list[str], count: int) -> None:
    end = time.monotonic() + 60
    while len(said) < count:
        assert time.monotonic() < end, f"nothing was said, only {said}"
        time.sleep(0.01)


def test_a_stalled_step_is_reported_while_it_lasts(log, said):
    with Watchdog(log, stall_seconds=STALL) as watch:
        watch.begin_step(6)
        until(said, 1)
        assert said[0].startswith("WARNING step 7 has not ended for 0s, waiting for records, at ")
        time.sleep(3 * STALL)
        assert len(said) == 1, "a step is reported once"
        watch.mark_loaded()
        watch.end_step()
        watch.begin_step(7)
        watch.mark_loaded()
        until(said, 2)
        assert said[1].startswith("WARNING step 8 has not ended for 0s, computing, at ")
        watch.end_step()


def test_the_place_is_the_innermost_line_of_this_package(log, said, tmp_path):
    def rows() -> Iterator[dict]:
        until(said, 1)
        yield {}

    with Watchdog(log, stall_seconds=STALL) as watch:
        watch.begin_step(0)
        records.write_records(tmp_path / "rows.jsonl", rows())
        watch.end_step()
    place = said[0].rpartition(" at ")[2]
    file, _, line = place.removesuffix(" in write_records").partition(":")
    assert Path(file) == Path("data/stores/records.py")
    assert (
        Path(records.__file__).read_text().splitlines()[int(line) - 1].strip()
        == "for record in records:"
    )


def test_a_place_outside_the_package_is_not_made_up(log, said):
    with Watchdog(log, stall_seconds=STALL) as watch:
        watch.begin_step(0)
        until(said, 1)
    assert said[0].endswith("at an unknown place")


def test_nothing_is_watched_between_steps(log, said):
    """Evaluations and checkpoints may take as long as they like."""
    with Watchdog(log, stall_seconds=STALL) as watch:
        time.sleep(2 * STALL)
        watch.begin_step(0)
        watch.mark_loaded()
        watch.end_step()
        time.sleep(4 * STALL)
        assert watch.pop_timings()["seconds"] < STALL
    assert said == []


def test_steps_that_are_always_long_do_not_stall(log, said):
    """The limit is a multiple of the median where that is longer."""
    with Watchdog(log, stall_seconds=STALL) as watch:
        watch.recent_seconds.extend([STALL] * FEW)
        watch.begin_step(0)
        time.sleep(4 * STALL)
        watch.end_step()
    assert said == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_block(log, error):
    before = set(threading.enumerate())
    try:
        with Watchdog(log) as watch:
            watch.begin_step(0)
            assert set(threading.enumerate()) - before == {watch.thread}
            if error:
                raise error
    except (KeyboardInterrupt, ValueError) as caught:
        assert type(caught) is error
    assert set(threading.enumerate()) == before
