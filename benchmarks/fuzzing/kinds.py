"""What a kind of file is, and which outcomes of reading a damaged one are right."""

import contextlib
import inspect
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.cli.app import main
from beit3.task import load_task
from benchmarks.fuzzing.damage import Damage, damage_bytes

FAULTY = ("are unusable", "check --raw", "its annotations file does not answer")
"""Words of errors about records, which name these and not their file."""

Counts = range | None
"""How many records a file holds; None where it cannot be told without the reader under test."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: how an intact one is written, what reads it, and how it is damaged."""

    write: Callable[[Path], Path]
    """Writes what the reader needs into an empty folder; returns the file to damage."""
    read: Callable[[Path], str]
    """Reads the damaged file; returns "read" or "refused", or raises."""
    damage: Damage = damage_bytes


class WrongOutcome(Exception):
    """Reading ended in a way in which it must not end."""


def make_loader_kind(
    write: Callable[[Path], Path],
    load: Callable[[Path], Any],
    damage: Damage = damage_bytes,
    *,
    names: Sequence[str] = (),
) -> Kind:
    """Returns a kind that a function reads, which may refuse it by a ValueError of one line.

    `names` are further words by which an error may name the damaged file.
    """

    def read(path: Path) -> str:
        try:
            load(path)
        except ValueError as error:
            message = str(error)
            if "\n" in message or not any(name in message for name in (path.name, *names)):
                raise WrongOutcome(f"the message does not name {path.name}: {message}") from error
            return "refused"
        return "read"

    return Kind(write, read, damage)


def make_verb_kind(
    write: Callable[[Path], Path],
    make_words: Callable[[Path], Sequence[object]],
    damage: Damage = damage_bytes,
    *,
    names: Sequence[str] = (),
) -> Kind:
    """Returns a kind that a verb of the command line reads.

    `names` are further words by which an error may name the damaged file.
    """

    def read(path: Path) -> str:
        status, _, err = run_verb(make_words(path))
        if status == 0:
            return "read"
        check_refusal(status, err, (path.name, *names))
        return "refused"

    return Kind(write, read, damage)


def make_prepare_kind(
    task: str,
    files: Mapping[str, bytes],
    name: str,
    damage: Damage = damage_bytes,
    *,
    source: str = "",
    options: Sequence[str] = (),
    count: Callable[[bytes], Counts] = lambda data: None,
    text_model: bytes = b"",
) -> Kind:
    """Returns a kind that `beit3 prepare` reads.

    Right outcomes: records and what was passed over are all that the file holds; or one line names
    the file, and nothing is written.

    Args:
        task: The task to prepare for.
        files: Path below the raw folder -> content.
        name: The one of `files` to damage.
        damage: How it is damaged.
        source: The source of the task.
        options: More words of the command.
        count: Counts the records of the damaged file without the reader under test.
        text_model: The text tokenizer of the root.
    """

    def write(folder: Path) -> Path:
        for path, content in files.items():
            (folder / "raw" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "raw" / path).write_bytes(content)
        (folder / "root").mkdir()
        if text_model:
            (folder / "root" / "text.model").write_bytes(text_model)
        return folder / "raw" / name

    def read(path: Path) -> str:
        raw = next(parent for parent in path.parents if parent.name == "raw")
        root = raw.parent / "root"
        words = ["prepare", task, "--raw", raw, "--root", root, *options]
        if source:
            words += ["--source", source]
        if "bad_share" in inspect.signature(load_task(task).prepare).parameters:
            words += ["--bad_share", "1"]
        try:
            status, out, err = run_verb(words)
            if status != 0:
                check_refusal(status, err, (path.name, path.stem, f"{raw}:", f"{raw} ", *FAULTY))
                check_written(root, {})
                return "refused"
            report = json.loads(out)
            check_written(root / task / (source or load_task(task).sources[0]), report["records"])
            num_dropped = report.get("train_dropped", 0)
            # A text document may become several records.
            num_records = report.get("documents", sum(report["records"].values()))
            total = num_records + len(report["passed_over"]) + num_dropped
            expected = count(path.read_bytes())
            if expected is not None and total not in expected:
                raise WrongOutcome(f"{total} records and passed over, the file holds {expected}")
            return "read"
        finally:
            for entry in root.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)

    return Kind(write, read, damage)


def run_verb(words: Sequence[object]) -> tuple[int, str, str]:
    """Runs a verb of the command line; returns its status and what it printed and complained."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def check_refusal(status: int, err: str, names: Sequence[str]) -> None:
    """Raises WrongOutcome unless a verb ended with one line that names one of `names`."""
    lines = err.splitlines()
    if status != 2 or len(lines) != 1 or not lines[0].startswith("beit3: "):
        raise WrongOutcome(f"status {status} and {len(lines)} lines: {' | '.join(lines)}")
    if not any(name in lines[0] for name in names):
        raise WrongOutcome(f"the message does not name {names[0]}: {lines[0]}")


def check_written(folder: Path, num_records: Mapping[str, int]) -> None:
    """Raises WrongOutcome unless the splits below a folder hold this many records and no more."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "text.model"]
    if not num_records and paths:
        raise WrongOutcome(f"it was refused, but {paths[0]} was left behind")
    for path in paths:
        if "partial" in path.name:
            raise WrongOutcome(f"{path} was left behind")
    for split, number in num_records.items():
        path = folder / f"{split}.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines()
            if len(lines) != number or not all(
                isinstance(json.loads(line), dict) for line in lines
            ):
                raise WrongOutcome(f"{path} holds {len(lines)} lines, {number} were reported")
        elif not any(folder.glob(f"{split}.*")):
            raise WrongOutcome(f"{path} was not written, {number} were reported")
