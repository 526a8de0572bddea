"""The files of launch/: they are whole, what they start is what the command line takes, and signals
lead where they should."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from beit3.cli.app import read_command
from beit3.cli.train import read_recipe, train
from beit3.task import load_task

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ("torchrun.sh", "slurm.sbatch")


def check_training(words: list[str]) -> None:
    """`words` after `beit3 train` name a task, one of its recipes, and fields that it has."""
    verb, arguments = read_command(["train", *words])
    assert verb is train
    fields = arguments.get("fields", ())
    assert arguments["recipe"] in load_task(arguments["task"]).recipes
    read_recipe(arguments["task"], [arguments["recipe"], *fields], train, init="")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_whole(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True).returncode == 0
    (example,) = re.findall(
        rf"^#     .*launch/{re.escape(name)} (.*)$", (LAUNCH / name).read_text(), re.MULTILINE
    )
    check_training(shlex.split(example))


def dry(**environment: str) -> list[str]:
    """What torchrun.sh would run."""
    command = [str(LAUNCH / "torchrun.sh"), "vqa", "base_480", "--data.root", "a b"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment | {"DRY": "1"},
    )
    return shlex.split(done.stdout)


def test_torchrun_takes_what_the_script_gives_it():
    words = dry(NODES="4", NODE_RANK="3", HEAD="node0", PORT="1234", GPUS="8", RESTARTS="5")
    assert words[0] == "torchrun"
    known = get_args_parser().parse_args(words[1:])
    assert (known.nnodes, known.node_rank, known.nproc_per_node, known.max_restarts) == (
        "4",
        3,
        "8",
        5,
    )
    assert (known.rdzv_backend, known.rdzv_endpoint, known.rdzv_conf) == (
        "c10d",
        "node0:1234",
        "join_timeout=3600",
    )
    assert known.module and known.training_script == "beit3"
    assert known.training_script_args == ["train", "vqa", "base_480", "--data.root", "a b"]
    check_training(known.training_script_args[1:])


def test_one_machine_needs_no_settings():
    known = get_args_parser().parse_args(dry()[1:])
    assert (known.nnodes, known.node_rank, known.rdzv_endpoint) == (
        "1",
        0,
        "localhost:29500",
    ) and int(known.nproc_per_node) >= 1


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" > "$PLACE/requeued"; fi',
    "srun": 'shift; for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" || status=$?; done; exit "${status:-0}"',
    "beit3": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT|$*" >> "$PLACE/started"; exit "$STATUS"',
}
"""SLURM's commands and ours, as far as the script sees them."""


def submitted(place: Path, status: int, restarts: int) -> int:
    """The batch script among the stubs; its status."""
    for name, body in STUBS.items():
        (place / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (place / name).chmod(0o755)
    environment = {
        "PATH": f"{place}:{os.environ['PATH']}",
        "PLACE": str(place),
        "STATUS": str(status),
        "SLURM_JOB_ID": "20042",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    words = ["pretrain", "giant_224", "--data.root", "a b"]
    return subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *words], env=os.environ | environment, timeout=60
    ).returncode


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (138, 0, True), (138, 9, True), (2, 0, False), (1, 0, True), (1, 3, False)],
)
def test_slurm_requeues_what_may_go_on(tmp_path, status, restarts, again):
    """After USR1 always; after a crash a few times; never at the end, or for a mistake in the
    command."""
    assert submitted(tmp_path, status, restarts) == status
    assert (tmp_path / "requeued").exists() == again
    assert (tmp_path / "started").read_text().splitlines() == [
        f"{rank} {rank} 2 node7 20042|train pretrain giant_224 --data.root a b" for rank in (0, 1)
    ]


def test_slurm_asks_for_the_signal_that_is_answered():
    from beit3.training.stop import StopRequest

    (name,) = re.findall(
        r"^#SBATCH --signal=(\w+)@\d+$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE
    )
    assert f"SIG{name}" in {number.name for number in StopRequest.SIGNALS}, (
        "and not to the batch script alone, as B: would be"
    )


def test_kubernetes_pods_meet():
    yaml = pytest.importorskip(
        "yaml", reason="PyYAML reads launch/kubernetes.yaml: pip install pyyaml"
    )
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert (
        spec["completionMode"] == "Indexed"
        and str(spec["completions"]) == str(spec["parallelism"]) == given["NODES"]
    )
    assert given["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (
        pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    )
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert given["GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    (patience,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "torchrun.sh").read_text())
    assert pod["terminationGracePeriodSeconds"] > int(patience), (
        "torchrun's own patience ends first"
    )
    assert container["command"][0] == "launch/torchrun.sh" and pod["restartPolicy"] == "Never"
    check_training(container["command"][1:])
