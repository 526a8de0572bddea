"""Damages files of every kind that comes from outside, and counts what becomes of them.

    python -m benchmarks.fuzz --files 20000 --json benchmarks/fuzz.json
    python -m benchmarks.fuzz --kind "captions csv" --number 11 > damaged.csv

Each kind has an intact file. A worker process damages it again and again with a fixed seed and has
it read. Only two outcomes are right: it is read, or it is refused by an error of one line, which
leaves nothing behind. A process that ends, a read that takes longer than `SECONDS` or more than
`MAX_MEMORY`, another exception, an answer of the wrong form and a record that disappears without
being counted are faults.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.fuzzing.images import IMAGE_KINDS
from benchmarks.fuzzing.kinds import Kind

SECONDS = 30
"""Longest time that reading one small file may take."""
MAX_MEMORY = 2 << 30
"""Bytes that reading one small file may take."""
GROUPS = ("images", "annotations", "stores")

ROOT = Path(__file__).parents[1]


def list_kinds(groups: Sequence[str] = GROUPS) -> dict[str, Kind]:
    """Returns the kinds of some groups. Images need the least imports."""
    kinds: dict[str, Kind] = {}
    if "images" in groups:
        kinds |= IMAGE_KINDS
    if "annotations" in groups:
        from benchmarks.fuzzing.annotations import ANNOTATION_KINDS

        kinds |= ANNOTATION_KINDS
    if "stores" in groups:
        from benchmarks.fuzzing.stores import STORE_KINDS

        kinds |= STORE_KINDS
    return kinds


@dataclass
class Outcomes:
    """What became of the damaged files of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """One line for each fault, with the number that makes its file again."""

    def add(self, number: int, outcome: str) -> None:
        """Counts the outcome of one file."""
        self.counts[outcome.split()[0].rstrip(":")] += 1
        if not outcome.startswith(("read", "refused")):
            self.faults.append(f"{number}: {outcome}")


def make_damaged(kind: Kind, intact: bytes, seed: int, number: int) -> bytes:
    """Returns the damaged file of a number."""
    return kind.damage(intact, np.random.default_rng([seed, number]))


def work(names: list[str], seed: int, start: int, count: int) -> None:
    """Reads `count` damaged files of each kind, and prints the number and outcome of each.

    File number n is the (n % count)-th of kind n // count; `start` is the first number.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
    report, sys.stdout = sys.stdout, io.StringIO()
    kinds = IMAGE_KINDS if set(names) <= set(IMAGE_KINDS) else list_kinds()
    for index in range(start // count, len(names)):
        kind = kinds[names[index]]
        with tempfile.TemporaryDirectory() as folder:
            path = kind.write(Path(folder))
            intact = path.read_bytes()
            if kind.read(path) != "read":
                raise SystemExit(f"the intact file of {names[index]} is refused")
            limit_memory()
            for number in range(max(start, index * count), (index + 1) * count):
                path.write_bytes(make_damaged(kind, intact, seed, number % count))
                if hasattr(signal, "SIGALRM"):
                    signal.alarm(SECONDS)
                try:
                    outcome = kind.read(path)
                except Exception as error:
                    outcome = f"fault {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                finally:
                    if hasattr(signal, "SIGALRM"):
                        signal.alarm(0)
                print(number, outcome, file=report, flush=True)


def limit_memory() -> None:
    """Allows this process `MAX_MEMORY` more than it has now, where the system can (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    import resource

    lines = status.read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_MEMORY, hard))


def fuzz(names: list[str], count: int, seed: int = 0) -> dict[str, Outcomes]:
    """Reads `count` damaged files of each kind in worker processes, a new one after a crash."""
    outcomes = {name: Outcomes() for name in names}
    start, end = 0, count * len(names)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    while start < end:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", ";".join(names)]
        worker = subprocess.run(
            [*command, str(seed), str(start), str(count)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            errors="replace",
        )
        for line in worker.stdout.splitlines():
            number, _, outcome = line.partition(" ")
            start = int(number) + 1
            outcomes[names[int(number) // count]].add(int(number) % count, outcome)
        if start < end:
            reason = (worker.stderr.strip().splitlines() or [""])[-1]
            outcome = f"crash: exit {worker.returncode} {reason[:200]}"
            outcomes[names[start // count]].add(start % count, outcome)
            start += 1
    return outcomes


def print_damaged(name: str, seed: int, number: int) -> None:
    """Writes a damaged file to standard output."""
    kind = list_kinds()[name]
    with tempfile.TemporaryDirectory() as folder:
        intact = kind.write(Path(folder)).read_bytes()
    sys.stdout.buffer.write(make_damaged(kind, intact, seed, number))


def save_results(path: Path, outcomes: dict[str, Outcomes], seed: int, seconds: float) -> None:
    """Writes the outcomes of some kinds; those of other kinds in the file stay."""
    from benchmarks.probe import save_results as save

    figures = {"seconds": 0, "kinds": {}}
    if path.exists():
        content = json.loads(path.read_text())
        figures = content.get("figures", content)
    kinds = figures["kinds"] | {
        name: {"files": found.counts.total(), **found.counts, "faults": found.faults}
        for name, found in outcomes.items()
    }
    kinds = {name: kinds[name] for name in list_kinds() if name in kinds}
    rows = [(name, *map(kinds[name].get, ("files", "read", "refused"))) for name in kinds]
    rows.append(("all", *(sum(row[i] or 0 for row in rows) for i in (1, 2, 3))))
    lines = ["| kind | files | read | refused | faults |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {files:,} | {read or 0:,} | {refused or 0:,} | "
        f"{files - (read or 0) - (refused or 0)} |"
        for name, files, read, refused in rows
    ]
    figures = {"seed": seed, "seconds": figures["seconds"] + round(seconds), "kinds": kinds}
    save(path, "\n".join(lines), figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", help="with --number: write this damaged file and stop")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        names, *numbers = args.worker
        work(names.split(";"), *map(int, numbers))
        return
    if args.kind:
        print_damaged(args.kind, args.seed, args.number)
        return
    names = list(list_kinds(args.groups.split(",")))
    start = time.perf_counter()
    outcomes = fuzz(names, -(-args.files // len(names)), args.seed)
    seconds = time.perf_counter() - start
    for name, found in outcomes.items():
        print(f"{name:28} {dict(found.counts)}", *found.faults[:5], sep="\n  ")
    total = sum(found.counts.total() for found in outcomes.values())
    num_faults = sum(len(found.faults) for found in outcomes.values())
    print(f"{total} damaged files of {len(names)} kinds, {num_faults} faults, {seconds:.0f} s")
    if args.json:
        save_results(args.json, outcomes, args.seed, seconds)


if __name__ == "__main__":
    main()
