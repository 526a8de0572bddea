"""`beit3 embed --engine ray` with a local Ray of two workers: the bytes of a plain run."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from beit3.search.embed import embed
from beit3.search.preparing import EmbedOptions
from tests.search.embed_inputs import read_files, write_images, write_weights

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

OPTIONS = EmbedOptions(precision="float32", shard_size=2, batch_size=2)
WITH_RAY = replace(OPTIONS, engine="ray", ray_workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds weights, images, and their vectors as one process embeds them."""
    folder = tmp_path_factory.mktemp("embed")
    write_weights(folder / "weights")
    write_images(folder / "images", 60)
    (folder / "images" / "copy.png").write_bytes((folder / "images/0/0000.png").read_bytes())
    embed(folder / "weights", [folder / "images"], folder / "v", options=OPTIONS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Ends the Ray that the first test starts."""
    yield
    ray.shutdown()


def test_ray_writes_the_same_bytes(folder, tmp_path):
    embed(folder / "weights", [folder / "images"], tmp_path / "v", options=WITH_RAY)
    assert read_files(tmp_path / "v") == read_files(folder / "v")


def test_a_worker_of_ray_is_killed(folder, tmp_path):
    """One of the processes that encode is killed after three shards; Ray starts another."""
    out = tmp_path / "v"
    killed: list[int] = []

    def kill_worker() -> None:
        deadline = time.monotonic() + 120
        while len(list(out.glob("unfinished/shard_*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        killed.extend(find_workers()[:1])
        for process in killed:
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    embed(folder / "weights", [folder / "images"], out, options=WITH_RAY)
    killer.join()
    assert killed, "a worker was there to be killed"
    assert read_files(out) == read_files(folder / "v")


def find_workers() -> list[int]:
    """Returns the numbers of the processes that encode, children of this test's Ray."""
    psutil = pytest.importorskip("psutil")
    own_processes = psutil.Process().children(recursive=True)
    return [
        process.pid
        for process in own_processes
        if "MapWorker" in " ".join(process.cmdline()) or "ShardEncoder" in process.name()
    ]
