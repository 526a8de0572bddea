"""The launch files: they are well formed, their commands are the command line's, and what they tell each process arrives."""

import os
import subprocess
from pathlib import Path

import pytest

from beit3.cli import make_parser
from beit3.config import override
from beit3.task import load

LAUNCH = Path(__file__).parents[1] / "launch"


def accepted(words: list[str]) -> None:
    """`train TASK RECIPE --field value ...` is a command of ours."""
    pytest.importorskip("tyro")
    known, rest = make_parser().parse_known_args(words)
    assert known.name == "train" and override(load(known.task).recipes[rest[0]], rest[1:])


def program(folder: Path, name: str, lines: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("status", "queued"), [(0, False), (138, True), (2, False)])
def test_slurm_starts_a_process_a_gpu_and_queues_again_after_its_signal(tmp_path, status, queued):
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" > "$NOTES/queued"; fi')
    program(tmp_path, "python", f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" > "$NOTES/task$RANK"; exit {status}')
    start = 'for i in 0 1 2; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@"; status=$?; done; exit $status'
    program(tmp_path, "srun", f"shift; {start}")
    surroundings = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path), "DATA": "data", "OUT": "runs/x", "SLURM_NTASKS": "3",
        "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=surroundings, capture_output=True, text=True)
    assert done.returncode == status and not done.stderr
    assert (tmp_path / "queued").exists() == queued
    for task in range(3):
        rank, local, world, host, *words = (tmp_path / f"task{task}").read_text().split()
        assert (rank, local, world, host) == (str(task), str(task % 2), "3", "first") and words[:2] == ["-m", "beit3"]
        accepted(words[2:])


def test_slurm_wants_to_know_where_records_are():
    surroundings = {name: value for name, value in os.environ.items() if name not in ("DATA", "OUT")}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=surroundings, capture_output=True, text=True)
    assert done.returncode != 0 and "folder of records" in done.stderr


def test_kubernetes_knows_every_field():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job") and service["spec"]["clusterIP"] == "None"
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    words = container["args"]
    options = dict(word.lstrip("-").split("=") for word in words[: words.index("-m")])
    assert int(options["nnodes"]) == spec["completions"] and options["rdzv-endpoint"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert words[words.index("-m") + 1] == "beit3"
    accepted(words[words.index("-m") + 2 :])
