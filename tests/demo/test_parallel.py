"""Jobs that need each other, and one that fails. Ctrl-C is in test_tour.py."""

import pickle
import signal
from pathlib import Path

import pytest
import torch

from beit3.demo.parallel import Job, run_jobs
from beit3.training.stop import Interrupted


def append(path: Path, word: str) -> int:
    """Appends a word to a file; returns the number of threads."""
    with path.open("a") as lines:
        lines.write(f"{word} ")
    return torch.get_num_threads()


def fail() -> None:
    raise ValueError("the second job fails")


def test_jobs_run_after_what_they_need_and_none_after_a_failure(tmp_path):
    path = tmp_path / "words"
    jobs = {
        "third": Job(append, (path, "third"), needs=("second",)),
        "second": Job(append, (path, "second"), needs=("first",)),
        "first": Job(append, (path, "first")),
    }
    assert run_jobs(jobs) == {"third": 1, "second": 1, "first": 1}
    assert path.read_text() == "first second third "

    with pytest.raises(ValueError, match="the second job fails"):
        run_jobs({**jobs, "second": Job(fail, needs=("first",))})
    assert path.read_text() == "first second third first "
    assert run_jobs({}) == {}


def test_jobs_that_need_each_other_are_refused(tmp_path):
    path = tmp_path / "words"
    jobs = {
        "first": Job(append, (path, "first")),
        "second": Job(append, (path, "second"), needs=("third",)),
        "third": Job(append, (path, "third"), needs=("second",)),
    }
    with pytest.raises(ValueError, match="jobs that need each other: second, third"):
        run_jobs(jobs)
    assert path.read_text() == "first "


def test_an_interruption_reaches_the_process_that_waits():
    sent = pickle.loads(pickle.dumps(Interrupted("stopped after step 3", signal.SIGTERM)))
    assert str(sent) == "stopped after step 3" and sent.status == 128 + signal.SIGTERM
