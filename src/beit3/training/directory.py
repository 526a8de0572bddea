"""The directory of a run: whose it is, whether it is in use or finished, and what it remembers of its surroundings."""

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
from beit3.data.stores.records import write_text
from beit3.files import read_json
from beit3.ops.collectives import all_gather_objects, rank, world_size
from beit3.task import Task

RECIPE, LOCK, USER = "recipe.json", ".lock", ".user"


def inputs_of(task: Task) -> dict[str, Any]:
    """What a run reads beside its recipe: the config that the records completed, tokenizer and frozen parts by digest."""
    frozen = {name: file.sha256 for name, file in getattr(task, "frozen_files", {}).items()}
    digest = task.tokenizer.digest if task.has_tokenizer else None
    return {"config": to_dict(task.config), "tokenizer": digest, "frozen": frozen}


def refuse_other_run(out: Path, mine: dict[str, Any]) -> None:
    """ValueError where `out` holds anything else than this run."""
    path = out / RECIPE
    if path.exists():
        theirs = read_json(path)
        theirs.pop("environment", None)
        if theirs != mine:
            field = first_difference(theirs, mine)
            raise ValueError(
                f"{out} holds another run (its {field} differs): give another --out, or delete it"
            )
    elif out.exists() and (
        out.is_file() or any(each.name not in (LOCK, USER) for each in out.iterdir())
    ):
        raise ValueError(f"{out} is not empty and holds no run: give another --out")


def first_difference(theirs: Any, mine: Any, where: str = "") -> str:
    """Dotted name of the first field in which two JSON values differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*mine, *theirs]:
            if theirs.get(key) != mine.get(key):
                return first_difference(
                    theirs.get(key), mine.get(key), f"{where}.{key}".lstrip(".")
                )
    return where


def finished(out: Path, steps: int) -> bool:
    """Whether `out` has run all its steps and stored its weights."""
    return (out / "checkpoints" / f"step_{steps:08d}").is_dir() and (
        out / "last" / "config.json"
    ).exists()


@contextmanager
def claimed(out: Path, mine: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Hold `out` for this run alone while the block runs, and write its recipe first. ValueError where another run is in it.

    Rank 0 holds the lock, which the system lets go of when the process ends, however it ends.
    """
    lock, fault = FileLock(out / LOCK, timeout=0), ""
    if rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            refuse_other_run(out, mine)
            if not (out / RECIPE).exists():
                write_text(
                    out / RECIPE,
                    json.dumps(mine | {"environment": environment(device)}, indent=1) + "\n",
                )
            write_text(out / USER, f"process {os.getpid()} on {socket.gethostname()}")
        except Timeout:
            user = (out / USER).read_text() if (out / USER).exists() else "another process"
            fault = f"{out} is in use by {user}: wait for it, stop it, or give another --out"
        except ValueError as error:
            fault = str(error)
    fault = all_gather_objects(fault)[0]
    if fault:
        lock.release()
        raise ValueError(fault)
    try:
        yield
    finally:
        if rank() == 0:
            (out / USER).unlink(missing_ok=True)
            lock.release()


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run was started: versions, machine, processes, command line, and the state of the code."""
    try:
        own = version("beit3")
    except PackageNotFoundError:
        own = ""
    return {
        "beit3": own,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git": git(),
    }


def git() -> dict[str, Any] | None:
    """Commit of the code that runs and whether files of the package differ from it; None outside a repository."""
    here = Path(__file__).parents[1]

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        ask(
            "ls-files", "--error-unmatch", __file__
        )  # an environment inside somebody else's repository is not ours
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--", str(here))),
        }
    except (OSError, subprocess.SubprocessError):
        return None
