"""Script: runs `beit3 embed` in forked processes and kills them at random moments.

Usage: killed_runs.py OUT NUM_KILLS WORDS...; it prints the number of runs that were killed. Each
round goes on with the same folder. After all kills the command runs to its end.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import beit3.search.embed
import beit3.tasks.retrieval  # imported once, and not in every round
from beit3.cli import main


def fork(words: list[str]) -> int:
    """Starts the command in a forked process group; returns its number."""
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os._exit(main(words))
    return process


def kill_at_random(out: Path, num_kills: int, words: list[str]) -> int:
    """Kills a run that many times; returns how many runs were killed before their end."""
    start = time.monotonic()
    os.waitpid(fork([*words, "--out", str(out)]), 0)
    duration = time.monotonic() - start
    shutil.rmtree(out)
    rng = random.Random(0)
    killed = 0
    for _ in range(num_kills):
        process = fork([*words, "--out", str(out)])
        time.sleep(rng.uniform(0.1, 0.9) * duration)
        os.killpg(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        if (out / "manifest.json").exists():
            shutil.rmtree(out)  # begin again, so that later kills hit something
    process = fork([*words, "--out", str(out)])
    assert os.waitpid(process, 0)[1] == 0
    return killed


if __name__ == "__main__":
    beit3.search.embed.POLL_INTERVAL = 0.01
    print(kill_at_random(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
