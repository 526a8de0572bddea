"""Jobs whose results are kept in files, so that a stopped program goes on where it was."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3.demo.parallel import Job, run_jobs
from beit3.files import write_text


def run_kept_jobs(jobs: Mapping[Path, Job]) -> None:
    """Runs the jobs whose JSON file, their key, is not there, and writes what they return to it."""
    left = {path: job for path, job in jobs.items() if not path.exists()}
    run_jobs(
        {
            path: replace(job, function=keep_result, arguments=(path, job.function, *job.arguments))
            for path, job in left.items()
        }
    )


def keep_result(path: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function and writes what it returns to a JSON file."""
    result = function(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
