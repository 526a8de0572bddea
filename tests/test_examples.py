"""The notebooks of examples/ run from top to bottom, and show figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORTER = {
    "PRETRAINING_STEPS, RETRIEVAL_STEPS = 700, 100": "PRETRAINING_STEPS, RETRIEVAL_STEPS = 20, 4",
    "num_train=600": "num_train=120",
}
"""What the test cannot wait for, and what stands for it."""
NUM_FIGURES = {"use_weights": 6, "pretrain_and_search": 5}


def read_code(name: str) -> str:
    code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for text, stand_in in SHORTER.items():
        code = code.replace(text, stand_in)
    return code


def test_every_notebook_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NUM_FIGURES)
    for text in SHORTER:
        assert text in (EXAMPLES / "pretrain_and_search.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_FIGURES)
def test_a_notebook_runs_in_jupyter(name, tmp_path, monkeypatch):
    """Executed as JupyterLab would, from an empty folder."""
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = jupytext.reads(read_code(name), fmt="py:percent")
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path / "cache"))  # no released files
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == NUM_FIGURES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_FIGURES)
def test_a_notebook_runs_as_a_script(name, tmp_path):
    """Where Jupyter is not installed the text itself is a program."""
    script = tmp_path / f"{name}.py"
    script.write_text(read_code(name), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "agg", "BEIT3_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True, timeout=600)
