"""Collectives: the identity when alone, sums and copies between two processes."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from beit3.ops import collectives


def test_alone_each_is_a_copy():
    values = torch.arange(6.0).view(2, 3)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    for collective in (collectives.all_reduce, collectives.broadcast, collectives.all_gather):
        result = collective(values)
        assert torch.equal(result, values)
        result.add_(1)
        assert values[0, 0] == 0  # the argument is left alone


def test_two_processes(tmp_path: Path):
    mp.spawn(_process, (tmp_path,), nprocs=2)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["place"] == (rank, 2)
        assert torch.equal(seen["sum"], torch.full((2, 2), 3.0))
        assert torch.equal(seen["copy"], torch.ones(2, 2))
        assert torch.equal(seen["all"], torch.tensor([[1.0, 1], [1, 1], [2, 2], [2, 2]]))
        assert torch.equal(seen["own"], torch.full((2, 2), rank + 1.0))


def _process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = torch.full((2, 2), rank + 1.0).T  # not contiguous
    seen = {
        "place": (collectives.rank(), collectives.world_size()),
        "sum": collectives.all_reduce(own),
        "copy": collectives.broadcast(own),
        "all": collectives.all_gather(own),
        "own": own,
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()
