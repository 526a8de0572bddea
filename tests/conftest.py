"""What many tests share: one tiny world a session, its records, and a visual tokenizer trained on
it."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """No test touches the user's own cache."""
    before = os.environ.get("BEIT3_CACHE")
    place = tmp_path_factory.mktemp("cache")
    os.environ["BEIT3_CACHE"] = str(place)
    yield place
    os.environ.pop("BEIT3_CACHE")
    if before is not None:
        os.environ["BEIT3_CACHE"] = before


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world in public formats; read only."""
    from tests.world_root import write_raw

    return write_raw(tmp_path_factory.mktemp("raw") / "world")


@pytest.fixture(scope="session")
def root(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every task and `text.model`; read only."""
    from tests.world_root import write_root

    return write_root(raw, tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def vqkd_weights(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a visual tokenizer after ten steps."""
    from beit3.tasks.vqkd import VQKD
    from beit3.training.loop import train
    from tests.world_root import make_vqkd_recipe

    out = tmp_path_factory.mktemp("visual") / "run"
    train(make_vqkd_recipe(root, steps=10), VQKD, out=out)
    return out / "last"


@pytest.fixture
def run_cli(capsys):
    """Run a verb that must succeed; what it printed."""

    from beit3.cli import main

    def run(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out

    return run


@pytest.fixture
def run_failing_cli(capsys):
    """Run a verb that must fail; its one line."""

    from beit3.cli import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("beit3: ") and len(lines[0]) < 2000, said.err
        assert "Traceback" not in said.out
        return lines[0]

    return run
