"""Errors that may strike anywhere in a run, with what is still good and what to do added to
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from beit3.ops.collectives import rank, world_size
from beit3.training.checkpoint import explain_full_disk

LOST_PEER_MESSAGES = ("closed by peer", "reset by peer", "Broken pipe")
"""How gloo and NCCL report that another process is gone."""


@contextmanager
def explain_errors(out: Path) -> Iterator[None]:
    """Explains errors of a full disk and of a process that ended, wherever the block raises
    them."""
    try:
        yield
    except OSError as error:
        raise explain_full_disk(error, out) from error
    except RuntimeError as error:
        raise explain_lost_process(error) from error


def explain_lost_process(error: RuntimeError) -> Exception:
    """Returns a ConnectionError if a collective failed because its peer is gone, else `error`."""
    peer_is_gone = isinstance(error, dist.DistError) or any(
        message in str(error) for message in LOST_PEER_MESSAGES
    )
    if world_size() == 1 or not peer_is_gone:
        return error
    return ConnectionError(
        f"another process of this run has ended (this was {rank()} of {world_size()}): its own "
        "message tells why; start the run again, or let torchrun do it with --max-restarts; it "
        "resumes from the last checkpoint"
    )
