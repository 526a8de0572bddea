"""Encodes the shards of a worklist with Ray Data, on machines that come and go (extra `ray`).

All machines must see the folder of vectors, the images and the weights under the same paths. A
shard is written by the worker that encodes it; when a worker dies, Ray gives its shards to another,
which writes the same bytes.
"""

import logging
import os
from typing import Any

import torch

from beit3.machine import count_cores
from beit3.search.encoding import encode_duplicates, encode_shards
from beit3.search.preparing import EmbedOptions, load_predictor
from beit3.search.worklist import Worklist

CORES_PER_WORKER = 2
"""Cores of a worker without GPU, unless the number of workers is given."""


class ShardEncoder:
    """A worker of Ray Data: loads the weights once and encodes the shards that it is sent."""

    def __init__(self, out: str, weights: str, options: EmbedOptions, threads: int) -> None:
        from pathlib import Path

        self.worklist = Worklist(Path(out))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = self.worklist.settings.precision
        self.predictor = load_predictor(weights, precision, options, device)
        self.workers, self.threads = options.workers, threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encodes the shards in `number`; returns them. Shards that are complete stay."""
        numbers = self.worklist.list_open([int(number) for number in batch["number"]])
        if batch["is_duplicate"][0]:
            encode_duplicates(self.predictor, self.worklist, numbers, threads=self.threads)
        else:
            encode_shards(
                self.predictor,
                self.worklist,
                numbers,
                workers=self.workers,
                threads=self.threads,
            )
        return {"number": batch["number"]}


def encode_with_ray(
    worklist: Worklist, weights: str, options: EmbedOptions, device: torch.device
) -> None:
    """Encodes all open shards of a worklist with Ray Data.

    Args:
        worklist: The worklist, in a folder that all machines see.
        weights: Path of the weights, the same on all machines.
        options: `ray_workers` says how many processes encode.
        device: Where this process would compute: workers have a GPU each where it is CUDA.

    Raises:
        ValueError: Ray is not installed.
    """
    ray = _start_ray()
    num_gpus = 1 if device.type == "cuda" else 0
    cluster = ray.cluster_resources()
    if num_gpus:
        num_workers = options.ray_workers or max(1, int(cluster.get("GPU", 1)))
        threads = count_cores()
    else:
        cores = max(1, int(cluster.get("CPU", count_cores())))
        num_workers = options.ray_workers or max(1, cores // CORES_PER_WORKER)
        threads = options.threads or max(1, cores // num_workers)
    for duplicates in (False, True):
        numbers = worklist.list_open(worklist.list_shards(duplicates=duplicates))
        if not numbers:
            continue
        rows = [{"number": number, "is_duplicate": duplicates} for number in numbers]
        shards = ray.data.from_items(rows, override_num_blocks=len(rows))
        encoded = shards.map_batches(
            ShardEncoder,
            fn_constructor_args=(str(worklist.out.absolute()), weights, options, threads),
            batch_size=1,
            concurrency=min(num_workers, len(rows)),
            num_cpus=None if num_gpus else threads,
            num_gpus=num_gpus or None,
        )
        encoded.materialize()


def _start_ray() -> Any:
    """Imports Ray and starts it quietly; a cluster that `RAY_ADDRESS` names is joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(
            "--engine ray needs Ray, which is not installed: pip install 'beit3[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
