"""Damages files of every kind that is read, and counts what becomes of them.

    python benchmarks/fuzz.py --files 24000 --json benchmarks/fuzz.json

Each kind has an intact file. A worker process damages it again and again with a fixed seed (bits,
bytes, slices, lengths) and has it read. Only two outcomes are right: it is read, or it is refused
by a ValueError of one line. A process that ends, a read that takes longer than `SECONDS`, another
exception and an answer of the wrong form are faults; so is a record that disappears without being
counted.
"""

import argparse
import io
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit3.images import find_header_fault, open_image

SECONDS = 30
"""Longest time that reading one small file may take."""

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kind:
    """A kind of file: how an intact one is written, and what reads it."""

    write: Callable[[Path], Path]
    """Writes what the reader needs into an empty folder; returns the file to damage."""
    read: Callable[[Path], str]
    """Reads the damaged file; returns "read" or "refused", or raises."""


# Damage ---------------------------------------------------------------------------------------


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes 1 to 4 places of a file; a quarter of the changes fall into its first 64 bytes."""
    for _ in range(rng.integers(1, 5)):
        size = max(1, len(data) if rng.random() < 0.75 else min(64, len(data)))
        start = int(rng.integers(size))
        length = int(rng.integers(1, 1 + min(64, size)))
        replacement = [
            lambda old: bytes([old[0] ^ (1 << int(rng.integers(8)))]) + old[1:] if old else b"\0",
            lambda old: rng.bytes(len(old)),
            lambda old: b"",
            lambda old: old + old,
            lambda old: rng.choice([b"\0", b"\xff", b"\x7f"]) * len(old),
            lambda old: int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big") + old[4:],
            lambda old: (
                int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little") + old[4:]
            ),
        ][int(rng.integers(7))]
        if rng.random() < 0.05:
            data = data[:start]
        else:
            data = data[:start] + replacement(data[start : start + length]) + data[start + length :]
    return data


# Images ---------------------------------------------------------------------------------------


def write_image(format: str, mode: str, **options: object) -> Callable[[Path], Path]:
    """Returns a writer of a small image, smooth with some noise."""

    def write(folder: Path) -> Path:
        y, x = np.mgrid[0:40, 0:56]
        noise = np.random.default_rng(0).integers(0, 20, (40, 56, 3))
        pixels = np.stack([x * 4, y * 5, (x + y) * 2], axis=-1) + noise
        image = Image.fromarray(pixels.astype(np.uint8))
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256)
        elif mode != "RGB":
            image = image.convert(mode)
        path = folder / "intact"
        exif = Image.Exif()
        exif[0x0112] = 6
        settings = dict(options) if format in ("GIF", "BMP", "PPM") else {"exif": exif, **options}
        image.save(path, format, **settings)
        return path

    return write


def read_image(path: Path) -> str:
    """Opens an image by its header and whole."""
    fault = find_header_fault(str(path))
    assert "\n" not in fault, fault
    try:
        pixels = open_image(path)
    except ValueError as error:
        assert "\n" not in str(error) and path.name in str(error), error
        return "refused"
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3, pixels.shape
    assert not fault, f"open_image reads what prepare refuses: {fault}"
    return "read"


IMAGE_KINDS: dict[str, Kind] = {
    name: Kind(write, read_image)
    for name, write in {
        "jpeg": write_image("JPEG", "RGB"),
        "jpeg progressive": write_image("JPEG", "RGB", progressive=True),
        "jpeg gray": write_image("JPEG", "L"),
        "jpeg cmyk": write_image("JPEG", "CMYK"),
        "png": write_image("PNG", "RGB"),
        "png palette": write_image("PNG", "P"),
        "png 16 bits": write_image("PNG", "I;16"),
        "png alpha": write_image("PNG", "RGBA"),
        "webp": write_image("WEBP", "RGB"),
        "webp lossless": write_image("WEBP", "RGBA", lossless=True),
        "gif": write_image("GIF", "P"),
        "bmp": write_image("BMP", "RGB"),
        "tiff": write_image("TIFF", "RGB"),
        "tiff lzw": write_image("TIFF", "RGB", compression="tiff_lzw"),
        "tiff jpeg": write_image("TIFF", "RGB", compression="jpeg"),
        "ppm": write_image("PPM", "RGB"),
        "jpeg 2000": write_image("JPEG2000", "RGB"),
        "avif": write_image("AVIF", "RGB"),
    }.items()
}


KINDS = IMAGE_KINDS


# Running --------------------------------------------------------------------------------------


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


def work(names: list[str], seed: int, start: int, count: int) -> None:
    """Reads `count` damaged files of each kind, and prints the number and outcome of each.

    File number n is the (n % count)-th of kind n // count; `start` is the first number.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
    report, sys.stdout = sys.stdout, io.StringIO()
    for index in range(start // count, len(names)):
        kind = KINDS[names[index]]
        with tempfile.TemporaryDirectory() as folder:
            path = kind.write(Path(folder))
            intact = path.read_bytes()
            for number in range(max(start, index * count), (index + 1) * count):
                path.write_bytes(damage(intact, np.random.default_rng([seed, number % count])))
                if hasattr(signal, "SIGALRM"):
                    signal.alarm(SECONDS)
                try:
                    outcome = kind.read(path)
                except Exception as error:
                    outcome = f"fault {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(number, outcome, file=report, flush=True)


def fuzz(names: list[str], count: int, seed: int = 0) -> dict[str, Outcomes]:
    """Reads `count` damaged files of each kind in worker processes, a new one after a crash."""
    outcomes = {name: Outcomes() for name in names}
    start, end = 0, count * len(names)
    while start < end:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", ",".join(names)]
        worker = subprocess.run(
            [*command, str(seed), str(start), str(count)],
            cwd=ROOT,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=4, metavar=("KINDS", "SEED", "START", "COUNT"))
    args = parser.parse_args()
    if args.worker:
        names, *numbers = args.worker
        work(names.split(","), *map(int, numbers))
        return
    outcomes = fuzz(list(KINDS), -(-args.files // len(KINDS)), args.seed)
    for name, found in outcomes.items():
        print(f"{name:18} {dict(found.counts)}", *found.faults[:5], sep="\n  ")


if __name__ == "__main__":
    main()
