"""Checks that the required packages are installed and new enough."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from beit3.doctor.findings import fault, note, ok, read_system_file

PROJECT_FILE = Path(__file__).parents[3] / "pyproject.toml"
"""Requirements of a source tree that is not installed."""


def check_packages() -> Iterator[str]:
    """Yields a finding per required package, and one per extra that is not complete."""
    incomplete: dict[str, list[str]] = {}
    for name, minimum, extra in map(parse_requirement, list_requirements()):
        installed = get_version(name)
        if not extra:
            yield check_package(name, installed, minimum)
        elif is_older(installed, minimum) and name != "beit3":  # an extra may consist of extras
            incomplete.setdefault(extra, []).append(name)
    for extra, names in incomplete.items():
        yield note(
            f"the extra {extra} is not complete, {', '.join(names)} missing or old: "
            f"pip install 'beit3[{extra}]' if you need it"
        )


def check_package(name: str, installed: str, minimum: str) -> str:
    """Returns the finding for a required package; `installed` is empty where it is missing."""
    if not installed:
        return fault(f"{name} is missing: pip install beit3")
    if is_older(installed, minimum):
        return fault(f"{name} {installed} is older than {minimum}: pip install '{name}>={minimum}'")
    return ok(f"{name} {installed}")


def list_requirements() -> list[str]:
    """Returns the requirements in the package's metadata, else in its pyproject.toml."""
    try:
        return requires("beit3") or []
    except PackageNotFoundError:
        project = tomllib.loads(read_system_file(PROJECT_FILE)).get("project", {})
    requirements = list(project.get("dependencies", []))
    for extra, lines in project.get("optional-dependencies", {}).items():
        requirements += [f"{line}; extra == '{extra}'" for line in lines]
    return requirements


def parse_requirement(line: str) -> tuple[str, str, str]:
    """Returns (name, minimum version or "", extra or "") of a requirement in package metadata."""
    name = re.match(r"[\w.-]+", line)
    minimum = re.search(r">=\s*([\w.]+)", line)
    extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)", line)
    assert name
    return name[0], minimum[1] if minimum else "", extra[1] if extra else ""


def get_version(name: str) -> str:
    """Returns the version of a package, or an empty string where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def is_older(installed: str, minimum: str) -> bool:
    """Returns whether a version is missing or below `minimum`, compared number by number."""
    return not installed or _parse_version(installed) < _parse_version(minimum)


def _parse_version(text: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version without its local part (`+cpu`)."""
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))
