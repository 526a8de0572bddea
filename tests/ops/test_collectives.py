"""Collectives are the identity without a process group, and communicate between two
processes."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from beit3.ops import collectives


def test_without_a_process_group_each_collective_copies():
    values = torch.arange(6.0).view(2, 3)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    for collective in (collectives.all_reduce, collectives.broadcast, collectives.all_gather):
        result = collective(values)
        assert torch.equal(result, values)
        result.add_(1)
        assert values[0, 0] == 0  # the argument does not change


def test_a_tensor_without_shards_is_returned_as_it_is():
    values = torch.nn.Parameter(torch.arange(3.0))
    assert collectives.gather_full(values) is values


def test_a_parameter_without_shards_gets_all_values():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    values = torch.arange(6.0).view(2, 3)
    storage = parameter.data_ptr()
    collectives.copy_to_shard(parameter, values)
    assert torch.equal(parameter, values.double())
    assert parameter.dtype == torch.float64, "the parameter keeps its type"
    assert parameter.data_ptr() == storage and parameter.requires_grad and parameter.grad_fn is None
    values.add_(1)
    assert float(parameter[0, 0]) == 0, "the values are copied"
    with pytest.raises(RuntimeError, match="size"):
        collectives.copy_to_shard(parameter, torch.zeros(2, 4))


def test_two_processes_sum_and_copy(tmp_path: Path):
    mp.spawn(_run_collectives, (tmp_path,), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results["rank"] == (rank, 2)
        assert torch.equal(results["sum"], torch.full((2, 2), 3.0))
        assert torch.equal(results["broadcast"], torch.ones(2, 2))
        assert torch.equal(results["gathered"], torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]]))
        assert torch.equal(results["own"], torch.full((2, 2), rank + 1.0))
        assert results["objects"] == ["0", "1"]
        shard = torch.tensor(([[0.0, 1], [2, 3]], [[4.0, 5]])[rank])
        assert torch.equal(results["shard"], shard), "rank 0 holds two rows, rank 1 one"
        assert torch.equal(results["full"], torch.arange(6.0).view(3, 2))
    assert (tmp_path / "order").read_text() == "01", "rank 0 goes first"


def _run_collectives(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = torch.full((2, 2), rank + 1.0).T  # not contiguous
    results = {
        "rank": (collectives.rank(), collectives.world_size()),
        "sum": collectives.all_reduce(own),
        "broadcast": collectives.broadcast(own),
        "gathered": collectives.all_gather(own),
        "own": own,
        "objects": collectives.all_gather_objects(str(rank)),
    }
    sharded = distribute_tensor(torch.zeros(3, 2), DeviceMesh("cpu", torch.arange(2)), [Shard(0)])
    collectives.copy_to_shard(sharded, torch.arange(6).view(3, 2))
    results |= {"shard": sharded.to_local(), "full": collectives.gather_full(sharded)}
    with collectives.rank_zero_first(), (folder / "order").open("a") as order:
        time.sleep(0.2 * (1 - rank))
        order.write(str(rank))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
