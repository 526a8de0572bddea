"""`beit3 embed`: vectors, broken and duplicate files, changed inputs, wrong input."""

import csv
import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.data.views.preprocessing import Preprocessing
from beit3.predict import load
from beit3.search import preparing
from beit3.search.embed import embed
from beit3.search.finishing import EmbedReport
from beit3.search.folder import open_folder
from beit3.search.preparing import EmbedOptions
from beit3.search.worklist import UNFINISHED
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.weights.store import save_weights
from tests.search.embed_inputs import MODEL, read_files, write_images, write_weights

FLOAT32 = EmbedOptions(precision="float32", shard_size=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "retrieval")


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", 20)


def embed_folder(weights: Path, images: Path, out: Path, **changes: object) -> EmbedReport:
    return embed(weights, [images], out, options=replace(FLOAT32, **changes))


def read_vectors(out: Path, modality: str = "image") -> Mapping[str, np.ndarray]:
    """Returns id -> vector of the rows that are alive."""
    folder = open_folder(out)
    vectors = np.concatenate(folder.get_vectors(modality)).astype(np.float32)
    ids = folder.read_column("id").to_pylist()
    return {ids[row]: vectors[row] for row in np.flatnonzero(folder.alive)}


def read_skipped(out: Path) -> list[dict[str, str]]:
    with (out / "skipped.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Vectors ------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_predictor_one_by_one(weights, images, tmp_path):
    report = embed_folder(weights, images, tmp_path / "v", dtype="float32")
    assert report.rows == 20 and not report.is_unchanged
    predictor = load(weights)
    vectors = read_vectors(tmp_path / "v")
    assert len(vectors) == 20
    for image_id, vector in vectors.items():
        expected = predictor.embed(images=[images / image_id])["image"][0]
        np.testing.assert_allclose(vector, expected, atol=2e-6)


def test_the_layout_is_that_of_clip_retrieval(weights, images, tmp_path):
    embed_folder(weights, images, tmp_path / "v")
    vectors = np.load(tmp_path / "v" / "img_emb" / "img_emb_2.npy", mmap_mode="r")
    assert vectors.dtype == np.float16 and vectors.shape == (4, 32)
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        "img_emb",
        "inputs.parquet",
        "manifest.json",
        "metadata",
        "skipped.csv",
        "write.lock",
    ]
    row = open_folder(tmp_path / "v").read_rows(np.array([0])).to_pylist()[0]
    assert row["id"] == row["image_path"] == "0/0000.png"
    assert (row["width"], row["height"]) == (10, 8)


def test_workers_threads_and_torch_threads_do_not_change_bytes(weights, images, tmp_path):
    (images / "broken.png").write_bytes(b"\x89PNG")
    embed_folder(weights, images, tmp_path / "v", workers=0, threads=1)
    expected = read_files(tmp_path / "v")
    for number, options in enumerate(({"workers": 1}, {"workers": 2}, {"threads": 3})):
        embed_folder(weights, images, tmp_path / f"v{number}", **options)
        assert read_files(tmp_path / f"v{number}") == expected, options


def test_captions_become_text_vectors(weights, images, tmp_path):
    rows = [
        f"{n},{n % 2}/{n:04}.png,{'how many red' if n else ''}{' cubes' * n}" for n in range(20)
    ]
    rows.append("again,0/0002.png,the blue ball")
    (images / "list.csv").write_text("id,image,caption\n" + "\n".join(rows) + "\n")
    report = embed_folder(weights, images / "list.csv", tmp_path / "v", dtype="float32")
    assert (report.rows, report.duplicates) == (21, 1)
    texts, vectors = read_vectors(tmp_path / "v", "text"), read_vectors(tmp_path / "v")
    assert not texts["0"].any(), "an item without a caption has zeros"
    predictor = load(weights)
    for item, caption in (("1", "how many red cubes"), ("again", "the blue ball")):
        expected = predictor.embed(texts=[caption])["text"][0]
        np.testing.assert_allclose(texts[item], expected, atol=2e-6)
    np.testing.assert_array_equal(vectors["again"], vectors["2"])


def test_metadata_keep_their_types(weights, images, tmp_path):
    (images / "list.csv").write_text(
        "image,year,score,city,code,open,width\n0/0000.png,1999,1.5,Hue,007,true,5\n"
        "1/0001.png,,2,,008,false,6\n"
    )
    embed_folder(weights, images / "list.csv", tmp_path / "v")
    folder = open_folder(tmp_path / "v")
    rows = folder.read_rows(np.array([0, 1]), ["year", "score", "city", "code", "open"]).to_pylist()
    assert rows == [
        {"year": 1999, "score": 1.5, "city": "Hue", "code": "007", "open": True},
        {"year": None, "score": 2.0, "city": None, "code": "008", "open": False},
    ]
    assert folder.read_column("table_width").to_pylist() == [5, 6]


# Broken and duplicate files -----------------------------------------------------------------------


def break_files(images: Path) -> list[str]:
    """Breaks 30 files in ten ways; returns their ids."""
    whole = (images / "0" / "0000.png").read_bytes()
    faults = [
        b"",
        b"\x89PNG",
        whole[: len(whole) // 2],
        whole[:60],
        b"<html>not found</html>",
        b"%PDF-1.4",
        b"\xff\xd8\xff\xe0 no jpeg",
        b"GIF89a",
        bytes(1000),
        b"PK\x03\x04 archive",
    ]
    names = []
    for number in range(30):
        name = f"broken/{number}.{('jpg', 'png', 'webp')[number % 3]}"
        path = images / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(faults[number % len(faults)] + (bytes([number]) if number > 9 else b""))
        names.append(name)
    (images / names[0]).unlink()
    os.symlink("nowhere.jpg", images / names[0])
    return names


def test_30_of_1000_files_are_broken(weights, tmp_path):
    images = write_images(tmp_path / "images", 970)
    broken = break_files(images)
    report = embed_folder(weights, images, tmp_path / "v", shard_size=300)
    assert (report.rows, report.broken) == (970, 30)
    assert len(read_vectors(tmp_path / "v")) == 970
    skipped = read_skipped(tmp_path / "v")
    assert sorted(row["path"] for row in skipped) == sorted(broken)
    assert {row["kind"] for row in skipped} == {"broken"} and all(row["detail"] for row in skipped)


def test_equal_files_are_encoded_once(weights, images, tmp_path, monkeypatch):
    for name in ("copy.png", "other.png", "1/third.png"):
        shutil.copy(images / "0" / "0000.png", images / name)
    num_images = []
    encode = type(load(weights)).encode

    def count(predictor, batch):
        num_images.append(len(batch.get("image", ())))
        return encode(predictor, batch)

    monkeypatch.setattr("beit3.predict.Predictor.encode", count)
    report = embed_folder(weights, images, tmp_path / "v", batch_size=4)
    assert (report.rows, report.duplicates) == (23, 3)
    assert sum(num_images) == 20 + 1, "each content once, and one image that measures the length"
    vectors = read_vectors(tmp_path / "v")
    np.testing.assert_array_equal(vectors["copy.png"], vectors["0/0000.png"])
    details = {row["path"]: row["detail"] for row in read_skipped(tmp_path / "v")}
    assert details["1/third.png"] == "same content as copy.png"


def test_a_copy_of_a_broken_file_is_broken(weights, images, tmp_path):
    whole = (images / "0" / "0000.png").read_bytes()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(whole[:150])
    report = embed_folder(weights, images, tmp_path / "v")
    assert (report.rows, report.broken, report.duplicates) == (20, 2, 0)


# Changes between runs -----------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(weights, images, tmp_path):
    os.mkfifo(images / "pipe.png")
    assert embed_folder(weights, images, tmp_path / "v").broken == 1
    assert read_skipped(tmp_path / "v")[0]["detail"].endswith("pipe.png: it is no file")


@pytest.mark.parametrize("is_removed", [True, False])
def test_an_image_that_changes_while_it_is_embedded(
    weights, images, tmp_path, monkeypatch, is_removed
):
    """Its hash is that of the content before, so a vector of the new content would be wrong."""
    victim = images / "0" / "0000.png"
    content = (images / "1" / "0001.png").read_bytes()
    write_worklist = preparing.write_worklist

    def change(*args: object, **kwargs: object) -> object:
        victim.unlink()
        if not is_removed:
            victim.write_bytes(content)
        return write_worklist(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_worklist", change)
        with pytest.raises(ValueError, match=r"0000.png was changed or removed while it was embed"):
            embed_folder(weights, images, tmp_path / "v")
    embed_folder(weights, images, tmp_path / "v", update=True)
    expected = tmp_path / "expected"
    embed_folder(weights, images, expected)
    assert read_vectors(tmp_path / "v").keys() == read_vectors(expected).keys()
    for name, vector in read_vectors(expected).items():
        np.testing.assert_array_equal(read_vectors(tmp_path / "v")[name], vector)


def test_options_that_differ_are_refused_before_weights_are_loaded(weights, images, tmp_path):
    embed_folder(weights, images, tmp_path / "v")
    with pytest.raises(ValueError, match="was made with --precision float32, and int8 is given"):
        embed_folder(tmp_path / "no weights", images, tmp_path / "v", precision="int8")


def test_a_folder_that_cannot_be_made(weights, images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"--out .*v: nothing can be written to .*: name a folder"):
        embed_folder(weights, images, tmp_path / "v")


def test_a_full_disk_is_one_line_and_the_run_goes_on(weights, images, tmp_path, monkeypatch):
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("beit3.search.folder.flush_to_disk", fill)
        with pytest.raises(ValueError, match=r"v cannot be written \(No space left on device\)"):
            embed_folder(weights, images, tmp_path / "v")
    assert embed_folder(weights, images, tmp_path / "v").rows == 20


def test_a_complete_folder_stays_as_it_is(weights, images, tmp_path, run_cli):
    embed_folder(weights, images, tmp_path / "v")
    before = read_files(tmp_path / "v")
    output = run_cli("embed", weights, images, "--out", tmp_path / "v")
    assert "20 vectors, is complete and unchanged" in output
    assert read_files(tmp_path / "v") == before


def change_files(images: Path) -> None:
    """Changes one file, removes one and adds two."""
    Image.new("RGB", (9, 9), "red").save(images / "0" / "0000.png")
    (images / "1" / "0001.png").unlink()
    write_images(images, 2, first=20)


@pytest.mark.parametrize("is_finished", [True, False])
def test_changed_inputs_are_named_and_updated_on_request(weights, images, tmp_path, is_finished):
    out = tmp_path / "v"
    embed_folder(weights, images, out)
    if not is_finished:
        unfinish(weights, images, out)
    change_files(images)
    before = read_files(out)
    message = (
        r"1 changed \(0/0000.png\), 1 removed \(1/0001.png\), "
        r"2 new \(0/0020.png, 1/0021.png\); give --update"
    )
    with pytest.raises(ValueError, match=message):
        embed_folder(weights, images, out)
    assert read_files(out) == before
    report = embed_folder(weights, images, out, update=True)
    assert report.rows == 21 and "1 changed" in report.changes
    embed_folder(weights, images, tmp_path / "new")
    expected, vectors = read_vectors(tmp_path / "new"), read_vectors(out)
    assert vectors.keys() == expected.keys()
    for image_id, vector in vectors.items():
        np.testing.assert_array_equal(vector, expected[image_id])
    assert embed_folder(weights, images, out).is_unchanged


def unfinish(weights: Path, images: Path, out: Path) -> None:
    """Replaces a folder of vectors by one whose run ended before its manifest was written."""
    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beit3.search.embed.finish", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed_folder(weights, images, out)
    assert (out / UNFINISHED).is_dir()


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_update_that_was_interrupted_goes_on(weights, images, tmp_path, monkeypatch):
    """Interrupted before and right after the manifest is written: the same bytes."""
    folders = [tmp_path / "whole", tmp_path / "before", tmp_path / "after"]
    for out in folders:
        embed_folder(weights, images, out)
    change_files(images)
    embed_folder(weights, images, folders[0], update=True)
    for out, function in (
        (folders[1], "beit3.search.finishing._commit"),
        (folders[2], "beit3.search.worklist.Worklist.remove"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(function, raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                embed_folder(weights, images, out, update=True)
        embed_folder(weights, images, out)
        assert read_files(out) == read_files(folders[0])


def test_a_rename_is_not_encoded_again(weights, images, tmp_path):
    embed_folder(weights, images, tmp_path / "v")
    before = read_vectors(tmp_path / "v")
    (images / "0" / "0000.png").rename(images / "0" / "renamed.png")
    report = embed_folder(weights, images, tmp_path / "v", update=True)
    assert (report.rows, report.duplicates) == (20, 1)
    vectors = read_vectors(tmp_path / "v")
    np.testing.assert_array_equal(vectors["0/renamed.png"], before["0/0000.png"])


def test_a_moved_folder_is_noticed(weights, images, tmp_path):
    embed_folder(weights, images, tmp_path / "v")
    moved = images.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="images moved from .*images to .*moved; give --update"):
        embed_folder(weights, moved, tmp_path / "v")
    before = read_vectors(tmp_path / "v")
    embed_folder(weights, moved, tmp_path / "v", update=True)
    assert open_folder(tmp_path / "v").manifest.image_root == str(moved)
    assert read_vectors(tmp_path / "v").keys() == before.keys()


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_weights_and_preprocessing_are_refused(weights, images, tmp_path, is_finished):
    out = tmp_path / "v"
    embed_folder(weights, images, out)
    if not is_finished:
        unfinish(weights, images, out)
    before = read_files(out)
    other = write_weights(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"and the weights of .*other are different: use the same"):
        embed_folder(other, images, out, update=True)
    resized = tmp_path / "resized"
    task = load(weights).task
    config = task.config
    task.config = replace(config, image=replace(config.image, mean=(0.1, 0.1, 0.1)))
    save_weights(task, resized)
    with pytest.raises(ValueError, match="and the preprocessing of images of .*resized are diff"):
        embed_folder(resized, images, out, update=True)
    assert read_files(out) == before


def test_the_precision_stays_that_of_the_folder(weights, images, tmp_path):
    embed_folder(weights, images, tmp_path / "v", precision="bfloat16")
    write_images(images, 1, first=20)
    report = embed_folder(weights, images, tmp_path / "v", precision="auto", update=True)
    assert report.precision == "bfloat16"
    with pytest.raises(ValueError, match="--precision bfloat16, and float32 is given"):
        embed_folder(weights, images, tmp_path / "v")


# Wrong input --------------------------------------------------------------------------------------


def test_wrong_inputs_are_one_line(weights, images, tmp_path, run_failing_cli):
    empty, other, out = tmp_path / "empty", tmp_path / "other", tmp_path / "v"
    empty.mkdir()
    other.mkdir()
    (other / "notes.md").write_text("hello")
    table = images / "list.csv"
    table.write_text("image,year\n0/0000.png,1999\n")
    cases = {
        (empty,): "holds no files",
        (other,): "holds only other files (notes.md)",
        (tmp_path / "absent",): "absent does not exist",
        (other / "notes.md",): "is no folder and no list",
        (table, "--caption-column", "title"): "has no column 'title', it has image, year",
        (table, "--image-column", "photo"): "has no column 'photo'",
        (images, images): "the image 0/0000.png is named twice",
    }
    for words, message in cases.items():
        line = run_failing_cli("embed", weights, *words, "--out", out)
        assert message in line, line
        assert not out.exists()
    line = run_failing_cli("embed", weights, images, "--out", other)
    assert "holds something else (notes.md)" in line
    assert [path.name for path in other.iterdir()] == ["notes.md"]
    line = run_failing_cli("embed", weights, images, "--out", other / "notes.md")
    assert "is a file" in line


def test_weights_without_embeddings_are_refused(images, tmp_path, run_failing_cli):
    config = VQAConfig(model=MODEL, image=Preprocessing(16), answers=("a",), num_answers=1)
    task = VQA(config)
    task.init_weights(0)
    save_weights(task, tmp_path / "vqa")
    line = run_failing_cli("embed", tmp_path / "vqa", images, "--out", tmp_path / "v")
    assert "vqa has no features of single inputs" in line
    assert not (tmp_path / "v").exists()


def test_inputs_of_which_none_can_be_read(weights, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 inputs can be read; the first: image"):
        embed_folder(weights, tmp_path / "images", tmp_path / "v")
    write_images(tmp_path / "images", 2)
    assert embed_folder(weights, tmp_path / "images", tmp_path / "v", update=True).rows == 2


def test_two_runs_at_once_are_refused(weights, images, tmp_path):
    from beit3.search.folder import lock_for_writing

    with lock_for_writing(tmp_path / "v"), pytest.raises(ValueError, match="another process"):
        embed_folder(weights, images, tmp_path / "v")
