"""Checks of packages: missing, old, and those of extras."""

from importlib.metadata import PackageNotFoundError

import pytest

from beit3.doctor import packages


def test_missing_and_old_packages_and_incomplete_extras_are_reported(monkeypatch):
    extras = [
        'pytest>=8; extra == "dev"',
        "faiss-cpu>=1.7; extra == 'search'",
        'beit3[dev]; extra == "all"',
    ]
    requirements = ["torch>=2.11", "numpy>=1.26", "rich >= 13", *extras]
    installed = {"torch": "2.9.1+cpu", "numpy": "1.26", "pytest": "9.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(packages, "requires", lambda name: requirements)
    monkeypatch.setattr(packages, "version", version)
    assert list(packages.check_packages()) == [
        "FAULT torch 2.9.1+cpu is older than 2.11: pip install 'torch>=2.11'",
        "ok    numpy 1.26",
        "FAULT rich is missing: pip install beit3",
        "note  the extra search is not complete, faiss-cpu missing or old: "
        "pip install 'beit3[search]' if you need it",
    ]


@pytest.mark.parametrize(
    ("installed", "minimum", "expected"),
    [
        ("2.15.0", "2.11", False),
        ("2.9", "2.11", True),
        ("1.26", "1.26", False),
        ("10.0rc1", "9", False),
        ("", "1", True),
        ("3", "", False),
    ],
)
def test_versions_are_compared_by_number(installed, minimum, expected):
    assert packages.is_older(installed, minimum) is expected


def test_requirements_of_a_source_tree_come_from_its_project_file(monkeypatch):
    def fail(name: str) -> list[str]:
        raise PackageNotFoundError

    monkeypatch.setattr(packages, "requires", fail)
    requirements = [packages.parse_requirement(line) for line in packages.list_requirements()]
    names = {(name, extra) for name, _, extra in requirements}
    assert {("torch", ""), ("pytest", "dev")} <= names
