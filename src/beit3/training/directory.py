"""The directory of a run: which run it belongs to, whether it is in use, whether it is finished.

OUT/
    recipe.json         task, initial weights, recipe, inputs; environment of the first start
    metrics.jsonl       one line per logged step: losses, metrics, learning rates, times
    tensorboard/        the same scalars for TensorBoard
    checkpoints/        states to resume from (beit3.training.checkpoint draws them)
    scores.json         the scores of the last evaluation and their step
    best/               weights with the best headline score so far (beit3.weights.store)
    last/               weights after the last step
    .lock, .user        held while a run uses the directory, and by whom
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from beit3.config import to_dict
from beit3.files import read_json, write_text
from beit3.ops.collectives import all_gather_objects, rank, world_size
from beit3.task import Task

RECIPE_FILE, LOCK_FILE, USER_FILE = "recipe.json", ".lock", ".user"


def describe_inputs(task: Task) -> dict[str, Any]:
    """Describes the inputs of a run besides its recipe.

    These are the config as the records completed it, and the SHA-256 of the text tokenizer and of
    the files of frozen parts.
    """
    return {
        "config": to_dict(task.config),
        "tokenizer": task.tokenizer.digest if task.has_tokenizer else None,
        "frozen": {name: file.sha256 for name, file in task.frozen_files.items()},
    }


def check_same_run(out: Path, run: dict[str, Any]) -> None:
    """Raises ValueError if `out` holds anything else than the run that `run` describes."""
    recipe_file = out / RECIPE_FILE
    if recipe_file.exists():
        stored = read_json(recipe_file)
        stored.pop("environment", None)
        if stored != run:
            field = find_first_difference(stored, run)
            raise ValueError(
                f"{out} holds another run (its {field} differs): give another --out, or delete it"
            )
    elif out.exists() and not _is_empty(out):
        raise ValueError(f"{out} is not empty and holds no run: give another --out")


def _is_empty(out: Path) -> bool:
    """Returns whether `out` is a directory that holds at most the files of the lock."""
    return out.is_dir() and all(path.name in (LOCK_FILE, USER_FILE) for path in out.iterdir())


def find_first_difference(stored: Any, current: Any, path: str = "") -> str:
    """Returns the dotted name of the first field in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in [*current, *stored]:
            if stored.get(key) != current.get(key):
                key_path = f"{path}.{key}".lstrip(".")
                return find_first_difference(stored.get(key), current.get(key), key_path)
    return path


def is_finished(out: Path, num_steps: int) -> bool:
    """Returns whether the run in `out` has done all its steps and stored its weights."""
    last_checkpoint = out / "checkpoints" / f"step_{num_steps:08d}"
    return last_checkpoint.is_dir() and (out / "last" / "config.json").exists()


@contextmanager
def lock_run_directory(out: Path, run: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Reserves `out` for this run while the block runs, and writes its recipe.json first.

    Rank 0 holds the lock, which the system releases when the process ends, however it ends.

    Args:
        out: The run directory; it is created where it does not exist.
        run: The description of the run, without its environment.
        device: The device of this process, for the description of the environment.

    Raises:
        ValueError: Another run is using `out`, or `out` holds another run.
    """
    lock = FileLock(out / LOCK_FILE, timeout=0)
    error = _acquire(lock, out, run, device) if rank() == 0 else ""
    error = all_gather_objects(error)[0]
    if error:
        lock.release()
        raise ValueError(error)
    try:
        yield
    finally:
        if rank() == 0:
            (out / USER_FILE).unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, out: Path, run: dict[str, Any], device: torch.device) -> str:
    """Locks `out` and writes recipe.json and the user's name; returns the error, or ''."""
    user_file = out / USER_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        check_same_run(out, run)
        if not (out / RECIPE_FILE).exists():
            content = run | {"environment": describe_environment(device)}
            write_text(out / RECIPE_FILE, json.dumps(content, indent=1) + "\n")
        write_text(user_file, f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        user = user_file.read_text(encoding="utf-8") if user_file.exists() else "another process"
        return f"{out} is in use by {user}: wait for it, stop it, or give another --out"
    except ValueError as error:
        return str(error)
    return ""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describes the start of a run: versions, machine, processes, command line, state of the
    code."""
    try:
        package_version = version("beit3")
    except PackageNotFoundError:
        package_version = ""
    return {
        "beit3": package_version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git": describe_git_commit(),
    }


def describe_git_commit() -> dict[str, Any] | None:
    """Returns the commit of the running code and whether files of the package differ from it.

    Returns None if the package is not in a git repository of its own.
    """
    package = Path(__file__).parents[1]
    try:
        # Fails where the environment that holds the package lies in somebody else's repository.
        _run_git(package, "ls-files", "--error-unmatch", __file__)
        return {
            "commit": _run_git(package, "rev-parse", "HEAD"),
            "changed": bool(_run_git(package, "status", "--porcelain", "--", str(package))),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(directory: Path, *arguments: str) -> str:
    """Runs git in `directory` and returns its output. Raises SubprocessError if it fails."""
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    return done.stdout.decode(errors="replace").strip()
