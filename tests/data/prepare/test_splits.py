"""Writing records into a root: what is counted, what is refused, and what a refusal leaves."""

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
from beit3.config import parse_keyword_options
from beit3.data.prepare.splits import find_fault, find_image_fault, write_splits
from beit3.data.prepare.statistics import MAX_LISTED_FAULTS, describe
from beit3.data.stores.records import Records
from beit3.task import list_tasks, load_task
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA


@pytest.fixture
def image_path(tmp_path) -> str:
    (tmp_path / "raw").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "raw" / "a.png")
    return str(tmp_path / "raw" / "a.png")


def make_pairs(image_path: str, count: int, **changes) -> list[tuple[str, dict]]:
    """Returns `count` usable training records; `n3={...}` changes record 3."""
    records = [{"id": str(i), "image": image_path, "text": f"text {i}"} for i in range(count)]
    for key, change in changes.items():
        records[int(key[1:])] |= change
    return [("train", record) for record in records]


def test_records_are_written_by_split_with_paths_relative_to_the_root(tmp_path, image_path):
    root = tmp_path / "some" / "root"
    pairs = [*make_pairs(image_path, 3), ("val", {"id": "v", "text": "only text"})]
    report = write_splits(root, "vqa", "main", pairs)
    assert report["records"] == {"train": 3, "val": 1} and report["passed_over"] == []
    train = list(Records(root / "vqa" / "main" / "train.jsonl"))
    assert [record["id"] for record in train] == ["0", "1", "2"]
    assert all(not os.path.isabs(record["image"]) for record in train)
    assert all((root / record["image"]).resolve() == Path(image_path).resolve() for record in train)
    assert list(Records(root / "vqa" / "main" / "val.jsonl")) == [{"id": "v", "text": "only text"}]
    assert pairs[0][1]["image"] == image_path, "the caller's records are left alone"


def test_faults_within_the_allowed_fraction_are_listed_and_skipped(tmp_path, image_path):
    missing_path = str(tmp_path / "raw" / "gone.png")
    (tmp_path / "raw" / "text.png").write_text("no image")
    changes = {
        "n5": {"image": missing_path},
        "n6": {"text": " \n"},
        "n7": {"image": str(tmp_path / "raw" / "text.png")},
    }
    report = write_splits(tmp_path / "root", "vqa", "main", make_pairs(image_path, 300, **changes))
    assert report["records"] == {"train": 297}
    assert [line.partition(":")[0] for line in report["passed_over"]] == ["5", "6", "7"]
    missing_fault, empty_fault, unreadable_fault = report["passed_over"]
    assert missing_path in missing_fault and "missing" in missing_fault
    assert "empty" in empty_fault
    assert "text.png" in unreadable_fault and "is not an image" in unreadable_fault
    kept_ids = {
        record["id"] for record in Records(tmp_path / "root" / "vqa" / "main" / "train.jsonl")
    }
    assert kept_ids == {str(i) for i in range(300)} - {"5", "6", "7"}


@pytest.mark.parametrize(("count", "refused"), [(100, False), (99, True)])
def test_the_fraction_is_of_all_records(tmp_path, image_path, count, refused):
    pairs = make_pairs(image_path, count, n0={"image": str(tmp_path / "gone.png")})
    if not refused:
        assert write_splits(tmp_path / "root", "vqa", "main", pairs)["records"] == {"train": 99}
        return
    with pytest.raises(
        ValueError,
        match=r"1 of 99 main records are unusable, 1% are allowed .*, nothing was written: "
        r"0: image .*gone\.png",
    ):
        write_splits(tmp_path / "root", "vqa", "main", pairs)
    assert not (tmp_path / "root").exists()


def test_a_refusal_leaves_existing_records(tmp_path, image_path):
    root = tmp_path / "root"
    write_splits(root, "vqa", "main", make_pairs(image_path, 3))
    before = (root / "vqa/main/train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="unusable"):
        write_splits(root, "vqa", "main", make_pairs(image_path, 3, n1={"text": ""}))
    assert (root / "vqa/main/train.jsonl").read_bytes() == before
    assert [path.name for path in (root / "vqa/main").iterdir()] == ["train.jsonl"]


def test_a_long_list_of_faults_is_cut(tmp_path, image_path):
    pairs = [("train", {"id": f"id{i}", "text": ""}) for i in range(50)]
    with pytest.raises(ValueError) as error:
        write_splits(tmp_path / "root", "vqa", "main", pairs)
    assert str(error.value).count("its text is empty") == MAX_LISTED_FAULTS and str(
        error.value
    ).endswith(" ...")
    assert "\n" not in str(error.value)


def test_a_source_without_usable_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no main records found for vqa: check --raw"):
        write_splits(tmp_path / "root", "vqa", "main", [])
    left_out = [("train", {"id": f"{n}.heic", "left_out": ".heic"}) for n in range(3)]
    with pytest.raises(ValueError, match=r"no main records found for vqa \(3 \.heic left out\)"):
        write_splits(tmp_path / "root", "vqa", "main", left_out)
    for bad_share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="--bad_share .*: give a fraction from 0 to 1"):
            write_splits(tmp_path / "root", "vqa", "main", [], bad_share=bad_share)
    assert not (tmp_path / "root").exists()


def test_a_test_split_alone_is_written_and_the_report_says_what_it_lacks(tmp_path):
    records = [("test", {"id": "1", "text": "a"}), ("test", {"id": "x", "left_out": ".md"})]
    report = write_splits(tmp_path / "root", "vqa", "main", records)
    assert report["records"] == {"test": 1} and report["left_out"] == {".md": 1}
    assert "--split test" in report["attention"] and "training needs" in report["attention"]
    report = write_splits(tmp_path / "root", "vqa", "main", [("train", {"id": "1", "text": "a"})])
    assert "attention" not in report


def test_a_reader_that_fails_halfway_leaves_only_existing_records(tmp_path, image_path):
    def read_and_fail(count: int):
        yield from make_pairs(image_path, count)
        yield "val", {"id": "v", "text": "a text"}
        raise ValueError("file x is cut")

    for root in (tmp_path / "new/root", tmp_path / "root"):
        if root == tmp_path / "root":
            write_splits(root, "vqa", "main", make_pairs(image_path, 3))
        before = {path: path.read_bytes() for path in root.rglob("*.*")}
        with pytest.raises(ValueError, match="file x is cut"):
            write_splits(root, "vqa", "main", read_and_fail(5000))  # more than a write buffer holds
        assert {path: path.read_bytes() for path in root.rglob("*.*")} == before
    assert not (tmp_path / "new").exists()


def test_records_are_not_kept_in_memory(tmp_path):
    """500 texts of 40,000 characters are 20 MB, which are never in memory together."""
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


def test_a_fault_from_a_reader_is_listed_in_one_line(tmp_path):
    pairs = [("train", {"id": str(i), "text": "a"}) for i in range(200)]
    report = write_splits(
        tmp_path, "t", "main", [*pairs, ("val", {"id": "x\n\x1b[2J", "fault": "row 3 has no text"})]
    )
    assert report["records"] == {"train": 200} and report["passed_over"] == [
        "x\\n\\x1b[2J: row 3 has no text"
    ]


def test_a_larger_fraction_of_faults_can_be_allowed(tmp_path, image_path):
    pairs = make_pairs(image_path, 4, n0={"text": ""})
    assert write_splits(tmp_path / "root", "vqa", "main", pairs, bad_share=0.25)["records"] == {
        "train": 3
    }


def test_both_images_of_a_record_are_checked_and_made_relative(tmp_path, image_path):
    missing_path = str(tmp_path / "raw" / "gone.png")
    pairs = make_pairs(image_path, 200, n3={"image2": missing_path}, n4={"image2": image_path})
    report = write_splits(tmp_path / "root", "nlvr2", "main", pairs)
    assert report["passed_over"] == [f"3: image {missing_path} is missing"]
    record = next(
        record
        for record in Records(tmp_path / "root/nlvr2/main/train.jsonl")
        if record["id"] == "4"
    )
    assert (
        record["image2"] == record["image"]
        and (tmp_path / "root" / record["image2"]).resolve() == Path(image_path).resolve()
    )


def test_captions_of_an_image_are_checked(tmp_path, image_path):
    pairs = make_pairs(image_path, 300)
    for number, captions in ((0, ["one", "two"]), (1, []), (2, ["one", " "]), (3, ["\ud800"])):
        pairs.append(("val", {"id": f"v{number}", "image": image_path, "captions": captions}))
    report = write_splits(tmp_path / "root", "captioning", "main", pairs)
    assert report["records"] == {"train": 300, "val": 2}
    empty, character = report["passed_over"]
    assert empty == "v2: one of its captions is empty" and character.startswith(
        "v3: it holds '\\ud800', which is no character"
    )


def test_images_are_found_from_a_root_behind_a_link(tmp_path, image_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "far" / "away")
    write_splits(tmp_path / "root", "vqa", "main", make_pairs(image_path, 4))
    record = json.loads((tmp_path / "root/vqa/main/train.jsonl").read_text().splitlines()[0])
    assert os.path.exists(tmp_path / "root" / record["image"])


def test_each_image_is_checked_once(tmp_path, image_path):
    image_faults: dict[str, str] = {}
    assert find_fault({"id": "1", "image": image_path}, image_faults) == ""
    os.remove(image_path)
    assert find_fault({"id": "2", "image": image_path}, image_faults) == "", (
        "the image is not opened for the second record"
    )
    assert "missing" in find_image_fault(image_path)


def test_an_image_with_an_incomplete_header_is_a_fault(tmp_path, image_path):
    content = Path(image_path).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:20])
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name in ("cut.png", "none.png", "folder.png"):
        assert name in find_image_fault(str(tmp_path / name))


@pytest.mark.parametrize("kind", [ValueError, SyntaxError, OverflowError, struct.error, OSError])
def test_any_error_of_pillow_is_a_fault_of_the_image(image_path, monkeypatch, kind):
    def fail(path: str, formats: list[str]) -> None:
        raise kind("damaged")

    monkeypatch.setattr(Image, "open", fail)
    assert find_image_fault(image_path) == f"image {image_path} cannot be read: damaged"


def test_a_png_with_megabytes_of_compressed_text_is_a_fault(image_path):
    """Pillow refuses decompression bombs with a ValueError."""
    text = b"zTXta\0\0" + zlib.compress(b"x" * (3 << 20))
    content = Path(image_path).read_bytes()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    Path(image_path).write_bytes(content[:33] + chunk + content[33:])
    assert f"image {image_path} cannot be read: Decompressed" in find_image_fault(image_path)


@pytest.mark.parametrize("name", [name for name in list_tasks() if load_task(name).sources])
def test_every_task_takes_the_fraction_of_unusable_records(name):
    prepare = load_task(name).prepare
    for text, value in (("0.1", 0.1), ("1", 1.0), ("5e-2", 0.05)):
        assert parse_keyword_options(prepare, ["--bad_share", text]) == {"bad_share": value}
    for text in ("many", "", "0,1"):
        with pytest.raises(ValueError, match=f"--bad_share ?{text}: expected a number"):
            parse_keyword_options(prepare, ["--bad_share", text])


def test_classes_without_images_and_files_left_out_are_named(tmp_path):
    for name in ("cat", "dog", "empty"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    for number in range(4):
        image = Image.new("RGB", (4, 4), (number, 0, 0))
        image.save(tmp_path / f"raw/cat/{number}.jfif", "JPEG")
        image.save(tmp_path / f"raw/dog/{number}.png")
        (tmp_path / f"raw/dog/{number}.HEIC").write_bytes(b"x")
    report = ImageNet.prepare(tmp_path / "raw", tmp_path / "root", "main")
    assert sum(report["records"].values()) == 8 and report["left_out"] == {".heic": 4}
    assert report["classes_without_images"] == ["empty"]
    text = describe(report)
    assert "4 .heic" in text and "no images of empty" in " ".join(text.split())


def test_questions_of_a_test_split_alone_keep_all_answers(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image1.png")
    (tmp_path / "qa.test.txt").write_text("what is on the table in the image1 ?\nbook\n")
    report = VQA.prepare(tmp_path, tmp_path / "root", "main")
    assert report["records"] == {"test": 1} and "training needs" in report["attention"]
    (record,) = Records(tmp_path / "root/vqa/main/test.jsonl")
    assert record["answers"] == {"book": 1.0}
    assert not (tmp_path / "root/vqa/main/answer2label.txt").exists()


# Through a task, on damaged copies of the embedded world -----------------------------------------


@pytest.fixture
def pairs_directory(raw, tmp_path) -> Path:
    shutil.copytree(raw / "pairs", tmp_path / "pairs")
    return tmp_path / "pairs"


def read_caption_file(directory: Path) -> tuple[Path, dict]:
    path = directory / "dataset_world.json"
    return path, json.loads(path.read_text())


def test_an_empty_caption_is_skipped(pairs_directory, tmp_path):
    path, data = read_caption_file(pairs_directory)
    data["images"][0]["sentences"][1]["raw"] = "  "
    path.write_text(json.dumps(data))
    report = Pretrain.prepare(pairs_directory, tmp_path / "root", "pairs")
    name = data["images"][0]["filename"]
    assert report["passed_over"] == [f"{name}#1: its text is empty"]
    assert report["records"]["train"] == 3 * 60 - 1


def test_a_missing_image_makes_all_its_captions_unusable(pairs_directory, tmp_path):
    _, data = read_caption_file(pairs_directory)
    names = [image["filename"] for image in data["images"]]
    (pairs_directory / "images" / names[0]).unlink()
    with pytest.raises(
        ValueError, match=rf"3 of 210 pairs records are unusable, 1% are allowed.*{names[0]}#0"
    ):
        Pretrain.prepare(pairs_directory, tmp_path / "root", "pairs")
    assert not (tmp_path / "root").exists()


def test_the_report_is_json_on_stdout_and_a_table_on_stderr(raw, tmp_path, capsys):
    """The table goes to stderr, so that a program that reads stdout reads JSON alone."""
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
    captured = capsys.readouterr()
    assert json.loads(captured.out)["records"]["train"] == 180
    assert (
        "train        180\n" in captured.err
        and "texts by length in " in captured.err
        and "{" not in captured.err
    )


def test_refused_questions_leave_no_answer_list(raw, tmp_path):
    shutil.copytree(raw / "vqa", tmp_path / "vqa")
    for path in sorted((tmp_path / "vqa" / "train2014").iterdir())[:3]:
        path.unlink()
    with pytest.raises(ValueError, match="main records are unusable"):
        VQA.prepare(tmp_path / "vqa", tmp_path / "root", "main")
    assert not (tmp_path / "root").exists()


def test_a_repeated_id_in_a_held_out_split_is_a_fault(tmp_path):
    """Predictions are joined to records by id; training records may share one."""
    pairs = [("train", {"id": "a", "text": "x"}), ("train", {"id": "a", "text": "y"})]
    pairs += [("val", {"id": str(i % 150), "text": "z"}) for i in range(151)] + [
        ("test", {"id": "0", "text": "w"})
    ]
    report = write_splits(tmp_path, "vqa", "main", pairs)
    assert report["records"] == {"train": 2, "val": 150, "test": 1}
    assert report["passed_over"] == ["0: another record of val has the same id"]
