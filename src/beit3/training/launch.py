"""The process and its place: device, process group under torchrun, seeds."""

import atexit
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from beit3.ops.collectives import rank
from beit3.recipe import RunConfig
from beit3.seeding import make_generator

LEAVE = 0.5
"""Seconds before the interpreter ends, in which gloo's thread lets go of the last collective's tensors. Without them one run
in ten aborted at its very end, its work done (torch 2.15: the thread then asks for an interpreter that is no more)."""


def start(run: RunConfig) -> torch.device:
    """Join the process group when launched by torchrun; the device of this process."""
    if (
        "RANK" in os.environ
        and not dist.is_initialized()
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ):
        join()
    name = run.device if run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = (
            torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
            if name == "cuda"
            else torch.device(name)
        )
    except RuntimeError:
        raise ValueError(
            f"run.device {name} is no device: use auto or cpu, or cuda where there is one"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"run.device {name} needs a CUDA device and there is none: use auto or cpu"
            )
        torch.cuda.set_device(device)
    return device


def join() -> None:
    """The process group of torchrun's environment.

    After a restart torchrun's store may still hold the addresses of the processes that died, and gloo would wait for
    them, so every attempt has keys of its own.
    """
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = (
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )  # counts are reduced on the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    atexit.register(time.sleep, LEAVE)


def seed_step(seed: int, step: int) -> None:
    """Everything random in a step that is not seeded by record: a function of (seed, step, rank), so nothing is saved."""
    torch.manual_seed(make_generator(seed, f"step {step} rank {rank()}").initial_seed())
