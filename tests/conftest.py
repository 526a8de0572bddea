"""Fixtures of many tests: a tiny world, its records, and a visual tokenizer trained on them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Keeps tests away from the user's cache."""
    old_cache = os.environ.get("BEIT3_CACHE")
    cache_dir = tmp_path_factory.mktemp("cache")
    os.environ["BEIT3_CACHE"] = str(cache_dir)
    yield cache_dir
    os.environ.pop("BEIT3_CACHE")
    if old_cache is not None:
        os.environ["BEIT3_CACHE"] = old_cache


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the world in public formats; read only."""
    from tests.world_root import write_raw

    return write_raw(tmp_path_factory.mktemp("raw") / "world")


@pytest.fixture(scope="session")
def root(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a root with records of every task and `text.model`; read only."""
    from tests.world_root import write_root

    return write_root(raw, tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def vqkd_weights(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns weights of a visual tokenizer after ten steps."""
    from beit3.tasks.vqkd import VQKD
    from beit3.training.loop import train
    from tests.world_root import make_vqkd_recipe

    out = tmp_path_factory.mktemp("visual") / "run"
    train(make_vqkd_recipe(root, steps=10), VQKD, out=out)
    return out / "last"


@pytest.fixture
def run_cli(capsys):
    """Returns a function that runs a command that must succeed and returns its output."""

    from beit3.cli import main

    def run(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def run_failing_cli(capsys):
    """Returns a function that runs a command that must fail and returns its one line of error."""

    from beit3.cli import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("beit3: ") and len(lines[0]) < 2000, (
            captured.err
        )
        assert "Traceback" not in captured.out
        return lines[0]

    return run
