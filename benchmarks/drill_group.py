"""Kills one of several processes of a pretraining at random moments; torchrun starts all again, and
nothing is lost.

    python benchmarks/drill_group.py --kills 6 --processes 2 --out DIR

A trial starts `beit3 train pretrain demo` under `torchrun --max-restarts`, waits for a moment of an
activity, kills one
process (SIGKILL), sometimes another one after the restart, and lets torchrun bring the run to its
end. With `--signals` it
tells torchrun to stop instead (SIGTERM, as a scheduler does), and starts the same command again.
Then weights, checkpoint
with optimizer, metrics without timings and scores are compared, bit for bit, with a run of as many
processes that was left
alone. Moments and comparison are those of drill.py.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call by path

from beit3.files import write_text
from benchmarks.drill import (
    Job,
    Trial,
    Usual,
    await_moment,
    demo_job,
    differences,
    drill,
    files,
    going_on,
    reached,
    told,
)

AIMS = ("step", "file", "checkpoint", "evaluation", "start-up", "twice", "last", "best")
"""What kills aim at, by turns; `twice` kills in a step, and again in the first steps after the
restart."""


@dataclass(frozen=True)
class Group(Job):
    """A job of several processes with one thread each."""

    processes: int = 2
    restarts: int = 3

    def command(self) -> list[str]:
        group = [
            "--standalone",
            "--nproc-per-node",
            str(self.processes),
            "--max-restarts",
            str(self.restarts),
        ]
        return [sys.executable, "-m", "torch.distributed.run", *group, "-m", "beit3"]


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started and that live."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--ppid", str(launcher)], capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def kill_one(job: Job, whole: Path, usual: Usual, place: Path, aim: str, seed: str) -> Trial:
    """One trial in the new folder `place`, which stays where something was wrong."""
    rng, out, said = random.Random(seed), place / "run", place / "said.txt"
    while True:  # a moment that did not come, because this run took another course, is drawn again
        shutil.rmtree(place, ignore_errors=True)
        began, process = time.monotonic(), job.start(out, said)
        try:
            if found := killed(job, process, out, said, aim, usual, rng, began):
                break
        finally:
            process.wait(timeout=900)
    trial, length = found
    shown = re.search(
        r"step (\d+)/", said.read_text()[length:]
    )  # a process shows the first step it takes
    trial.resumed_from = int(shown[1]) - 1 if shown else job.steps
    deaths = said.with_suffix(".err").read_text().count("exitcode: -9")
    if deaths != 1 + (aim == "twice"):
        trial.wrong = f"{deaths} processes were killed"
    return compared(trial, process.returncode, whole, out, said)


def killed(
    job: Job,
    process: subprocess.Popen,
    out: Path,
    said: Path,
    aim: str,
    usual: Usual,
    rng: random.Random,
    began: float,
) -> tuple[Trial, int] | None:
    """Kill a process of the group at a random point of `aim`; what it was doing, and how much had
    been printed by then.

    None where the moment did not come.
    """
    if not await_moment(job, process, out, said, "step" if aim == "twice" else aim, usual, rng):
        return None
    alive = workers(process.pid)
    if len(alive) < 2:  # not started yet, or at their end
        return None
    found = going_on(job, out, said)
    trial = Trial(
        aim,
        time.monotonic() - began,
        told(found, out),
        found in ("checkpoint", "file"),
        int(reached(out)["step"]),
    )
    length = len(said.read_text())
    os.kill(rng.choice(alive), signal.SIGKILL)
    if aim == "twice":
        again = wait_for_step(process, said, length)
        if again:
            os.kill(rng.choice(again), signal.SIGKILL)
            trial.doing += ", and again"
    return trial, length


def wait_for_step(process: subprocess.Popen, said: Path, length: int) -> list[int]:
    """The processes once a step has been shown behind the first `length` letters; none where the
    run ends before."""
    while process.poll() is None:
        if re.search(r"step \d+/", said.read_text()[length:]):
            return workers(process.pid)
        time.sleep(0.01)
    return []


def stop_all(job: Job, whole: Path, usual: Usual, place: Path, aim: str, seed: str) -> Trial:
    """Tell torchrun to stop at a random point, as a scheduler does, and start the same command
    again."""
    rng, out, said = random.Random(seed), place / "run", place / "said.txt"
    shutil.rmtree(place, ignore_errors=True)
    began, process = time.monotonic(), job.start(out, said)
    await_moment(job, process, out, said, aim, usual, rng)
    found = going_on(job, out, said)
    trial = Trial(
        aim,
        time.monotonic() - began,
        told(found, out),
        found in ("checkpoint", "file"),
        int(reached(out)["step"]),
    )
    process.terminate()
    process.wait(timeout=900)
    saved = max(
        (int(path.name[5:]) for path in out.glob("checkpoints/step_*") if path.suffix != ".part"),
        default=0,
    )
    status = job.finish(out, place / "again.txt")
    shown = re.search(r"step (\d+)/", (place / "again.txt").read_text())
    trial.resumed_from = int(shown[1]) - 1 if shown else saved
    if trial.doing.startswith("after") and trial.resumed_from < trial.step:
        trial.wrong = f"stopped after step {trial.step} and saved {saved}"
        return trial
    return compared(trial, status, whole, out, said)


def compared(trial: Trial, status: int, whole: Path, out: Path, said: Path) -> Trial:
    """What differs from the run left alone, and what was left behind; the folder goes where nothing
    is wrong."""
    if status:
        trial.wrong += f" status {status}: {said.with_suffix('.err').read_text()[-300:]}"
        return trial
    trial.wrong += ", ".join(differences(whole, out)[:5])
    trial.left = tuple(sorted(files(out) - files(whole)))
    if not trial.wrong:
        shutil.rmtree(out.parent)
    return trial


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=len(AIMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder for the world, the runs and the table as JSON",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument(
        "--signals", action="store_true", help="tell torchrun to stop instead of killing"
    )
    known = parser.parse_args()
    out, name = known.out.resolve(), "signals" if known.signals else "kills"
    aims: Sequence[str] = ("step", "checkpoint", "evaluation") if known.signals else AIMS
    job = Group(demo_job(out).given, steps=12, eval_every=6, processes=known.processes)
    chosen = [aims[number % len(aims)] for number in range(known.kills)]
    usual, trials = drill(
        job,
        out / name,
        stop_all if known.signals else kill_one,
        chosen,
        seed=known.seed,
        jobs=known.jobs,
    )
    wrong = sum(bool(trial.wrong) for trial in trials)
    print(f"{len(trials) - wrong} of {len(trials)} equal")
    table = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "processes": known.processes,
    }
    found = table | {
        "seed": known.seed,
        "usual": usual,
        "trials": [asdict(trial) for trial in trials],
    }
    write_text(out / f"group-{name}.json", json.dumps(found, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
