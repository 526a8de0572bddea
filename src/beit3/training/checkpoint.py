"""Checkpoints from which a run resumes exactly, on the same or another number of processes.

    OUT/checkpoints/
        step_00000400/                     the state after 400 steps
            shard-00001-model-...safetensors    the tensors of process 0
            shard-00002-model-...safetensors    the tensors of process 1
            ...
            checkpoint.json                step, best score so far, SHA-256 of every file
        step_00000800/
            ...
        step_00001200.part/                being written

The tensor files are torch's distributed checkpoint (DCP) in Hugging Face's format, so no pickle is
ever read. Weights and buffers are named `task.<name>`, the optimizer's tensors
`optimizer.<parameter>.<key>`. A checkpoint is written under the temporary name, flushed to disk and
renamed when it is complete.
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

from beit3.files import compute_sha256, flush_to_disk, write_text
from beit3.ops.collectives import all_gather_objects, barrier, rank, world_size
from beit3.task import Task
from beit3.weights.matching import abbreviate, get_weights

# A single process needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

DESCRIPTION_FILE = "checkpoint.json"
DIRECTORY_FORMAT = "step_{:08d}"
PARTIAL_SUFFIX = ".part"


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Every process must call each method at the same step.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        asynchronous: bool = False,
        info: Callable[[str], None] = print,
    ):
        """Prepares the checkpoints of the run directory `run`; nothing is written yet.

        Args:
            run: The run directory.
            keep: How many of the newest checkpoints stay, at least 1.
            asynchronous: Whether `save` returns while files are still being written. It then takes
                memory for a copy of the state.
            info: Prints a line.
        """
        self.directory = run / "checkpoints"
        self.keep, self.asynchronous, self.info = max(1, keep), asynchronous, info
        # A group of its own: training uses the default one meanwhile, and two collectives of one
        # group must not cross.
        self.group: Any = None
        if asynchronous and world_size() > 1:
            self.group = dist.new_group(backend="gloo")
        self.pending: threading.Thread | None = None
        self.failure: BaseException | None = None

    # Saving ---------------------------------------------------------------------------------------

    def save(
        self, step: int, task: Task, optimizer: torch.optim.Optimizer, best: float | None
    ) -> None:
        """Saves the state after `step` steps and deletes all but the newest `keep` checkpoints.

        `best` is the best score so far. Raises OSError if the checkpoint cannot be written.
        """
        self.wait()
        path = self.directory / DIRECTORY_FORMAT.format(step)
        self._delete_partial()
        if rank() == 0:
            path.with_suffix(PARTIAL_SUFFIX).mkdir(parents=True)
        barrier()
        state = get_task_state(task) | get_optimizer_state(task, optimizer)
        description = {
            "step": step,
            "best": best,
            "processes": world_size(),
            "torch": torch.__version__,
        }
        if self.asynchronous:
            self._save_asynchronously(path, state, description)
        else:
            self._save(path, state, description)
        barrier()  # if a process left early, the launcher would kill the others while they write

    def _save(self, path: Path, state: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Writes and publishes a checkpoint."""
        writer = HuggingFaceStorageWriter(
            str(path.with_suffix(PARTIAL_SUFFIX)), save_distributed=True
        )
        try:
            dcp.save(state, storage_writer=writer, no_dist=world_size() == 1)
            self._publish(path, description)
        except (OSError, RuntimeError, CheckpointException) as error:
            self._fail(error)

    def _save_asynchronously(
        self, path: Path, state: dict[str, Tensor], description: dict[str, Any]
    ) -> None:
        """Starts a thread that writes and publishes a copy of the state."""
        writer = HuggingFaceStorageWriter(
            str(path.with_suffix(PARTIAL_SUFFIX)), save_distributed=True
        )
        copies = {name: tensor.detach().clone() for name, tensor in state.items()}
        future = dcp.async_save(
            copies, storage_writer=writer, process_group=self.group, no_dist=world_size() == 1
        )
        self.pending = threading.Thread(
            target=self._publish_when_written, args=(future, path, description)
        )
        self.pending.start()

    def _publish_when_written(
        self, future: Future, path: Path, description: dict[str, Any]
    ) -> None:
        """Publishes a checkpoint when its files are written; keeps an error for `wait`."""
        try:
            future.result()
            self._publish(path, description)
        except BaseException as error:
            self.failure = error

    def _publish(self, path: Path, description: dict[str, Any]) -> None:
        """Completes a written checkpoint: digests, flush, rename, deletion of old ones (rank 0)."""
        if rank() > 0:
            return
        partial = path.with_suffix(PARTIAL_SUFFIX)
        files = sorted(partial.iterdir())
        digests = {file.name: compute_sha256(file) for file in files}
        text = json.dumps(description | {"files": digests}, indent=1)
        write_text(partial / DESCRIPTION_FILE, text + "\n")
        for written in (*files, partial / DESCRIPTION_FILE, partial):
            flush_to_disk(written)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        flush_to_disk(self.directory)
        self._delete_others(path)

    def _delete_others(self, newest: Path) -> None:
        """Deletes old checkpoints, and damaged ones that are newer than `newest`."""
        checkpoints = self.list_checkpoints()
        kept = [path for path in checkpoints if path <= newest][-self.keep :]
        for path in checkpoints:
            if path not in kept:
                shutil.rmtree(path)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written. Raises OSError if that failed."""
        if self.pending is not None:
            self.pending.join()
            self.pending = None
        failure, self.failure = self.failure, None
        messages = all_gather_objects(str(failure) if failure else "")
        first_message = next((message for message in messages if message), "")
        if first_message:
            self._fail(failure or OSError(first_message))

    def _fail(self, error: BaseException) -> NoReturn:
        """Deletes the partial checkpoint and raises `error`, explained if the disk is full."""
        self._delete_partial()
        raise explain_full_disk(error, self.directory.parent) from error

    def _delete_partial(self) -> None:
        """Deletes checkpoints that were not completed (rank 0)."""
        if rank() > 0:
            return
        for path in self.directory.glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    # Restoring ------------------------------------------------------------------------------------

    def list_checkpoints(self) -> list[Path]:
        """Returns the complete checkpoints, oldest first."""
        return sorted(
            path
            for path in self.directory.glob("step_*")
            if path.suffix != PARTIAL_SUFFIX and path.is_dir()
        )

    def restore(self, task: Task, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
        """Loads the newest checkpoint that is not damaged.

        A damaged one is reported and the one before it is used.

        Returns:
            The number of steps done and the best score so far, or (0, None) without a checkpoint.

        Raises:
            ValueError: All checkpoints are damaged, or the checkpoint does not fit the task.
        """
        newest_first = self.list_checkpoints()[::-1]
        for index, path in enumerate(newest_first):
            damage = all_gather_objects(find_damage(path) if rank() == 0 else "")[0]
            if not damage:
                return load_checkpoint(path, task, optimizer)
            if index + 1 == len(newest_first):
                raise ValueError(
                    f"{path} is damaged ({damage}) and there is no other: delete "
                    f"{self.directory.parent} and start again"
                )
            previous = newest_first[index + 1]
            self.info(
                f"WARNING {path} is damaged ({damage}): resuming from {previous.name} instead"
            )
        return 0, None


def get_task_state(task: Task) -> dict[str, Tensor]:
    """Returns weights and buffers by name, under `task.`; frozen parts are left out."""
    return {f"task.{name}": tensor for name, tensor in get_weights(task).items()}


def get_optimizer_state(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's tensors by parameter name, under `optimizer.`.

    A parameter that has had no gradient so far has none.
    """
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in task.trainable_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_checkpoint(
    path: Path, task: Task, optimizer: torch.optim.Optimizer
) -> tuple[int, float | None]:
    """Fills task and optimizer from a complete checkpoint and returns (step, best score).

    Raises ValueError if the names of the tensors differ.
    """
    reader = HuggingFaceStorageReader(str(path))
    stored_names = set(reader.read_metadata().state_dict_metadata)
    _allocate_optimizer_state(task, optimizer, stored_names)
    state = get_task_state(task) | get_optimizer_state(task, optimizer)
    missing, unexpected = state.keys() - stored_names, stored_names - state.keys()
    if missing or unexpected:
        verb, names = ("lacks", missing) if missing else ("has unknown", unexpected)
        raise ValueError(
            f"{path} does not fit this run: it {verb} {abbreviate(sorted(names))}; use another "
            "--out"
        )
    # Tensors of the state share their memory with task and optimizer, which are filled thereby.
    dcp.load(state, storage_reader=reader, no_dist=world_size() == 1)
    description = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    return description["step"], description["best"]


def _allocate_optimizer_state(
    task: Task, optimizer: torch.optim.Optimizer, stored_names: set[str]
) -> None:
    """Creates the optimizer's tensors for every parameter of which the checkpoint holds some."""
    for name, parameter in task.trainable_parameters():
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter).detach(),
            "exp_avg_sq": torch.zeros_like(parameter).detach(),
            "momentum_buffer": torch.zeros_like(parameter).detach(),
        }
        stored = {
            key: value for key, value in state.items() if f"optimizer.{name}.{key}" in stored_names
        }
        if stored:
            optimizer.state[parameter] = stored


def find_damage(path: Path) -> str:
    """Returns the damage of a checkpoint in words, or '' if it is complete and unchanged."""
    try:
        files = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))["files"]
        for name, digest in files.items():
            if compute_sha256(path / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{DESCRIPTION_FILE} cannot be read: {error}"
    return ""


def explain_full_disk(error: BaseException, run: Path) -> BaseException:
    """Returns an OSError that names the last good checkpoint if the disk is full, else `error`."""
    causes = [error]
    if isinstance(error, CheckpointException):  # holds (error, traceback) by process
        causes += [failure[0] for failure in error.failures.values()]
    disk_is_full = any(
        (isinstance(cause, OSError) and cause.errno == errno.ENOSPC)
        or "No space left" in str(cause)
        for cause in causes
    )
    if not disk_is_full:
        return error
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    complete = sorted(name for name in names if not name.endswith(PARTIAL_SUFFIX))
    if complete:
        last_good = f"{complete[-1]} is the last good checkpoint"
    else:
        last_good = "there is no checkpoint yet"
    return OSError(
        errno.ENOSPC,
        f"the disk of {run} is full; {last_good}: free some space, then the same command resumes "
        "from it",
    )
