"""Collectives: the identity when alone, sums and copies between two processes."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from beit3.ops import collectives


def test_alone_each_is_a_copy():
    values = torch.arange(6.0).view(2, 3)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    for collective in (collectives.all_reduce, collectives.broadcast, collectives.all_gather):
        result = collective(values)
        assert torch.equal(result, values)
        result.add_(1)
        assert values[0, 0] == 0  # the argument is left alone


def test_a_plain_tensor_is_whole():
    values = torch.nn.Parameter(torch.arange(3.0))
    assert collectives.gather_full(values) is values


def test_a_plain_parameter_keeps_all_of_the_values():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    values = torch.arange(6.0).view(2, 3)
    storage = parameter.data_ptr()
    collectives.keep_shard(parameter, values)
    assert torch.equal(parameter, values.double()) and parameter.dtype == torch.float64, (
        "its own type"
    )
    assert parameter.data_ptr() == storage and parameter.requires_grad and parameter.grad_fn is None
    values.add_(1)
    assert float(parameter[0, 0]) == 0, "a copy"
    with pytest.raises(RuntimeError, match="size"):
        collectives.keep_shard(parameter, torch.zeros(2, 4))


def test_two_processes(tmp_path: Path):
    mp.spawn(_process, (tmp_path,), nprocs=2)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["place"] == (rank, 2)
        assert torch.equal(seen["sum"], torch.full((2, 2), 3.0))
        assert torch.equal(seen["copy"], torch.ones(2, 2))
        assert torch.equal(seen["all"], torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]]))
        assert torch.equal(seen["own"], torch.full((2, 2), rank + 1.0))
        assert seen["objects"] == ["0", "1"]
        assert torch.equal(
            seen["shard"], torch.tensor([[0.0, 1], [2, 3]] if rank == 0 else [[4.0, 5]])
        ), "rows 0 and 1, row 2"
        assert torch.equal(seen["whole"], torch.arange(6.0).view(3, 2))
    assert (tmp_path / "order").read_text() == "01", "rank 0 goes first"


def _process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = torch.full((2, 2), rank + 1.0).T  # not contiguous
    seen = {
        "place": (collectives.rank(), collectives.world_size()),
        "sum": collectives.all_reduce(own),
        "copy": collectives.broadcast(own),
        "all": collectives.all_gather(own),
        "own": own,
        "objects": collectives.all_gather_objects(str(rank)),
    }
    sharded = distribute_tensor(torch.zeros(3, 2), DeviceMesh("cpu", torch.arange(2)), [Shard(0)])
    collectives.keep_shard(sharded, torch.arange(6).view(3, 2))
    seen |= {"shard": sharded.to_local(), "whole": collectives.gather_full(sharded)}
    with collectives.rank_zero_first(), (folder / "order").open("a") as order:
        time.sleep(0.2 * (1 - rank))
        order.write(str(rank))
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()
