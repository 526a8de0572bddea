"""Script of each process under torchrun: `beit3 embed`, killed once some shards are complete.

Usage: embed_process.py RANK NUM_SHARDS WORDS...; process RANK kills itself when NUM_SHARDS shards
are complete, none does for a RANK of -1.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from beit3.cli import main


def kill_after(out: Path, num_shards: int) -> None:
    """Kills this process when that many shards of a folder are complete."""
    while len(list(out.glob("unfinished/shard_*.json"))) < num_shards:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    victim, num_shards, *words = sys.argv[1:]
    if os.environ["RANK"] == victim:
        out = Path(words[words.index("--out") + 1])
        arguments = (out, int(num_shards))
        threading.Thread(target=kill_after, args=arguments, daemon=True).start()
    sys.exit(main(words))
