"""Checkpoints from which a run goes on exactly where it was, on the same or another number of processes.

`checkpoints/step_00000400/` holds one safetensors file per process (torch's distributed checkpoint, DCP, in Hugging
Face's format: no pickle is ever read) and `checkpoint.json`: step, best score so far, and the SHA-256 of every file. It
is written under a temporary name, flushed to disk and renamed when it is whole.
"""

import errno
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from beit3.files import flush_to_disk
from beit3.ops.collectives import all_gather_objects, barrier, rank, world_size
from beit3.task import Task
from beit3.weights.matching import first_few, stored
from beit3.weights.store import digest

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled"
)  # one process alone is no fault

DESCRIPTION = "checkpoint.json"
STEP, PART = "step_{:08d}", ".part"

Say = Callable[[str], None]


class Checkpoints:
    """The checkpoints of one run. Every process must call each method at the same step."""

    def __init__(self, run: Path, *, keep: int, asynchronous: bool = False, say: Say = print):
        """keep: how many of the newest stay. asynchronous: `save` returns while files are still being written."""
        self.folder = run / "checkpoints"
        self.keep, self.asynchronous, self.say = max(1, keep), asynchronous, say
        # Written beside the training, which uses the default group: two collectives of one group must not cross.
        self.group: Any = (
            dist.new_group(backend="gloo") if asynchronous and world_size() > 1 else None
        )
        self.pending: threading.Thread | None = None
        self.failure: BaseException | None = None

    # Writing ---------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, task: Task, optimizer: torch.optim.Optimizer, best: float | None
    ) -> None:
        """The state after `step` steps; then all but the newest `keep` go. OSError where it cannot be written."""
        self.wait()
        path = self.folder / STEP.format(step)
        part = path.with_suffix(PART)
        self._forget_parts()
        if rank() == 0:
            part.mkdir(parents=True)
        barrier()
        state = tensors_of(task) | optimizer_state(task, optimizer)
        description = {
            "step": step,
            "best": best,
            "processes": world_size(),
            "torch": torch.__version__,
        }
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        alone = world_size() == 1
        if self.asynchronous:
            snapshot = {name: tensor.detach().clone() for name, tensor in state.items()}
            future = dcp.async_save(
                snapshot, storage_writer=writer, process_group=self.group, no_dist=alone
            )
            self.pending = threading.Thread(target=self._finish, args=(future, path, description))
            self.pending.start()
        else:
            try:
                dcp.save(state, storage_writer=writer, no_dist=alone)
                self._publish(path, description)
            except (OSError, RuntimeError, CheckpointException) as error:
                self._failed(error)
        barrier()  # a process that leaves early would have the others killed while they write

    def wait(self) -> None:
        """Until what is being written is whole. OSError where that failed."""
        if self.pending is not None:
            self.pending.join()
            self.pending = None
        failure, self.failure = self.failure, None
        failures = [text for text in all_gather_objects(str(failure) if failure else "") if text]
        if failures:
            self._failed(failure or OSError(failures[0]))

    def _finish(self, future: Future, path: Path, description: dict[str, Any]) -> None:
        try:
            future.result()
            self._publish(path, description)
        except BaseException as error:
            self.failure = error

    def _publish(self, path: Path, description: dict[str, Any]) -> None:
        """Rank 0: name the files with their digests, make everything durable, rename, forget old ones."""
        if rank() > 0:
            return
        part = path.with_suffix(PART)
        files = sorted(part.iterdir())
        text = json.dumps(
            description | {"files": {file.name: digest(file) for file in files}}, indent=1
        )
        (part / DESCRIPTION).write_text(text + "\n")
        for each in (*files, part / DESCRIPTION, part):
            flush_to_disk(each)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        flush_to_disk(self.folder)
        kept = [each for each in self.paths() if each <= path][-self.keep :]
        for each in self.paths():
            if each not in kept:  # an old one, or a newer one that was damaged and passed over
                shutil.rmtree(each)

    def _failed(self, error: BaseException) -> NoReturn:
        """Remove what was begun and say what is still good."""
        self._forget_parts()
        raise full_disk(error, self.folder.parent) from error

    def _forget_parts(self) -> None:
        for part in self.folder.glob(f"*{PART}") if rank() == 0 else ():
            shutil.rmtree(part, ignore_errors=True)

    # Reading ---------------------------------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(
            path for path in self.folder.glob("step_*") if path.suffix != PART and path.is_dir()
        )

    def restore(self, task: Task, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
        """Load the newest checkpoint that is whole: (steps done, best score so far), or (0, None) where there is none.

        One that was damaged is named and the one before it used. ValueError where none of several is whole, or where
        one does not fit the task.
        """
        paths = self.paths()
        for index, path in enumerate(reversed(paths)):
            fault = all_gather_objects(damage(path) if rank() == 0 else "")[0]
            if not fault:
                return load(path, task, optimizer)
            before = paths[-index - 2] if index + 1 < len(paths) else None
            if before is None:
                raise ValueError(
                    f"{path} is damaged ({fault}) and there is no other: delete {self.folder.parent} and start again"
                )
            self.say(f"WARNING {path} is damaged ({fault}): going on from {before.name} instead")
        return 0, None


def tensors_of(task: Task) -> dict[str, Tensor]:
    """Weights and buffers by name, under `task.`; frozen parts left out."""
    return {f"task.{name}": tensor for name, tensor in stored(task).items()}


def optimizer_state(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name, under `optimizer.`. A parameter without a gradient so far has none."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in task.trainable()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load(path: Path, task: Task, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
    """Fill task and optimizer from a whole checkpoint: (step, best). ValueError where names differ."""
    reader = HuggingFaceStorageReader(str(path))
    written = set(reader.read_metadata().state_dict_metadata)
    for name, parameter in task.trainable():
        keys = [
            key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{key}" in written
        ]
        if keys:
            empty = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
            optimizer.state[parameter] = {
                key: empty.get(key, torch.zeros_like(parameter)).detach() for key in keys
            }
    state = tensors_of(task) | optimizer_state(task, optimizer)
    missing, unexpected = sorted(state.keys() - written), sorted(written - state.keys())
    if missing or unexpected:
        verb, names = ("lacks", missing) if missing else ("has unknown", unexpected)
        raise ValueError(
            f"{path} does not fit this run: it {verb} {first_few(names)}; use another --out"
        )
    # Tensors of the state share their memory with task and optimizer, which are filled thereby.
    dcp.load(state, storage_reader=reader, no_dist=world_size() == 1)
    description = json.loads((path / DESCRIPTION).read_text())
    return description["step"], description["best"]


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words; '' for a whole one."""
    try:
        files = json.loads((path / DESCRIPTION).read_text())["files"]
        for name, wanted in files.items():
            if digest(path / name) != wanted:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{DESCRIPTION} cannot be read: {error}"
    return ""


def full_disk(error: BaseException, run: Path) -> BaseException:
    """The same error; for a disk that filled, one that says which checkpoint is still good and what to do."""
    failures = getattr(error, "failures", {}).values()  # DCP's, by process: (error, traceback)
    causes = [error, *(each[0] if isinstance(each, tuple) else each for each in failures)]
    if not any(
        isinstance(cause, OSError) and cause.errno == errno.ENOSPC or "No space left" in str(cause)
        for cause in causes
    ):
        return error
    good = sorted(path.name for path in (run / "checkpoints").glob("step_*") if path.suffix != PART)
    last = f"{good[-1]} is the last good checkpoint" if good else "there is no checkpoint yet"
    return OSError(
        errno.ENOSPC,
        f"the disk of {run} is full; {last}: free some space, then the same command goes on from it",
    )
