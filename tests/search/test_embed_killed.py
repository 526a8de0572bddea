"""`beit3 embed` killed at any moment, and shared by several processes: always the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beit3.search.embed import _wait_for, embed
from beit3.search.folder import get_metadata_path, get_vectors_path
from beit3.search.preparing import EmbedOptions
from beit3.search.worklist import UNFINISHED, Worklist
from tests.search.embed_inputs import make_command, read_files, write_images, write_weights

SCRIPTS = Path(__file__).parent
SHARD_SIZE = 3
OPTIONS = EmbedOptions(precision="float32", shard_size=SHARD_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds weights, 60 images of which some are broken or equal, captions, and their vectors."""
    folder = tmp_path_factory.mktemp("embed")
    write_weights(folder / "weights")
    images = write_images(folder / "images", 60)
    (images / "0" / "broken.png").write_bytes((images / "0" / "0000.png").read_bytes()[:150])
    for number in range(5):
        shutil.copy(images / "1" / f"{2 * number + 1:04}.png", images / f"copy{number}.png")
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    rows = [f"{name},red {'cubes ' * (number % 4)}" for number, name in enumerate(names)]
    (images / "list.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    embed(folder / "weights", [images / "list.csv"], folder / "v", options=OPTIONS)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, bytes]:
    return dict(read_files(folder / "v"))


def make_words(folder: Path, out: Path | None = None) -> list[str]:
    """Returns the command line of the run that made `folder / "v"`."""
    command = make_command(folder / "weights", folder / "images" / "list.csv", Path("v"))[1:]
    at = command.index("--out")
    words = [*command[:at], *command[at + 2 :], "--shard-size", str(SHARD_SIZE)]
    return words if out is None else [*words, "--out", str(out)]


def run_script(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs Python with this checkout's modules."""
    paths = [str(SCRIPTS.parents[1] / "src"), str(SCRIPTS.parents[1])]
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=240)
        finally:
            process.terminate()  # torchrun, which is not killed, ends its processes
    assert not check or process.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def torchrun(victim: int, num_shards: int, words: list[str], *, check: bool = True) -> None:
    """Runs two gloo processes; process `victim` is killed after that many shards."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    process = run_script(
        *launcher, SCRIPTS / "embed_process.py", victim, num_shards, *words, check=False
    )
    if "failed to connect" in process.stderr.lower():
        pytest.skip("gloo processes cannot connect on this machine")
    assert (process.returncode == 0) == check, process.stderr[-4000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("num_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(folder, expected, tmp_path, num_kills):
    out = tmp_path / "v"
    process = run_script(SCRIPTS / "killed_runs.py", out, num_kills, *make_words(folder))
    num_killed = int(process.stdout.splitlines()[-1])
    assert num_killed >= 0.6 * num_kills, "most runs were killed before their end"
    assert read_files(out) == expected


@pytest.mark.parametrize("kind", ["half-written files", "no mark", "damaged file without mark"])
def test_killed_while_a_shard_was_written(folder, expected, tmp_path, monkeypatch, kind):
    """A shard whose mark is absent is written again, whatever its files hold."""
    out = tmp_path / "v"
    with monkeypatch.context() as patch:
        patch.setattr("beit3.search.embed.finish", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(folder / "weights", [folder / "images" / "list.csv"], out, options=OPTIONS)
    (out / UNFINISHED / "shard_2.json").unlink()
    vectors, metadata = get_vectors_path(out, 2, "image"), get_metadata_path(out, 2)
    if kind == "half-written files":
        content = vectors.read_bytes()
        vectors.with_name(f"{vectors.name}.77.partial").write_bytes(content[: len(content) // 2])
        vectors.unlink()
        metadata.unlink()
        (out / UNFINISHED / "shard_2.json.77.partial").write_bytes(b'{"digest')
        (out / "manifest.json.77.partial").write_bytes(b"{")
    elif kind == "damaged file without mark":
        vectors.write_bytes(vectors.read_bytes()[:-7])
        metadata.unlink()
    embed(folder / "weights", [folder / "images" / "list.csv"], out, options=OPTIONS)
    assert read_files(out) == expected


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_complete_shards_are_not_encoded_again(folder, expected, tmp_path, monkeypatch):
    out = tmp_path / "v"
    with monkeypatch.context() as patch:
        patch.setattr("beit3.search.embed.finish", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(folder / "weights", [folder / "images" / "list.csv"], out, options=OPTIONS)
    (out / UNFINISHED / "shard_4.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    embed(folder / "weights", [folder / "images" / "list.csv"], out, options=OPTIONS)
    changed = {path.name for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert changed == {"img_emb_4.npy", "text_emb_4.npy"}
    assert read_files(out) == expected


def test_a_process_whose_launcher_is_dead_does_not_wait_for_ever(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("beit3.search.embed.finish", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(folder / "weights", [folder / "images" / "list.csv"], tmp_path, options=OPTIONS)
    (tmp_path / UNFINISHED / "shard_4.json").unlink()
    monkeypatch.setattr("beit3.search.embed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="torchrun has ended before its processes"):
        _wait_for(Worklist(tmp_path), [4], launcher=-1)


def test_two_processes_write_the_same_bytes(folder, expected, tmp_path):
    torchrun(-1, 0, make_words(folder, tmp_path / "v"))
    assert read_files(tmp_path / "v") == expected


@pytest.mark.slow
def test_one_of_two_processes_is_killed(folder, expected, tmp_path):
    """Either process is killed; two processes, then one, go on."""
    out = tmp_path / "v"
    torchrun(1, 4, make_words(folder, out), check=False)
    assert (out / UNFINISHED).is_dir()
    torchrun(0, 9, make_words(folder, out), check=False)
    assert (out / UNFINISHED).is_dir()
    embed(folder / "weights", [folder / "images" / "list.csv"], out, options=OPTIONS)
    assert read_files(out) == expected
