"""Records into a root: what is counted, what is run_failing_cli, and that a refusal leaves nothing
behind."""

import json
import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from beit3.cli import main
from beit3.data.prepare.splits import NAMED, find_fault, image_fault, write_splits
from beit3.data.stores.records import Records
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA


@pytest.fixture
def picture(tmp_path) -> str:
    (tmp_path / "raw").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "raw" / "a.png")
    return str(tmp_path / "raw" / "a.png")


def rows(picture: str, count: int, **at) -> list[tuple[str, dict]]:
    """`count` good training records; `at` "n3" = a change of record 3."""
    records = [{"id": str(i), "image": picture, "text": f"text {i}"} for i in range(count)]
    for key, change in at.items():
        records[int(key[1:])] |= change
    return [("train", record) for record in records]


def test_records_are_written_by_split_with_paths_relative_to_the_root(tmp_path, picture):
    root = tmp_path / "some" / "root"
    given = [*rows(picture, 3), ("val", {"id": "v", "text": "only text"})]
    report = write_splits(root, "vqa", "main", given)
    assert report["records"] == {"train": 3, "val": 1} and report["passed_over"] == []
    train = list(Records(root / "vqa" / "main" / "train.jsonl"))
    assert [record["id"] for record in train] == ["0", "1", "2"]
    assert all(not os.path.isabs(record["image"]) for record in train)
    assert all((root / record["image"]).resolve() == Path(picture).resolve() for record in train)
    assert list(Records(root / "vqa" / "main" / "val.jsonl")) == [{"id": "v", "text": "only text"}]
    assert given[0][1]["image"] == picture, "the caller's records are left alone"


def test_faults_within_the_share_are_named_and_passed_over(tmp_path, picture):
    gone = str(tmp_path / "raw" / "gone.png")
    (tmp_path / "raw" / "text.png").write_text("no image")
    changes = {
        "n5": {"image": gone},
        "n6": {"text": " \n"},
        "n7": {"image": str(tmp_path / "raw" / "text.png")},
    }
    report = write_splits(tmp_path / "root", "vqa", "main", rows(picture, 300, **changes))
    assert report["records"] == {"train": 297}
    assert [line.partition(":")[0] for line in report["passed_over"]] == ["5", "6", "7"]
    missing, empty, unreadable = report["passed_over"]
    assert gone in missing and "missing" in missing
    assert "empty" in empty
    assert "text.png" in unreadable and "cannot be read" in unreadable
    kept = {record["id"] for record in Records(tmp_path / "root" / "vqa" / "main" / "train.jsonl")}
    assert kept == {str(i) for i in range(300)} - {"5", "6", "7"}


@pytest.mark.parametrize(("count", "run_failing_cli"), [(100, False), (99, True)])
def test_the_share_is_counted_over_all_records(tmp_path, picture, count, run_failing_cli):
    given = rows(picture, count, n0={"image": str(tmp_path / "gone.png")})
    if not run_failing_cli:
        assert write_splits(tmp_path / "root", "vqa", "main", given)["records"] == {"train": 99}
        return
    with pytest.raises(
        ValueError,
        match=r"1 of 99 main records are unusable, 1% are allowed, nothing was written: 0: image .*gone\.png",
    ):
        write_splits(tmp_path / "root", "vqa", "main", given)
    assert not (tmp_path / "root").exists()


def test_a_refusal_leaves_older_records_alone(tmp_path, picture):
    root = tmp_path / "root"
    write_splits(root, "vqa", "main", rows(picture, 3))
    before = (root / "vqa/main/train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="unusable"):
        write_splits(root, "vqa", "main", rows(picture, 3, n1={"text": ""}))
    assert (root / "vqa/main/train.jsonl").read_bytes() == before
    assert [path.name for path in (root / "vqa/main").iterdir()] == ["train.jsonl"]


def test_a_long_list_of_faults_is_cut(tmp_path, picture):
    given = [("train", {"id": f"id{i}", "text": ""}) for i in range(50)]
    with pytest.raises(ValueError) as caught:
        write_splits(tmp_path / "root", "vqa", "main", given)
    assert str(caught.value).count("its text is empty") == NAMED and str(caught.value).endswith(
        " ..."
    )
    assert "\n" not in str(caught.value)


def test_no_records_at_all(tmp_path):
    with pytest.raises(ValueError, match="no main records found for vqa: check --raw"):
        write_splits(tmp_path / "root", "vqa", "main", [])
    with pytest.raises(
        ValueError, match="no main records found for vqa in train or val, only in test: check --raw"
    ):
        write_splits(tmp_path / "root", "vqa", "main", [("test", {"id": "1", "text": "a"})])
    assert not (tmp_path / "root").exists()


def test_a_reader_that_stops_halfway_leaves_nothing_and_older_records_alone(tmp_path, picture):
    def broken(count: int):
        yield from rows(picture, count)
        yield "val", {"id": "v", "text": "a text"}
        raise ValueError("file x is cut")

    for root in (tmp_path / "new/root", tmp_path / "root"):
        if root == tmp_path / "root":
            write_splits(root, "vqa", "main", rows(picture, 3))
        before = {path: path.read_bytes() for path in root.rglob("*.*")}
        with pytest.raises(ValueError, match="file x is cut"):
            write_splits(root, "vqa", "main", broken(5000))  # more than a write buffer holds
        assert {path: path.read_bytes() for path in root.rglob("*.*")} == before
    assert not (tmp_path / "new").exists()


def test_records_are_not_kept_in_memory(tmp_path):
    """500 texts of 40,000 characters are 20 MB; at no time are they here together."""
    tracemalloc.start()
    report = write_splits(
        tmp_path,
        "t",
        "main",
        (("train", {"id": str(i), "text": f"{i:04d}" * 10_000}) for i in range(500)),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["records"] == {"train": 500} and peak < 2_000_000


def test_what_a_reader_could_not_read_is_named_in_one_line(tmp_path):
    given = [("train", {"id": str(i), "text": "a"}) for i in range(200)]
    report = write_splits(
        tmp_path, "t", "main", [*given, ("val", {"id": "x\n\x1b[2J", "fault": "row 3 has no text"})]
    )
    assert report["records"] == {"train": 200} and report["passed_over"] == [
        "x\\n\\x1b[2J: row 3 has no text"
    ]


def test_a_wider_share_can_be_asked_for(tmp_path, picture):
    given = rows(picture, 4, n0={"text": ""})
    assert write_splits(tmp_path / "root", "vqa", "main", given, bad_share=0.25)["records"] == {
        "train": 3
    }


def test_both_images_are_checked_and_become_relative(tmp_path, picture):
    gone = str(tmp_path / "raw" / "gone.png")
    given = rows(picture, 200, n3={"image2": gone}, n4={"image2": picture})
    report = write_splits(tmp_path / "root", "nlvr2", "main", given)
    assert report["passed_over"] == [f"3: image {gone} is missing"]
    record = next(
        record
        for record in Records(tmp_path / "root/nlvr2/main/train.jsonl")
        if record["id"] == "4"
    )
    assert (
        record["image2"] == record["image"]
        and (tmp_path / "root" / record["image2"]).resolve() == Path(picture).resolve()
    )


def test_captions_of_an_image_are_checked(tmp_path, picture):
    given = rows(picture, 300)
    for number, captions in ((0, ["one", "two"]), (1, []), (2, ["one", " "]), (3, ["\ud800"])):
        given.append(("val", {"id": f"v{number}", "image": picture, "captions": captions}))
    report = write_splits(tmp_path / "root", "captioning", "main", given)
    assert report["records"] == {"train": 300, "val": 2}
    empty, character = report["passed_over"]
    assert empty == "v2: one of its captions is empty" and character.startswith(
        "v3: it holds '\\ud800', which is no character"
    )


def test_a_root_behind_a_link_finds_its_images(tmp_path, picture):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "far" / "away")
    write_splits(tmp_path / "root", "vqa", "main", rows(picture, 4))
    record = json.loads((tmp_path / "root/vqa/main/train.jsonl").read_text().splitlines()[0])
    assert os.path.exists(tmp_path / "root" / record["image"])


def test_images_are_judged_once(tmp_path, picture):
    known: dict[str, str] = {}
    assert find_fault({"id": "1", "image": picture}, known) == ""
    os.remove(picture)
    assert find_fault({"id": "2", "image": picture}, known) == "", (
        "the second record of an image costs nothing"
    )
    assert "missing" in image_fault(picture)


def test_an_image_cut_in_its_header_is_a_fault(tmp_path, picture):
    whole = Path(picture).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:20])
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name in ("cut.png", "none.png", "folder.png"):
        assert name in image_fault(str(tmp_path / name))


@pytest.mark.parametrize("kind", [ValueError, SyntaxError, OverflowError, struct.error, OSError])
def test_whatever_pillow_raises_is_a_fault_of_the_image(picture, monkeypatch, kind):
    def broken(path: str) -> None:
        raise kind("damaged")

    monkeypatch.setattr(Image, "open", broken)
    assert image_fault(picture) == f"image {picture} cannot be read ({kind.__name__})"


def test_a_png_whose_text_unpacks_to_megabytes_is_a_fault(picture):
    """Pillow's guard against bombs is a ValueError."""
    text = b"zTXta\0\0" + zlib.compress(b"x" * (3 << 20))
    whole = Path(picture).read_bytes()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    Path(picture).write_bytes(whole[:33] + chunk + whole[33:])
    assert image_fault(picture) == f"image {picture} cannot be read (ValueError)"


# Through a task, on a world of which something is broken ------------------------------------------


@pytest.fixture
def broken(raw, tmp_path) -> Path:
    shutil.copytree(raw / "pairs", tmp_path / "pairs")
    return tmp_path / "pairs"


def caption_file(folder: Path) -> tuple[Path, dict]:
    path = folder / "dataset_world.json"
    return path, json.loads(path.read_text())


def test_an_empty_caption_is_passed_over(broken, tmp_path):
    path, data = caption_file(broken)
    data["images"][0]["sentences"][1]["raw"] = "  "
    path.write_text(json.dumps(data))
    report = Pretrain.prepare(broken, tmp_path / "root", "pairs")
    name = data["images"][0]["filename"]
    assert report["passed_over"] == [f"{name}#1: its text is empty"]
    assert report["records"]["train"] == 3 * 60 - 1


def test_a_missing_image_costs_its_captions_and_may_be_too_many(broken, tmp_path):
    _, data = caption_file(broken)
    names = [image["filename"] for image in data["images"]]
    (broken / "images" / names[0]).unlink()
    with pytest.raises(
        ValueError, match=rf"3 of 210 pairs records are unusable, 1% are allowed.*{names[0]}#0"
    ):
        Pretrain.prepare(broken, tmp_path / "root", "pairs")
    assert not (tmp_path / "root").exists()


def test_people_and_programs_are_both_told(raw, tmp_path, capsys):
    """The table goes where messages go, so that what a program reads is JSON alone."""
    arguments = [
        "prepare",
        "pretrain",
        "--source",
        "pairs",
        "--raw",
        str(raw / "pairs"),
        "--root",
        str(tmp_path / "root"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["records"]["train"] == 180
    assert (
        "train        180\n" in said.err
        and "texts by length in " in said.err
        and "{" not in said.err
    )


def test_a_refused_vqa_leaves_no_answer_list(raw, tmp_path):
    shutil.copytree(raw / "vqa", tmp_path / "vqa")
    for path in sorted((tmp_path / "vqa" / "train2014").iterdir())[:3]:
        path.unlink()
    with pytest.raises(ValueError, match="main records are unusable"):
        VQA.prepare(tmp_path / "vqa", tmp_path / "root", "main")
    assert not (tmp_path / "root").exists()


def test_an_id_counts_once_in_a_held_out_split(tmp_path):
    """Predictions are joined to records by id; training records may share one."""
    rows = [("train", {"id": "a", "text": "x"}), ("train", {"id": "a", "text": "y"})]
    rows += [("val", {"id": str(i % 150), "text": "z"}) for i in range(151)] + [
        ("test", {"id": "0", "text": "w"})
    ]
    report = write_splits(tmp_path, "vqa", "main", rows)
    assert report["records"] == {"train": 2, "val": 150, "test": 1}
    assert report["passed_over"] == ["0: another record of val has the same id"]
