"""Tar shards: a real one of img2dataset, and small ones made here, some of them cut, damaged or
hostile."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from beit3.data.prepare.formats import tars
from beit3.data.prepare.formats.detect import (
    detect_format,
    holds_pretraining_tars,
    read_images,
    read_pairs,
)
from beit3.data.prepare.formats.split_names import is_held_out
from beit3.data.prepare.splits import write_splits
from beit3.files import parse_tar_member, read_tar_member
from tests.data.prepare.test_formats import assert_refused, count_splits, find_sample, write_files


def encode_image(color: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes | str]], *, links: dict[str, str] | None = None
) -> Path:
    """A tar of these members in their order; `links`: name -> target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_members(key: str, color: int = 0) -> list[tuple[str, bytes | str]]:
    return [
        (f"{key}.png", encode_image(color)),
        (f"{key}.json", "{}"),
        (f"{key}.txt", f"caption of {key}"),
    ]


def make_many_members(count: int) -> list[tuple[str, bytes | str]]:
    return [member for i in range(count) for member in make_members(f"{i:04d}", i % 250)]


def read_image_bytes(record: dict[str, Any]) -> bytes:
    """Returns the bytes that a record's image names."""
    return read_tar_member(*parse_tar_member(record["image"]))


def select_records(pairs: Iterable[tuple[str, dict]]) -> list[dict]:
    return [record for _, record in pairs if "fault" not in record]


def select_faults(pairs: Iterable[tuple[str, dict]]) -> dict[str, str]:
    return {record["id"]: record["fault"] for _, record in pairs if "fault" in record}


def test_a_real_shard_gives_its_images_and_captions():
    raw = find_sample("cc12m_webdataset")
    records = {record["id"]: record for record in select_records(read_pairs(raw))}
    assert detect_format(raw) == "webdataset" and len(records) == 32
    # Against the tar as a complete, read at random: same bytes, same captions.
    with tarfile.open(raw / "cc12m-train-0000.tar") as tar:
        for name in tar.getnames():
            key, _, ending = name.partition(".")
            record, expected = records[f"cc12m-train-0000/{key}"], tar.extractfile(name).read()
            if ending == "jpg":
                assert read_image_bytes(record) == expected
            elif ending == "txt":
                assert record["text"] == expected.decode().strip()
    alone = select_records(read_images(raw))
    assert [(record["id"], record["image"]) for record in alone] == [
        (record["id"], record["image"]) for record in records.values()
    ]
    assert all("text" not in record for record in alone)


def test_records_of_tars_can_be_written_like_others(tmp_path):
    write_tar(tmp_path / "raw/00000.tar", make_many_members(40))
    report = write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    assert (
        sum(report["records"].values()) == 40
        and report["images"]["distinct"] == 40
        and not report["passed_over"]
    )
    line = json.loads((tmp_path / "root/pretrain/pairs/train.jsonl").read_text().splitlines()[0])
    assert (
        line["image"].startswith("../raw/00000.tar@")
        and read_image_bytes({"image": str(tmp_path / "root" / line["image"])}) == encode_image()
    )


def test_every_kind_of_caption_and_image_is_read(tmp_path):
    members = [
        ("./1.jpg", encode_image(kind="JPEG")),
        ("./1.txt", "\ufeff one \n"),
        ("1.json", '{"caption": "not this one"}'),
        ("2.WEBP", encode_image(kind="WEBP")),
        ("2.json", '{"caption": "two"}'),
        ("3.json", '{"caption": null, "text": "three"}'),
        ("3.jpeg", encode_image(3)),
        ("3.seg.png", b"a mask"),
        ("3.cls", "7"),
        ("._4.jpg", b"a leftover"),
        ("deep/5.png", encode_image(5)),
        ("deep/5.txt", "five"),
        ("6.json", '{"caption": "not this one"}'),
        ("6.txt", "six"),
        ("6.png", encode_image(6)),
        ("7.txt", b"caf\xe9"),
        ("7.json", '{"caption": "seven"}'),
        ("7.png", encode_image(7)),
    ]
    write_tar(tmp_path / "raw/00000.tar", members)
    records = select_records(read_pairs(tmp_path / "raw"))
    assert [record["text"] for record in records] == [
        "one",
        "two",
        "three",
        "five",
        "six",
        "seven",
    ], "./1 and 1 are one key"
    assert [read_image_bytes(record) for record in records[2:]] == [
        encode_image(3),
        encode_image(5),
        encode_image(6),
        encode_image(7),
    ]


def test_splits_come_from_shards_folders_and_keys(tmp_path):
    write_tar(tmp_path / "a/x-train-0000.tar", make_many_members(200))
    write_tar(tmp_path / "a/x-val-0000.tar", make_members("v"))
    assert count_splits(read_pairs(tmp_path / "a")) == {"train": 200, "val": 1}
    write_tar(tmp_path / "b/train/00000.tar", make_many_members(2))
    write_tar(tmp_path / "b/validation/00000.tar", make_many_members(3))
    records = list(read_pairs(tmp_path / "b"))
    assert (
        count_splits(records) == {"train": 2, "val": 3}
        and len({record["id"] for _, record in records}) == 5
    )
    write_tar(tmp_path / "c/00000.tar", make_many_members(200))
    for split, record in read_pairs(tmp_path / "c"):
        assert (split == "val") == is_held_out(record["id"].rpartition("/")[2], 0.05)
    assert {split for split, _ in read_pairs(tmp_path / "c/00000.tar")} == {"train", "val"}


BROKEN_MEMBERS = [
    ("b0.png", encode_image()),
    ("b1.txt", "no image"),
    ("b2.png", encode_image()),
    ("b2.json", "{"),
    ("b3.png", encode_image()),
    ("b3.txt", b"caf\xe9"),
    ("b4.png", b"x" * 5001),
    ("b4.txt", "large"),
    ("b5.png", encode_image()),
    ("b5.txt", "y" * (tars.MAX_TEXT_BYTES + 1)),
    ("b6.png", b"no image"),
    ("b6.txt", "six"),
    *make_members("b8"),
    *make_members("b9"),
    *make_members("b8", 9),
]
EXPECTED_FAULTS = {
    "b0": "no caption",
    "b1": "no image",
    "b2": "not JSON",
    "b3": "not UTF-8",
    "b4": "'b4.png' has 5001 bytes, more than 5000",
    "b5": "'b5.txt' has 1048577 bytes",
    "b6": "'b6.png' is not an image",
    "b8": "00000.tar has its members in two places",
    "b10": "'b10.png' is a link or a device",
}
"""Members with faults, and what is faults of them."""


def test_faults_are_reported_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    write_tar(
        tmp_path / "00000.tar",
        [*make_many_members(3), *BROKEN_MEMBERS],
        links={"b10.png": "/etc/passwd"},
    )
    records = list(read_pairs(tmp_path))
    faults = {key.removeprefix("00000/"): fault for key, fault in select_faults(records).items()}
    assert faults.keys() == EXPECTED_FAULTS.keys() and all(
        EXPECTED_FAULTS[key] in faults[key] for key in EXPECTED_FAULTS
    ), faults
    assert [record["id"] for record in select_records(records)] == [
        f"00000/{key}" for key in ("0000", "0001", "0002", "b8", "b9")
    ]
    (first,) = (record for record in select_records(records) if record["id"].endswith("b8"))
    assert read_image_bytes(first) == encode_image(), (
        "the second record of a key does not replace the first"
    )


def test_names_cannot_leave_the_folder(tmp_path):
    keys = [
        "../../escaped",
        "/absolute",
        "..",
        "a/../../b",
        "a b",
        "ä",
        "ö",
        "x" * 300,
        "\n",
        "-rf",
        "CON\\c",
    ]
    write_tar(
        tmp_path / "raw/00000.tar",
        [member for i, key in enumerate(keys) for member in make_members(key, i)],
    )
    records = select_records(read_pairs(tmp_path / "raw"))
    assert len({record["id"] for record in records}) == len(records) == len(keys) - 1, (
        "'...png' has no name before its dot"
    )
    assert {parse_tar_member(record["image"])[0] for record in records} == {
        str(tmp_path / "raw/00000.tar")
    }
    names = [record["id"].removeprefix("00000/") for record in records]
    assert all(
        name.isascii() and len(name) < 120 and not set(name) & set("/\\ \n.") for name in names
    )
    assert {read_image_bytes(record) for record in records} == {
        encode_image(i) for i in range(len(keys)) if i != 2
    }


def count_complete_records(tar: Path, cut: int) -> int | None:
    """How many records a tar cut at byte `cut` still has for sure, slowly: those before a member of
    another key; None = all."""
    with tarfile.open(tar) as complete:
        members = complete.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    if cut >= end + 512:
        return None
    begun = [member.name.partition(".")[0] for member in members if member.offset_data <= cut]
    return max(0, len(dict.fromkeys(begun)) - 1)


def test_a_tar_cut_anywhere_keeps_its_complete_records(tmp_path):
    complete = write_tar(tmp_path / "complete.tar", make_many_members(3))
    (tmp_path / "raw").mkdir()
    size = complete.stat().st_size
    expected = select_records(
        read_pairs(write_tar(tmp_path / "raw/00007.tar", make_many_members(3)))
    )
    for cut in sorted({*range(0, size, 256), *range(1, size, 1777), size - 1}):
        (tmp_path / "raw/00007.tar").write_bytes(complete.read_bytes()[:cut])
        records, kept = list(read_pairs(tmp_path / "raw")), count_complete_records(complete, cut)
        assert select_records(records) == expected[:kept]
        assert list(select_faults(records)) == ([] if kept is None else ["00007"])
        if kept is not None:
            faults = select_faults(records)["00007"]
            assert (
                f"00007.tar is cut or damaged after {kept} complete records" in faults
                and "download it again" in faults
            )


def test_a_damaged_tar_is_a_fault(tmp_path):
    damaged = bytearray(write_tar(tmp_path / "00000.tar", make_many_members(3)).read_bytes())
    damaged[512 * 6 : 512 * 7] = b"\xff" * 512  # the header of the second picture
    for bad, kept in (
        (bytes(damaged), 0),
        (b"no tar at all" * 100, 0),
        (b"\x1f\x8b" + b"x" * 2000, 0),
    ):
        (tmp_path / "00000.tar").write_bytes(bad)
        records = list(read_pairs(tmp_path))
        assert (
            len(select_records(records)) == kept
            and "00000.tar is cut or damaged after 0 complete records"
            in select_faults(records)["00000"]
        )


def test_unpacked_images_come_before_tars(tmp_path):
    """ImageNet's downloads often lie beside what they were unpacked to."""
    write_tar(tmp_path / "n01.tar", make_many_members(1))
    write_files(tmp_path, {"n01/a.png": None})
    records = [record for _, record in read_images(tmp_path)]
    assert records[0] == {"id": "n01.tar", "left_out": ".tar"}
    assert [record["id"] for record in records[1:]] == ["n01/a.png"]
    assert holds_pretraining_tars(tmp_path, captions=True) and not holds_pretraining_tars(
        tmp_path, captions=False
    )


def test_a_folder_without_tars_is_refused(tmp_path):
    assert_refused(tars.read_webdataset, tmp_path, "no known format", "*.tar")


def test_a_caption_of_any_json_is_read_or_a_fault(tmp_path):
    contents = ["[]", "3", "null", '"text"', json.dumps({"caption": 3}), "[" * 100_000, "nan"]
    write_tar(
        tmp_path / "00000.tar",
        [
            m
            for i, text in enumerate(contents)
            for m in ((f"{i}.png", encode_image()), (f"{i}.json", text))
        ],
    )
    records = list(read_pairs(tmp_path))
    assert len(select_faults(records)) == len(contents) and all(
        "\n" not in fault for fault in select_faults(records).values()
    )
