"""Tar shards: a real one of img2dataset, and small ones made here, among them cut, damaged and
hostile ones."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from beit3.data.prepare import formats
from beit3.data.prepare.formats import tars
from beit3.data.prepare.splits import write_splits
from beit3.files import parse_tar_member, read_tar_member
from tests.data.prepare.test_formats import counts, files, refused, sample


def picture(color: int = 0, kind: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(written, kind)
    return written.getvalue()


def shard(
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


def pair(key: str, color: int = 0) -> list[tuple[str, bytes | str]]:
    return [
        (f"{key}.png", picture(color)),
        (f"{key}.json", "{}"),
        (f"{key}.txt", f"caption of {key}"),
    ]


def many(count: int) -> list[tuple[str, bytes | str]]:
    return [member for i in range(count) for member in pair(f"{i:04d}", i % 250)]


def content(record: dict[str, Any]) -> bytes:
    """The bytes that a record's image names."""
    return read_tar_member(*parse_tar_member(record["image"]))


def good(pairs: Iterable[tuple[str, dict]]) -> list[dict]:
    return [record for _, record in pairs if "fault" not in record]


def faults(pairs: Iterable[tuple[str, dict]]) -> dict[str, str]:
    return {record["id"]: record["fault"] for _, record in pairs if "fault" in record}


def test_a_real_shard():
    raw = sample("cc12m_webdataset")
    found = {record["id"]: record for record in good(formats.pairs(raw))}
    assert formats.detect(raw) == "webdataset" and len(found) == 32
    # Against the tar as a whole, read at random: same bytes, same captions.
    with tarfile.open(raw / "cc12m-train-0000.tar") as tar:
        for name in tar.getnames():
            key, _, ending = name.partition(".")
            record, wanted = found[f"cc12m-train-0000/{key}"], tar.extractfile(name).read()
            if ending == "jpg":
                assert content(record) == wanted
            elif ending == "txt":
                assert record["text"] == wanted.decode().strip()
    alone = good(formats.images(raw))
    assert [(record["id"], record["image"]) for record in alone] == [
        (record["id"], record["image"]) for record in found.values()
    ]
    assert all("text" not in record for record in alone)


def test_records_of_tars_can_be_written_as_any_others(tmp_path):
    shard(tmp_path / "raw/00000.tar", many(40))
    report = write_splits(tmp_path / "root", "pretrain", "pairs", formats.pairs(tmp_path / "raw"))
    assert (
        sum(report["records"].values()) == 40
        and report["images"]["distinct"] == 40
        and not report["passed_over"]
    )
    line = json.loads((tmp_path / "root/pretrain/pairs/train.jsonl").read_text().splitlines()[0])
    assert (
        line["image"].startswith("../raw/00000.tar@")
        and content({"image": str(tmp_path / "root" / line["image"])}) == picture()
    )


def test_captions_and_images_of_every_kind(tmp_path):
    members = [
        ("./1.jpg", picture(kind="JPEG")),
        ("./1.txt", "\ufeff one \n"),
        ("1.json", '{"caption": "not this one"}'),
        ("2.WEBP", picture(kind="WEBP")),
        ("2.json", '{"caption": "two"}'),
        ("3.json", '{"caption": null, "text": "three"}'),
        ("3.jpeg", picture(3)),
        ("3.seg.png", b"a mask"),
        ("3.cls", "7"),
        ("._4.jpg", b"a leftover"),
        ("deep/5.png", picture(5)),
        ("deep/5.txt", "five"),
        ("6.json", '{"caption": "not this one"}'),
        ("6.txt", "six"),
        ("6.png", picture(6)),
        ("7.txt", b"caf\xe9"),
        ("7.json", '{"caption": "seven"}'),
        ("7.png", picture(7)),
    ]
    shard(tmp_path / "raw/00000.tar", members)
    found = good(formats.pairs(tmp_path / "raw"))
    assert [record["text"] for record in found] == [
        "one",
        "two",
        "three",
        "five",
        "six",
        "seven",
    ], "./1 and 1 are one key"
    assert [content(record) for record in found[2:]] == [
        picture(3),
        picture(5),
        picture(6),
        picture(7),
    ]


def test_splits_by_shard_by_folder_and_by_key(tmp_path):
    shard(tmp_path / "a/x-train-0000.tar", many(200))
    shard(tmp_path / "a/x-val-0000.tar", pair("v"))
    assert counts(formats.pairs(tmp_path / "a")) == {"train": 200, "val": 1}
    shard(tmp_path / "b/train/00000.tar", many(2))
    shard(tmp_path / "b/validation/00000.tar", many(3))
    found = list(formats.pairs(tmp_path / "b"))
    assert (
        counts(found) == {"train": 2, "val": 3} and len({record["id"] for _, record in found}) == 5
    )
    shard(tmp_path / "c/00000.tar", many(200))
    for split, record in formats.pairs(tmp_path / "c"):
        assert (split == "val") == formats.holdout(record["id"].rpartition("/")[2], 0.05)
    assert {split for split, _ in formats.pairs(tmp_path / "c/00000.tar")} == {"train", "val"}


BROKEN = [
    ("b0.png", picture()),
    ("b1.txt", "no image"),
    ("b2.png", picture()),
    ("b2.json", "{"),
    ("b3.png", picture()),
    ("b3.txt", b"caf\xe9"),
    ("b4.png", b"x" * 5001),
    ("b4.txt", "large"),
    ("b5.png", picture()),
    ("b5.txt", "y" * (tars.MAX_TEXT + 1)),
    ("b6.png", b"no image"),
    ("b6.txt", "six"),
    *pair("b8"),
    *pair("b9"),
    *pair("b8", 9),
]
WANTED = {
    "b0": "no caption",
    "b1": "no image",
    "b2": "not JSON",
    "b3": "not UTF-8",
    "b4": "'b4.png' has 5001 bytes, more than 5000",
    "b5": "'b5.txt' has 1048577 bytes",
    "b6": "'b6.png' cannot be read",
    "b8": "00000.tar has its members in two places",
    "b10": "'b10.png' is a link or a device",
}
"""Members with faults, and what is said of them."""


def test_faults_are_named_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    shard(tmp_path / "00000.tar", [*many(3), *BROKEN], links={"b10.png": "/etc/passwd"})
    found = list(formats.pairs(tmp_path))
    said = {key.removeprefix("00000/"): fault for key, fault in faults(found).items()}
    assert said.keys() == WANTED.keys() and all(WANTED[key] in said[key] for key in WANTED), said
    assert [record["id"] for record in good(found)] == [
        f"00000/{key}" for key in ("0000", "0001", "0002", "b8", "b9")
    ]
    (first,) = (record for record in good(found) if record["id"].endswith("b8"))
    assert content(first) == picture(), "the second record of a key does not replace the first"


def test_names_lead_nowhere_else(tmp_path):
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
    shard(
        tmp_path / "raw/00000.tar",
        [member for i, key in enumerate(keys) for member in pair(key, i)],
    )
    found = good(formats.pairs(tmp_path / "raw"))
    assert len({record["id"] for record in found}) == len(found) == len(keys) - 1, (
        "'...png' has no name before its dot"
    )
    assert {parse_tar_member(record["image"])[0] for record in found} == {
        str(tmp_path / "raw/00000.tar")
    }
    names = [record["id"].removeprefix("00000/") for record in found]
    assert all(
        name.isascii() and len(name) < 120 and not set(name) & set("/\\ \n.") for name in names
    )
    assert {content(record) for record in found} == {picture(i) for i in range(len(keys)) if i != 2}


def cut_after(tar: Path, cut: int) -> int | None:
    """How many records a tar cut at byte `cut` still has for sure, slowly: those before a member of
    another key; None = all."""
    with tarfile.open(tar) as whole:
        members = whole.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    if cut >= end + 512:
        return None
    begun = [member.name.partition(".")[0] for member in members if member.offset_data <= cut]
    return max(0, len(dict.fromkeys(begun)) - 1)


def test_a_cut_at_any_place_keeps_what_came_before_and_is_named(tmp_path):
    whole = shard(tmp_path / "whole.tar", many(3))
    (tmp_path / "raw").mkdir()
    size = whole.stat().st_size
    wanted = good(formats.pairs(shard(tmp_path / "raw/00007.tar", many(3))))
    for cut in sorted({*range(0, size, 256), *range(1, size, 1777), size - 1}):
        (tmp_path / "raw/00007.tar").write_bytes(whole.read_bytes()[:cut])
        found, kept = list(formats.pairs(tmp_path / "raw")), cut_after(whole, cut)
        assert good(found) == wanted[:kept]
        assert list(faults(found)) == ([] if kept is None else ["00007"])
        if kept is not None:
            said = faults(found)["00007"]
            assert (
                f"00007.tar is cut or damaged after {kept} whole records" in said
                and "download it again" in said
            )


def test_damage_in_the_middle_and_what_is_no_tar(tmp_path):
    damaged = bytearray(shard(tmp_path / "00000.tar", many(3)).read_bytes())
    damaged[512 * 6 : 512 * 7] = b"\xff" * 512  # the header of the second picture
    for bad, kept in (
        (bytes(damaged), 0),
        (b"no tar at all" * 100, 0),
        (b"\x1f\x8b" + b"x" * 2000, 0),
    ):
        (tmp_path / "00000.tar").write_bytes(bad)
        found = list(formats.pairs(tmp_path))
        assert (
            len(good(found)) == kept
            and "00000.tar is cut or damaged after 0 whole records" in faults(found)["00000"]
        )


def test_images_come_before_tars(tmp_path):
    """ImageNet's downloads often lie beside what they were unpacked to."""
    shard(tmp_path / "n01.tar", many(1))
    files(tmp_path, {"n01/a.png": None})
    assert [record["id"] for _, record in formats.images(tmp_path)] == ["n01/a.png"]
    assert formats.lies_in_tars(tmp_path, captions=True) and not formats.lies_in_tars(
        tmp_path, captions=False
    )


def test_a_folder_without_tars_is_refused(tmp_path):
    refused(tars.webdataset, tmp_path, "nothing known", "*.tar")


def test_json_of_the_caption_may_be_anything(tmp_path):
    given = ["[]", "3", "null", '"text"', json.dumps({"caption": 3}), "[" * 100_000, "nan"]
    shard(
        tmp_path / "00000.tar",
        [m for i, text in enumerate(given) for m in ((f"{i}.png", picture()), (f"{i}.json", text))],
    )
    found = list(formats.pairs(tmp_path))
    assert len(faults(found)) == len(given) and all(
        "\n" not in fault for fault in faults(found).values()
    )
