"""Kills one of several processes of a pretraining at random moments; torchrun restarts them all.

    python benchmarks/drill_group.py --kills 6 --processes 2 --out DIR

A trial starts `beit3 train pretrain demo` under `torchrun --max-restarts`, waits for a moment of an
activity, kills one process (SIGKILL), sometimes another one after the restart, and lets torchrun
bring the run to its end. With `--signals` it tells torchrun to stop instead (SIGTERM, as a
scheduler does) and runs the same command again. Then weights, checkpoint with optimizer, metrics
without timings and scores are compared, bit for bit, with an undisturbed run of the same number of
processes. Moments and comparison are those of drill.py.
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
    Durations,
    Job,
    Trial,
    await_moment,
    describe_activity,
    drill,
    find_differences,
    list_files,
    make_demo_job,
    read_activity,
    read_progress,
)

AIMS = ("step", "file", "checkpoint", "evaluation", "start-up", "twice", "last", "best")
"""Activities at which kills aim; `twice` kills in a step and soon after the restart."""


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


def list_workers(launcher: int) -> list[int]:
    """Returns the ids of the running processes that torchrun has started."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--ppid", str(launcher)], capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def kill_one(
    job: Job, reference: Path, durations: Durations, folder: Path, aim: str, seed: str
) -> Trial:
    """Runs one trial in a new folder, which is kept if something was wrong."""
    rng, out, log = random.Random(seed), folder / "run", folder / "output.txt"
    while True:  # a moment that did not come in this run is drawn again
        shutil.rmtree(folder, ignore_errors=True)
        began, process = time.monotonic(), job.start(out, log)
        try:
            if kill := kill_job(job, process, out, log, aim, durations, rng, began):
                break
        finally:
            process.wait(timeout=900)
    trial, length = kill
    first_step = re.search(
        r"step (\d+)/", log.read_text()[length:]
    )  # a process prints its first step
    trial.resumed_from = int(first_step[1]) - 1 if first_step else job.steps
    deaths = log.with_suffix(".err").read_text().count("exitcode: -9")
    if deaths != 1 + (aim == "twice"):
        trial.wrong = f"{deaths} processes were killed"
    return compare(trial, process.returncode, reference, out, log)


def kill_job(
    job: Job,
    process: subprocess.Popen,
    out: Path,
    log: Path,
    aim: str,
    durations: Durations,
    rng: random.Random,
    began: float,
) -> tuple[Trial, int] | None:
    """Kill a process of the group at a random point of `aim`; what it was doing, and how much had
    been printed by then.

    None where the moment did not come.
    """
    if not await_moment(job, process, out, log, "step" if aim == "twice" else aim, durations, rng):
        return None
    alive = list_workers(process.pid)
    if len(alive) < 2:  # not started yet, or at their end
        return None
    activity = read_activity(job, out, log)
    trial = Trial(
        aim,
        time.monotonic() - began,
        describe_activity(activity, out),
        activity in ("checkpoint", "file"),
        int(read_progress(out)["step"]),
    )
    length = len(log.read_text())
    os.kill(rng.choice(alive), signal.SIGKILL)
    if aim == "twice":
        again = wait_for_step(process, log, length)
        if again:
            os.kill(rng.choice(again), signal.SIGKILL)
            trial.doing += ", and again"
    return trial, length


def wait_for_step(process: subprocess.Popen, log: Path, length: int) -> list[int]:
    """The processes once a step has been shown behind the first `length` letters; none where the
    run ends before."""
    while process.poll() is None:
        if re.search(r"step \d+/", log.read_text()[length:]):
            return list_workers(process.pid)
        time.sleep(0.01)
    return []


def stop_all(
    job: Job, reference: Path, durations: Durations, folder: Path, aim: str, seed: str
) -> Trial:
    """Tell torchrun to stop at a random point, as a scheduler does, and start the same command
    again."""
    rng, out, log = random.Random(seed), folder / "run", folder / "output.txt"
    shutil.rmtree(folder, ignore_errors=True)
    began, process = time.monotonic(), job.start(out, log)
    await_moment(job, process, out, log, aim, durations, rng)
    activity = read_activity(job, out, log)
    trial = Trial(
        aim,
        time.monotonic() - began,
        describe_activity(activity, out),
        activity in ("checkpoint", "file"),
        int(read_progress(out)["step"]),
    )
    process.terminate()
    process.wait(timeout=900)
    saved = max(
        (int(path.name[5:]) for path in out.glob("checkpoints/step_*") if path.suffix != ".part"),
        default=0,
    )
    status = job.finish(out, folder / "again.txt")
    shown = re.search(r"step (\d+)/", (folder / "again.txt").read_text())
    trial.resumed_from = int(shown[1]) - 1 if shown else saved
    if trial.doing.startswith("after") and trial.resumed_from < trial.step:
        trial.wrong = f"stopped after step {trial.step} and saved {saved}"
        return trial
    return compare(trial, status, reference, out, log)


def compare(trial: Trial, status: int, reference: Path, out: Path, log: Path) -> Trial:
    """Notes differences from the undisturbed run and extra files; removes an equal run."""
    if status:
        trial.wrong += f" status {status}: {log.with_suffix('.err').read_text()[-300:]}"
        return trial
    trial.wrong += ", ".join(find_differences(reference, out)[:5])
    trial.left = tuple(sorted(list_files(out) - list_files(reference)))
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
    args = parser.parse_args()
    out, name = args.out.resolve(), "signals" if args.signals else "kills"
    aims: Sequence[str] = ("step", "checkpoint", "evaluation") if args.signals else AIMS
    job = Group(make_demo_job(out).options, steps=12, eval_every=6, processes=args.processes)
    chosen_aims = [aims[number % len(aims)] for number in range(args.kills)]
    durations, trials = drill(
        job,
        out / name,
        stop_all if args.signals else kill_one,
        chosen_aims,
        seed=args.seed,
        jobs=args.jobs,
    )
    num_unequal = sum(bool(trial.wrong) for trial in trials)
    print(f"{len(trials) - num_unequal} of {len(trials)} equal")
    table = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "processes": args.processes,
    }
    results = table | {
        "seed": args.seed,
        "usual": durations,
        "trials": [asdict(trial) for trial in trials],
    }
    write_text(out / f"group-{name}.json", json.dumps(results, indent=1) + "\n")
    return int(num_unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
