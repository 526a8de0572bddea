"""Helpers of the tests of the doctor: grouping findings, and files of a made-up system."""

from collections.abc import Iterable
from pathlib import Path


def group_findings(lines: Iterable[str]) -> dict[str, list[str]]:
    """Returns the texts of findings by verdict; checks that each finding is one line."""
    texts: dict[str, list[str]] = {"ok   ": [], "note ": [], "FAULT": []}
    for line in lines:
        assert "\n" not in line and line[5] == " "
        texts[line[:5]].append(line[6:])
    return texts


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Writes text files below `folder` and returns the folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
