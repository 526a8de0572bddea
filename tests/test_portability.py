"""Other systems and consoles: Windows' rules for files, and output that is not UTF-8.

Windows itself is not tried. The calls that behave differently there are replaced by such ones.
"""

import ast
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.cli import main
from beit3.data.process_pool import run_jobs
from beit3.data.stores.records import Records, write_records
from beit3.files import atomic_write, make_relative, write_text
from beit3.training.log import METRICS_FILE, truncate_metrics
from beit3.weights.store import replace_directory

SOURCE = Path(__file__).resolve().parents[1] / "src" / "beit3"
FILES = sorted(SOURCE.rglob("*.py"))

NETWORK = [
    "--task.model.dim",
    "32",
    "--task.model.depth",
    "1",
    "--task.model.num_heads",
    "2",
    "--task.model.ffn_dim",
    "32",
]


# Windows ------------------------------------------------------------------------------------------


def find_implicit_encoding(call: ast.Call) -> bool:
    """Returns whether a call reads or writes text in the system's own encoding."""
    function, keywords = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if "encoding" in keywords:
        return False
    if isinstance(function, ast.Attribute) and name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name != "open":
        return False
    modes = call.args[:1] if isinstance(function, ast.Attribute) else call.args[1:2]
    owner = getattr(getattr(function, "value", None), "id", "")
    mode = ast.unparse(modes[0]) if modes else "r"
    return owner not in ("Image", "os", "tarfile", "gzip", "Corpus", "opener") and "b" not in mode


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_text_files_name_their_encoding(path):
    """Windows would take cp1252."""
    calls = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    lines = [n.lineno for n in calls if isinstance(n, ast.Call) and find_implicit_encoding(n)]
    assert not lines


@pytest.fixture
def windows(monkeypatch):
    """Makes this system's files behave as those of Windows."""
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename
    read_only = set()

    def open_file(path, flags, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = real_open(path, flags, *arguments, **options)
        (read_only.discard if flags & 3 else read_only.add)(descriptor)
        return descriptor

    def fsync(descriptor):
        if descriptor in read_only:
            raise OSError(9, "Bad file descriptor")
        real_fsync(descriptor)

    def rename(source, target, **options):
        if os.path.exists(target):
            raise FileExistsError(17, "the file exists already", str(target))
        real_rename(source, target, **options)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(signal, "SIGUSR1")
    methods = [method for method in multiprocessing.get_all_start_methods() if method == "spawn"]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)


def test_runs_are_saved_resumed_and_scored_under_the_rules_of_windows(
    windows, root, tmp_path, run_cli
):
    command = ["train", "vqa", "demo", "--data.root", root, "--run.log_every", 1, *NETWORK]
    command += ["--run.steps", 3, "--run.save_every", 1, "--out", tmp_path / "run"]
    run_cli(*command)
    # As a run that was killed after its second step.
    for path in (tmp_path / "run" / "checkpoints").glob("step_*3"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    run_cli(*command)
    predictions = tmp_path / "p.jsonl"
    for _ in range(2):  # the second time replaces the file
        run_cli(
            "eval",
            tmp_path / "run",
            "--data.root",
            root,
            "--batch",
            8,
            "--predictions",
            predictions,
        )
    assert "accuracy" in run_cli("score", "vqa", predictions, "--data.root", root)


def test_existing_files_and_directories_are_replaced(windows, tmp_path):
    for content in ("a", "b"):
        write_text(tmp_path / "file", content)
        with replace_directory(tmp_path / "directory") as new:
            (new / "file").write_text(content, encoding="utf-8")
    assert (tmp_path / "directory" / "file").read_text(encoding="utf-8") == "b"
    metrics = tmp_path / METRICS_FILE
    metrics.write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    truncate_metrics(metrics, 1)
    assert metrics.read_text(encoding="utf-8") == '{"step": 1}\n'


def test_a_file_that_is_in_use_is_named(tmp_path, monkeypatch):
    """Windows replaces no file that is open or mapped, as records are in another process."""
    (tmp_path / "train.jsonl").write_text("old", encoding="utf-8")

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(source))

    monkeypatch.setattr(Path, "replace", refuse)
    with (
        pytest.raises(PermissionError, match=r"train\.jsonl cannot be replaced \(Access is denied"),
        atomic_write(tmp_path / "train.jsonl") as file,
    ):
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_processes_are_started_where_there_is_no_fork(windows):
    assert dict(run_jobs(abs, {1: (-1,), 2: (-2,)}, 2, module="beit3.files")) == {1: 1, 2: 2}


def test_paths_in_records_have_slashes(tmp_path, monkeypatch):
    assert make_relative(tmp_path / "a" / "b.png", str(tmp_path / "c")) == "../a/b.png"

    def refuse(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", refuse)
    assert make_relative(tmp_path / "b.png", "C:") == (tmp_path / "b.png").as_posix()


# Consoles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Path:
    """Two classes of images, all of Chinese names, and one that is damaged."""
    raw = tmp_path_factory.mktemp("raw")
    for index in range(40):
        path = raw / ("猫" if index % 2 else "狗") / f"图{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return raw


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_a_console_lacks_stop_no_verb(chinese, encoding, tmp_path, monkeypatch):
    def run(*words: object) -> tuple[int, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        status = main([str(word) for word in words])
        for stream in streams:
            stream.flush()
        return status, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)

    root, out = tmp_path / "根", tmp_path / "运行"
    assert run("prepare", "imagenet", "--raw", chinese, "--root", root)[0] == 0
    train = ["train", "imagenet", "demo", "--data.root", root, "--run.steps", 2, *NETWORK]
    assert run(*train, "--data.batch.main", 4, "--out", out)[0] == 0
    image = chinese / "猫" / "图1.png"
    status, output = run("predict", out, image)
    assert status == 0
    assert ("猫" in output) == (encoding == "utf-8")
    assert run("eval", out, "--data.root", root, "--predictions", tmp_path / "预.jsonl")[0] == 0
    assert run("score", "imagenet", tmp_path / "预.jsonl", "--data.root", root)[0] == 0
    assert run("report", out)[0] == 0
    assert run("doctor", "--weights", out)[0] in (0, 2)
    image.with_name("坏.png").write_bytes(b"damaged")
    status, output = run("predict", out, image.with_name("坏.png"))
    image.with_name("坏.png").unlink()
    assert status == 2 and "Traceback" not in output
    for path in [out / METRICS_FILE, out / "recipe.json", out / "last" / "config.json"]:
        path.read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no names in Latin-1")
def test_records_keep_the_bytes_of_file_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    write_records(tmp_path / "train.jsonl", [{"id": "0", "image": name, "text": "图"}])
    json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8"))
    assert (tmp_path / Records(tmp_path / "train.jsonl")[0]["image"]).is_file()
