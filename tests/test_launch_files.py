"""The scripts of launch/ start valid commands and handle signals and exit statuses."""

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


def check_training(arguments: list[str]) -> None:
    """`arguments` of `beit3 train` name a task, one of its recipes, and fields that it has."""
    verb, options = read_command(["train", *arguments])
    assert verb is train
    fields = options.get("fields", ())
    assert options["recipe"] in load_task(options["task"]).recipes
    read_recipe(options["task"], [options["recipe"], *fields], train, init="")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_their_examples_are_valid_commands(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True).returncode == 0
    (example,) = re.findall(
        rf"^#     .*launch/{re.escape(name)} (.*)$", (LAUNCH / name).read_text(), re.MULTILINE
    )
    check_training(shlex.split(example))


def run_dry(**environment: str) -> list[str]:
    """Returns the command that torchrun.sh would run."""
    command = [str(LAUNCH / "torchrun.sh"), "vqa", "base_480", "--data.root", "a b"]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment | {"DRY": "1"},
    )
    return shlex.split(process.stdout)


def test_torchrun_accepts_the_options_of_the_script():
    command = run_dry(NODES="4", NODE_RANK="3", HEAD="node0", PORT="1234", GPUS="8", RESTARTS="5")
    assert command[0] == "torchrun"
    options = get_args_parser().parse_args(command[1:])
    assert (options.nnodes, options.node_rank, options.nproc_per_node, options.max_restarts) == (
        "4",
        3,
        "8",
        5,
    )
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_conf) == (
        "c10d",
        "node0:1234",
        "join_timeout=3600",
    )
    assert options.module and options.training_script == "beit3"
    assert options.training_script_args == ["train", "vqa", "base_480", "--data.root", "a b"]
    check_training(options.training_script_args[1:])


def test_one_machine_needs_no_settings():
    options = get_args_parser().parse_args(run_dry()[1:])
    assert (options.nnodes, options.node_rank, options.rdzv_endpoint) == (
        "1",
        0,
        "localhost:29500",
    ) and int(options.nproc_per_node) >= 1


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; '
    'else echo "$@" > "$FOLDER/requeued"; fi',
    "srun": "shift; for rank in 0 1; do "
    'SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" || status=$?; done; exit "${status:-0}"',
    "beit3": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT|$*" '
    '>> "$FOLDER/started"; exit "$STATUS"',
}
"""Stubs of the commands that the batch script calls."""


def run_batch_script(folder: Path, status: int, restarts: int) -> int:
    """Runs the batch script with the stubs; returns its status."""
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FOLDER": str(folder),
        "STATUS": str(status),
        "SLURM_JOB_ID": "20042",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    arguments = ["pretrain", "giant_224", "--data.root", "a b"]
    return subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *arguments], env=os.environ | environment, timeout=60
    ).returncode


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (138, 0, True), (138, 9, True), (2, 0, False), (1, 0, True), (1, 3, False)],
)
def test_slurm_requeues_runs_that_can_be_resumed(tmp_path, status, restarts, requeued):
    """It requeues after USR1 and a few times after a crash, not after success or a usage error."""
    assert run_batch_script(tmp_path, status, restarts) == status
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "started").read_text().splitlines() == [
        f"{rank} {rank} 2 node7 20042|train pretrain giant_224 --data.root a b" for rank in (0, 1)
    ]


def test_slurm_sends_a_signal_that_training_handles():
    from beit3.training.stop import StopRequest

    (name,) = re.findall(
        r"^#SBATCH --signal=(\w+)@\d+$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE
    )
    assert f"SIG{name}" in {number.name for number in StopRequest.SIGNALS}, (
        "the signal goes to the processes, not to the batch script alone (B:)"
    )


def test_kubernetes_pods_connect_to_the_first():
    yaml = pytest.importorskip(
        "yaml", reason="PyYAML reads launch/kubernetes.yaml: pip install pyyaml"
    )
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (
        spec["completionMode"] == "Indexed"
        and str(spec["completions"]) == str(spec["parallelism"]) == environment["NODES"]
    )
    assert environment["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (
        pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    )
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert environment["GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    (shutdown_timeout,) = re.findall(
        r"SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "torchrun.sh").read_text()
    )
    assert pod["terminationGracePeriodSeconds"] > int(shutdown_timeout), (
        "torchrun ends before the pod is killed"
    )
    assert container["command"][0] == "launch/torchrun.sh" and pod["restartPolicy"] == "Never"
    check_training(container["command"][1:])
