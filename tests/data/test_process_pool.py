"""Jobs in several processes: results, errors, and a killed process."""

import os
import signal

import pytest

from beit3.data.process_pool import run_jobs


def work(number: int, kill: bool = False) -> tuple[int, int]:
    """Returns (square, process id); raises ValueError for 3."""
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError("three")
    return number**2, os.getpid()


def test_one_worker_is_this_process_and_more_are_others():
    jobs = {f"job {number}": (number,) for number in (5, 1, 4)}
    results = list(run_jobs(work, jobs, 1, module=__name__))
    assert results == [
        ("job 5", (25, os.getpid())),
        ("job 1", (1, os.getpid())),
        ("job 4", (16, os.getpid())),
    ]
    parallel = dict(run_jobs(work, jobs, 2, module=__name__))
    assert {key: square for key, (square, _) in parallel.items()} == {
        key: square for key, (square, _) in results
    }
    assert os.getpid() not in {process for _, process in parallel.values()}


def test_an_error_and_a_killed_process_are_raised():
    with pytest.raises(ValueError, match="three"):
        list(run_jobs(work, {0: (3,), 1: (4,)}, 2, module=__name__))
    with pytest.raises(OSError, match="was ended from outside: run the same command again"):
        list(run_jobs(work, {0: (1, True), 1: (2, True)}, 2, module=__name__))
