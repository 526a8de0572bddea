"""Kills a pretraining, or fills its disk, and checks that the same command ends as if undisturbed.

    python benchmarks/drill.py --kills 20 --out DIR
    python benchmarks/drill.py --full-disk --out DIR        as root: it mounts a small tmpfs

A trial starts `beit3 train pretrain demo` on the small embedded world, waits for a moment, kills
the process (SIGKILL) and runs the same command again to its end. Then weights, checkpoint with
optimizer, metrics without timings and scores are compared, bit for bit, with an undisturbed run.
What the process was doing is read from the files it left.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a call by path

from tests.training.runs import find_newest_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[1]
AIMS = (
    "file",
    "step",
    "file",
    "evaluation",
    "checkpoint",
    "start-up",
    "file",
    "best",
    "checkpoint",
    "last",
    "file",
    "resume",
)
"""Activities at which kills aim, by turns.

`checkpoint`: one has begun without bytes on disk; `file`: its bytes are written, digested or
flushed; `resume` kills in a step, and again while the second process starts.
"""
FILL_MOMENTS = ("small", "start-up", "step", "checkpoint", "file", "evaluation", "best", "last")
"""Moments at which a disk becomes full; `small`: the disk is too small from the start."""


@dataclass(frozen=True)
class Job:
    """A pretraining that can be started repeatedly.

    `options` are command-line options besides those of the fields below.
    """

    options: tuple[str, ...]
    steps: int = 24
    save_every: int = 2
    eval_every: int = 8
    eval_records: int = 20
    asynchronous: bool = False

    def start(self, out: Path, log: Path) -> subprocess.Popen:
        """Starts the run on one thread; writes its output to `log`, its errors to `log`.err."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.command(), "train", "pretrain", "demo", "--out", str(out), *self.options]
        for name in ("steps", "save_every", "eval_every", "eval_records"):
            command += [f"--run.{name}", str(getattr(self, name))]
        command += ["--run.log_every", "1", "--run.async_save", str(self.asynchronous)]
        with log.open("w") as output, log.with_suffix(".err").open("w") as errors:
            return subprocess.Popen(command, stdout=output, stderr=errors, env=make_environment())

    def command(self) -> list[str]:
        """Returns the command that starts `beit3`."""
        return [sys.executable, "-m", "beit3"]

    def finish(self, out: Path, log: Path) -> int:
        """Runs the job to its end and returns the exit status."""
        return self.start(out, log).wait()


@dataclass
class Trial:
    """One row of the table.

    `doing` describes the activity at the kill, `writing` whether a checkpoint was being written.
    """

    aim: str
    seconds: float = 0.0
    doing: str = ""
    writing: bool = False
    step: int = 0
    resumed_from: int = 0
    wrong: str = ""
    left: tuple[str, ...] = ()


def make_environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


# What a run is doing ------------------------------------------------------------------------------


def read_activity(job: Job, out: Path, log: Path) -> str:
    """Returns the activity of the process that writes to `log`, or its last one, from its files.

    Every process prints its first step, so one that has printed none is starting.
    """
    if not re.search(r"step \d+/", log.read_text()):
        return "start-up"
    if parts := list(out.glob("checkpoints/*.part")):
        return "file" if count_bytes(parts[0]) else "checkpoint"
    for name in ("best", "last"):
        if (out / f".{name}.new").exists():
            return name
    metrics = read_progress(out)
    is_due = metrics["step"] % job.eval_every == 0 or metrics["step"] == job.steps
    if is_due and "loss" in metrics:
        return "evaluation"
    return "end" if (out / "last").exists() else "step"


def read_progress(out: Path) -> dict[str, float]:
    """Returns the last complete line of the metrics."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else {"step": 0}


def count_bytes(part: Path) -> int:
    """Returns the bytes of a checkpoint so far; its files may vanish at any time."""
    with suppress(OSError):
        return sum(path.stat().st_size for path in part.iterdir())
    return 0


def iterate_episodes(
    job: Job, process: subprocess.Popen, out: Path, log: Path
) -> Iterator[tuple[str, int, float]]:
    """Yields (activity, how often it has begun, seconds in it) about every millisecond."""
    counts: Counter[str] = Counter()
    activity, since = "", 0.0
    while process.poll() is None:
        new_activity = read_activity(job, out, log)
        if new_activity != activity:
            counts[new_activity] += 1
            activity, since = new_activity, time.monotonic()
        yield new_activity, counts[new_activity], time.monotonic() - since
        time.sleep(0.001)


Durations = dict[str, list[float]]
"""Activity -> seconds of each of its episodes."""


def rehearse(job: Job, out: Path) -> Durations:
    """Makes the undisturbed run and returns the durations of its activities."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_name(f"{out.name}.txt")
    process = job.start(out, log)
    episode_seconds = {
        (activity, index): seconds
        for activity, index, seconds in iterate_episodes(job, process, out, log)
    }
    if process.returncode:
        raise RuntimeError(
            f"the run to compare with ended with {process.returncode}: "
            f"{log.with_suffix('.err').read_text()[-2000:]}"
        )
    durations: Durations = {}
    for (activity, _), seconds in sorted(episode_seconds.items()):
        durations.setdefault(activity, []).append(seconds)
    return durations


def await_moment(
    job: Job,
    process: subprocess.Popen,
    out: Path,
    log: Path,
    aim: str,
    durations: Durations,
    rng: random.Random,
) -> bool:
    """Waits until `process` is at a random point of an activity; returns whether it came."""
    index = rng.randrange(len(durations[aim]))
    delay = rng.uniform(0, durations[aim][index])
    for activity, begun, _ in iterate_episodes(job, process, out, log):
        if (activity, begun) == (aim, index + 1):
            time.sleep(delay)
            return process.poll() is None
    return False


# Comparing ----------------------------------------------------------------------------------------


def read_contents(out: Path) -> dict[str, Any]:
    """Returns the contents of a run that are equal in equal runs, by name; tensors as bytes."""
    groups = {folder: load_file(out / folder / "model.safetensors") for folder in ("last", "best")}
    shards = sorted(find_newest_checkpoint(out).glob("*.safetensors"))  # one of each process
    groups |= {
        find_newest_checkpoint(out).name + (f"/{index}" if index else ""): load_file(shard)
        for index, shard in enumerate(shards)
    }
    contents: dict[str, Any] = {
        f"{group}/{name}": (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        for group, state in groups.items()
        for name, tensor in state.items()
    }
    contents |= {
        f"metrics.jsonl line {number}": row for number, row in enumerate(read_metrics(out), start=1)
    }
    return contents | {"scores.json": (out / "scores.json").read_text()}


def find_differences(run: Path, expected_run: Path) -> list[str]:
    """Returns the names of contents that differ between two finished runs."""
    contents, expected = read_contents(run), read_contents(expected_run)
    assert any(name.endswith(".exp_avg") for name in contents), (
        "a checkpoint without an optimizer proves nothing"
    )
    return sorted(
        name
        for name in contents.keys() | expected.keys()
        if contents.get(name) != expected.get(name)
    )


def list_files(out: Path) -> set[str]:
    """Returns the relative paths of a run's files but for TensorBoard's, which hold the time."""
    return {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != "tensorboard"
    }


def resume(job: Job, reference: Path, out: Path, log: Path, trial: Trial) -> Trial:
    """Runs the same command to its end; notes where it resumed, differences and extra files."""
    saved_steps = [
        int(path.name[5:]) for path in out.glob("checkpoints/step_*") if path.suffix != ".part"
    ]
    status = job.finish(out, log)
    first_step = re.search(r"step (\d+)/", log.read_text())  # the first step, if there was one left
    trial.resumed_from = int(first_step[1]) - 1 if first_step else job.steps
    if status:
        trial.wrong = f"status {status}: {log.with_suffix('.err').read_text()[-300:]}"
    elif trial.resumed_from != max(saved_steps, default=0):
        trial.wrong = f"the newest checkpoint was {max(saved_steps, default=0)}"
    else:
        trial.wrong = ", ".join(find_differences(reference, out)[:5])
        trial.left = tuple(sorted(list_files(out) - list_files(reference)))
    return trial


# Killing ------------------------------------------------------------------------------------------


def kill_and_resume(
    job: Job, reference: Path, durations: Durations, folder: Path, aim: str, seed: str
) -> Trial:
    """Runs one trial in a new folder, which is kept if something was wrong."""
    rng, out = random.Random(seed), folder / "run"
    while True:  # a moment that did not come in this run is drawn again
        shutil.rmtree(folder, ignore_errors=True)
        trial = kill_job(
            job, out, folder / "1.txt", "step" if aim == "resume" else aim, durations, rng
        )
        if trial and aim == "resume":
            trial = kill_job(job, out, folder / "2.txt", "start-up", durations, rng)
        if trial:
            break
    trial.aim = aim
    resume(job, reference, out, folder / "3.txt", trial)
    if not trial.wrong:
        shutil.rmtree(folder)
    return trial


def kill_job(
    job: Job, out: Path, log: Path, aim: str, durations: Durations, rng: random.Random
) -> Trial | None:
    """Starts the job and kills it at a random point of `aim`; returns None if it ended before."""
    began, process = time.monotonic(), job.start(out, log)
    try:
        await_moment(job, process, out, log, aim, durations, rng)
    finally:
        process.kill()
    if process.wait() >= 0:
        return None
    activity = read_activity(job, out, log)
    return Trial(
        aim,
        time.monotonic() - began,
        describe_activity(activity, out),
        activity in ("checkpoint", "file"),
        int(read_progress(out)["step"]),
    )


def describe_activity(activity: str, out: Path) -> str:
    """Describes an activity and its progress."""
    step = int(read_progress(out)["step"])
    if activity not in ("checkpoint", "file"):
        plain = {
            "step": f"after step {step}",
            "evaluation": f"evaluation after step {step}",
            "start-up": "start-up",
        }
        return plain.get(activity, f"writing {activity}/")
    (part,) = out.glob("checkpoints/*.part")
    state = (
        "described, not renamed"
        if (part / "checkpoint.json").exists()
        else f"{count_bytes(part) / 2**20:.1f} MB written"
    )
    return f"checkpoint {int(part.stem[5:])}: {state}"


# A full disk --------------------------------------------------------------------------------------


@contextmanager
def mount_small_disk(folder: Path, size: int) -> Iterator[Callable[[int], bool]]:
    """Mounts a tmpfs of `size` bytes at `folder`.

    Yields a function that resizes it (0: to its contents) and returns whether that worked.
    """

    def resize(new_size: int) -> bool:
        status = os.statvfs(folder)
        used = max(4096, (status.f_blocks - status.f_bfree) * status.f_frsize)
        return mount("-o", f"remount,size={new_size or used}", str(folder))

    folder.mkdir(parents=True, exist_ok=True)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        raise OSError(f"no tmpfs could be mounted at {folder}")
    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(out: Path) -> bool:
    """Returns whether a tmpfs can be mounted below `out`."""
    try:
        with mount_small_disk(out / "disk", 4096):
            return True
    except OSError:
        return False


def mount(*arguments: str) -> bool:
    """Runs mount(8); returns whether it exists and succeeded."""
    return (
        shutil.which("mount") is not None
        and subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    )


def fill_and_resume(
    job: Job, reference: Path, durations: Durations, folder: Path, aim: str, seed: str
) -> Trial:
    """Runs one trial on a disk that becomes full during `aim` and is enlarged afterwards."""
    rng, out, large = random.Random(seed), folder / "disk" / "run", 2**30
    size = sum(path.stat().st_size for path in find_newest_checkpoint(reference).iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    with mount_small_disk(folder / "disk", size * 5 // 2 if aim == "small" else large) as resize:
        began, process = time.monotonic(), job.start(out, folder / "1.txt")
        try:
            if aim != "small" and await_moment(
                job, process, out, folder / "1.txt", aim, durations, rng
            ):
                while not resize(0):  # it has grown meanwhile
                    pass
            status = process.wait(timeout=900)
        finally:
            process.kill()
        last_good, fault = check_end(
            status, out, (folder / "1.txt").read_text(), (folder / "1.err").read_text()
        )
        trial = Trial(
            aim, time.monotonic() - began, last_good, step=int(read_progress(out)["step"])
        )
        resize(large)
        resume(job, reference, out, folder / "2.txt", trial)
        trial.wrong = "; ".join(text for text in (fault, trial.wrong) if text)
    if not trial.wrong:
        shutil.rmtree(folder)
    return trial


def check_end(status: int, out: Path, output: str, errors: str) -> tuple[str, str]:
    """Returns the last good checkpoint that the error names, and faults of the error or ''."""
    from beit3.training.checkpoint import find_damage

    last_line = errors.splitlines()[-1] if errors else ""
    match = re.fullmatch(
        r"beit3: .*disk of .* is full; "
        r"((step_\d+) is the last good checkpoint|there is no checkpoint yet): .*",
        last_line,
    )
    newest = max(
        (path.name for path in out.glob("checkpoints/step_*") if path.suffix != ".part"),
        default=None,
    )
    faults = {
        f"status {status}": status != 2,
        "a traceback": "Traceback" in output + errors,
        f"last line: {last_line}": match is None,
        f"{newest} is the newest": match is not None and match[2] != newest,
        f"{newest} is damaged": newest is not None
        and find_damage(out / "checkpoints" / newest) != "",
    }
    return match[1] if match else "", "; ".join(
        text for text, is_fault in faults.items() if is_fault
    )


# The command --------------------------------------------------------------------------------------


def make_demo_job(out: Path) -> Job:
    """Returns a small demo pretraining; writes its world and a visual tokenizer of ten steps."""
    from beit3.task import load_task
    from beit3.training.embedded_world import prepare_embedded_world

    os.environ["BEIT3_CACHE"] = str(out / "cache")
    root = [prepare_embedded_world(load_task(name), "small") for name in ("vqkd", "pretrain")][0]
    command = [
        sys.executable,
        "-m",
        "beit3",
        "train",
        "vqkd",
        "--out",
        str(out / "vqkd"),
        "--data.root",
        str(root),
    ]
    subprocess.run(
        [*command, "--run.steps", "10", "--run.eval_records", "20"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=make_environment(),
    )
    batch = ("--data.batch.images", "4", "--data.batch.texts", "4", "--data.batch.pairs", "8")
    tokens = ("--task.visual_tokenizer", str(out / "vqkd" / "last"))
    return Job(("--data.root", str(root), *tokens, *batch))


def drill(
    job: Job,
    folder: Path,
    run_trial: Callable[..., Trial],
    aims: Sequence[str],
    *,
    seed: int,
    jobs: int,
) -> tuple[Durations, list[Trial]]:
    """Makes the undisturbed run, then a trial per aim, `jobs` at a time; prints the table."""
    reference, line = folder / "whole", "{:>5}  {:10}  {:>7}  {:40}  {:>4}  {:>12}  {}"
    durations = rehearse(job, reference)
    print(
        line.format("trial", "aim", "after", "activity", "step", "resumed from", "equal"),
        flush=True,
    )

    def run(number: int) -> Trial:
        return run_trial(
            job,
            reference,
            durations,
            folder / f"{number + 1:03d}",
            aims[number],
            f"{seed} {number}",
        )

    trials = []
    with ThreadPoolExecutor(jobs) as pool:
        for trial in pool.map(run, range(len(aims))):
            trials.append(trial)
            equal = f"no: {trial.wrong}" if trial.wrong else "yes"
            after = f"{trial.seconds:.1f} s"
            print(
                line.format(
                    len(trials),
                    trial.aim,
                    after,
                    trial.doing,
                    trial.step,
                    trial.resumed_from,
                    equal,
                ),
                flush=True,
            )
    return durations, trials


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder for the world, the runs and the table as JSON",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument(
        "--asynchronous", action="store_true", help="write checkpoints while training goes on"
    )
    parser.add_argument("--full-disk", action="store_true", help="fill the disk instead of killing")
    args = parser.parse_args()
    out, name = (
        args.out.resolve(),
        ("full-disk" if args.full_disk else "kills")
        + ("-asynchronous" if args.asynchronous else ""),
    )
    run_trial = fill_and_resume if args.full_disk else kill_and_resume
    aims = (
        FILL_MOMENTS
        if args.full_disk
        else [AIMS[number % len(AIMS)] for number in range(args.kills)]
    )
    if args.full_disk and not can_mount(out):
        print("skipped: a disk that fills needs mount, which only root may use")
        return 0
    job = replace(make_demo_job(out), asynchronous=args.asynchronous)
    durations, trials = drill(job, out / name, run_trial, aims, seed=args.seed, jobs=args.jobs)
    num_unequal, num_writing = (
        sum(bool(trial.wrong) for trial in trials),
        sum(trial.writing for trial in trials),
    )
    writing_note = (
        "" if args.full_disk else f"; {num_writing} kills fell into the writing of a checkpoint"
    )
    print(f"{len(trials) - num_unequal} of {len(trials)} equal{writing_note}")
    table = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "seed": args.seed,
        "usual": durations,
    }
    (out / f"{name}.json").write_text(
        json.dumps(table | {"trials": [asdict(trial) for trial in trials]}, indent=1) + "\n"
    )
    return int(num_unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
