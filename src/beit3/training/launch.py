"""Start of a process: its device, its process group under torchrun, the seeds of its steps."""

import atexit
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from beit3.ops.collectives import rank
from beit3.recipe import RunConfig
from beit3.seeding import make_generator

EXIT_DELAY = 0.5
"""Seconds before the interpreter ends, in which gloo's thread releases the last collective's
tensors. Without them one run in ten aborted at its very end, its work done (torch 2.15: the thread
then asks for an interpreter that no longer exists)."""


def init_device(run: RunConfig, *, timeout: timedelta | None = None) -> torch.device:
    """Joins the process group if torchrun launched this process, and returns its device.

    `timeout` is how long a collective waits for other processes; None takes torch's default.
    """
    launched_by_torchrun = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched_by_torchrun and not dist.is_initialized():
        join_process_group(timeout)
    device = _select_device(run.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"run.device {run.device} needs a CUDA device and there is none: use auto or cpu"
            )
        torch.cuda.set_device(device)
    return device


def _select_device(name: str) -> torch.device:
    """Returns the device of a name; `cuda` is the one of this process's local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":
            return torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"run.device {name} is no device: use auto or cpu, or cuda where there is one"
        ) from None


def join_process_group(timeout: timedelta | None = None) -> None:
    """Initializes the process group from torchrun's environment.

    After a restart torchrun's store may still hold the addresses of the processes that died, and
    gloo would wait for them, so every attempt has keys of its own.
    """
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Counts are reduced on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    atexit.register(time.sleep, EXIT_DELAY)


def seed_step(seed: int, step: int) -> None:
    """Seeds torch's generators by (seed, step, rank).

    Together with the generators of the records this covers all randomness of a step, so that a
    checkpoint holds no random state.
    """
    torch.manual_seed(make_generator(seed, f"step {step} rank {rank()}").initial_seed())
