"""Jobs in several processes: what they return, an error, and a process that is ended from outside."""

import os
import signal

import pytest

from beit3.data.process_pool import finished


def work(number: int, kill: bool = False) -> tuple[int, int]:
    """(square, process); ValueError for 3."""
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError("three")
    return number**2, os.getpid()


def test_jobs_are_done_by_others_or_here_in_order():
    jobs = {f"job {number}": (number,) for number in (5, 1, 4)}
    here = list(finished(work, jobs, 1, module=__name__))
    assert here == [
        ("job 5", (25, os.getpid())),
        ("job 1", (1, os.getpid())),
        ("job 4", (16, os.getpid())),
    ]
    there = dict(finished(work, jobs, 2, module=__name__))
    assert {key: square for key, (square, _) in there.items()} == {
        key: square for key, (square, _) in here
    }
    assert os.getpid() not in {process for _, process in there.values()}


def test_an_error_and_an_end_from_outside_are_handed_on():
    with pytest.raises(ValueError, match="three"):
        list(finished(work, {0: (3,), 1: (4,)}, 2, module=__name__))
    with pytest.raises(OSError, match="was ended from outside: the same command goes on from here"):
        list(finished(work, {0: (1, True), 1: (2, True)}, 2, module=__name__))
