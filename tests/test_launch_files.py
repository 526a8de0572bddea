"""The scripts of launch/ start valid commands and handle signals and exit statuses."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
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


# The server ---------------------------------------------------------------------------------------


def read_serve_options(arguments: list[str]) -> dict:
    """Parses the arguments of `beit3 serve` as the command line does."""
    from beit3.cli.serve import serve

    verb, options = read_command(["serve", *arguments])
    assert verb is serve
    return options


def read_serve_resources() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads launch/serve.yaml: pip install pyyaml")
    documents = list(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_kubernetes_serves_with_valid_options_and_time_to_end():
    resources = read_serve_resources()
    assert set(resources) == {"Deployment", "Service", "HorizontalPodAutoscaler"}
    deployment = resources["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["beit3", "serve"]
    options = read_serve_options(container["args"])
    (port,) = container["ports"]
    assert options["port"] == port["containerPort"] and options["host"] == "0.0.0.0"
    assert pod["terminationGracePeriodSeconds"] > options["drain"] + options["timeout"]
    period = container["readinessProbe"]["periodSeconds"]
    assert options["drain"] > 2 * period, "probes see that a pod drains before it stops accepting"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert options["token_file"].startswith(mounts["token"])
    assert all(word.partition("=")[2].startswith("/weights/") for word in options["weights"])
    (threads,) = [variable["value"] for variable in container["env"]]
    assert threads == container["resources"]["limits"]["cpu"]


def test_kubernetes_names_and_ports_agree():
    resources = read_serve_resources()
    deployment = resources["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    service = resources["Service"]["spec"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"]
    scaler = resources["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["scaleTargetRef"]["kind"] == "Deployment"
    assert scaler["minReplicas"] == deployment["spec"]["replicas"] < scaler["maxReplicas"]


def test_kubernetes_probes_ask_paths_that_the_server_answers():
    pytest.importorskip("fastapi", reason="pip install 'beit3[serve]'")
    from beit3.serve.app import Endpoints
    from beit3.serve.service import Service

    service = Service()
    paths = {
        path for path, method, _ in Endpoints(service, object).list_routes() if method == "GET"
    }
    service.stop()
    deployment = read_serve_resources()["Deployment"]["spec"]["template"]
    (container,) = deployment["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
        assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]
    assert deployment["metadata"]["annotations"]["prometheus.io/path"] in paths


def read_dockerfile() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile with their arguments."""
    text = (LAUNCH.parent / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def read_dockerignore() -> set[str]:
    return set((LAUNCH.parent / ".dockerignore").read_text().splitlines())


def test_the_image_copies_what_is_there_and_starts_a_valid_command():
    instructions = read_dockerfile()
    assert instructions[0][0] == "FROM"
    for name, argument in instructions:
        if name == "COPY":
            *sources, _ = argument.split()
            assert all((LAUNCH.parent / source).exists() for source in sources)
            assert {f"!{source.removeprefix('./')}" for source in sources} <= read_dockerignore()
    by_name = dict(instructions)
    program, verb, *words = json.loads(by_name["ENTRYPOINT"]) + json.loads(by_name["CMD"])
    assert (program, verb) == ("beit3", "serve")
    options = read_serve_options(words)
    assert str(options["port"]) == by_name["EXPOSE"] and options["host"] == "0.0.0.0"
    assert by_name["USER"] != "root" and by_name["STOPSIGNAL"] == "SIGTERM"
    assert '".[serve]"' in by_name["RUN"]
    assert subprocess.run(["bash", "-n", "-c", by_name["RUN"]]).returncode == 0


def test_the_package_is_built_from_what_the_image_copies(tmp_path):
    """As pip does in the image; the extra that it asks for exists, and its Python suffices."""
    project = tmp_path / "project"
    project.mkdir()
    instructions = read_dockerfile()
    for words in (argument.split() for name, argument in instructions if name == "COPY"):
        for source in map(LAUNCH.parent.joinpath, words[:-1]):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(source, project / words[-1], ignore=ignored)
            else:
                shutil.copy(source, project / words[-1])
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode("utf-8").splitlines()
    assert "beit3/shipped/world/vqa/model.safetensors" in names
    assert "beit3/serve/page/index.html" in names
    by_name = dict(instructions)
    (extra,) = re.findall(r'"\.\[(\w+)\]"', by_name["RUN"])
    assert f"Provides-Extra: {extra}" in lines
    (version,) = re.findall(r"^python:3\.(\d+)-slim$", by_name["FROM"])
    (needed,) = [line.rpartition(".")[2] for line in lines if line.startswith("Requires-Python: ")]
    assert int(version) >= int(needed)
    assert by_name["ENV"].startswith("BEIT3_CACHE=/tmp/"), "the user may write there"


def test_the_commands_of_the_image_run(root, tmp_path):
    """The entry point serves weights, and the health check tells whether it does."""
    pytest.importorskip("uvicorn", reason="pip install 'beit3[serve]'")
    from beit3.serve.server import open_socket
    from beit3.weights.store import save_weights
    from tests.predict.networks import make_task

    save_weights(make_task("captioning", root), tmp_path / "captions")
    with open_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    by_name = dict(read_dockerfile())
    entry = json.loads(by_name["ENTRYPOINT"])
    words = [word.replace("8000", str(port)) for word in json.loads(by_name["CMD"])]
    program = [sys.executable, "-m", entry[0], *entry[1:], str(tmp_path / "captions"), *words]
    check = json.loads(by_name["HEALTHCHECK"].partition("CMD ")[2])
    check = [sys.executable, check[1], check[2].replace("8000", str(port))]
    environment = os.environ | {"PYTHONPATH": str(LAUNCH.parent / "src")}
    assert subprocess.run(check, capture_output=True, timeout=60).returncode != 0
    server = subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "ready at" in line:
                break
        assert any("--token-file" in line for line in lines), "it is open to others"
        assert subprocess.run(check, capture_output=True, timeout=60).returncode == 0
        server.terminate()
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
