"""Tar shards: a real one of img2dataset, and small ones made here, among them cut, damaged and hostile ones."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from beit3.data import formats
from beit3.data.formats import tars
from beit3.data.prepare import write_splits
from tests.data.test_formats import counts, files, refused, sample


def picture(color: int = 0, kind: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(written, kind)
    return written.getvalue()


def shard(path: Path, members: list[tuple[str, bytes | str]], *, links: dict[str, str] | None = None) -> Path:
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
    return [(f"{key}.png", picture(color)), (f"{key}.json", "{}"), (f"{key}.txt", f"caption of {key}")]


def many(count: int) -> list[tuple[str, bytes | str]]:
    return [member for i in range(count) for member in pair(f"{i:04d}", i % 250)]


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_real_shard(tmp_path):
    raw = sample("cc12m_webdataset")
    report = write_splits(tmp_path, "pretrain", "pairs", formats.pairs(raw, unpack=tmp_path / "pretrain/pairs/images"))
    assert report["records"] == {"train": 26, "val": 6} and report["passed_over"] == [] and report["images"]["distinct"] == 32
    found = {record["id"]: record for _, record in formats.pairs(raw, unpack=tmp_path / "again")}
    assert formats.detect(raw) == "webdataset" and len(found) == 32
    # Against the tar as a whole, read at random: same bytes, same captions.
    with tarfile.open(raw / "cc12m-train-0000.tar") as tar:
        for name in tar.getnames():
            key, _, ending = name.partition(".")
            record, content = found[f"cc12m-train-0000/{key}"], tar.extractfile(name).read()
            if ending == "jpg":
                assert Path(record["image"]).read_bytes() == content and record["image"].endswith(f"again/cc12m-train-0000/{name}")
            elif ending == "txt":
                assert record["text"] == content.decode().strip()
    alone = list(formats.images(raw, unpack=tmp_path / "again"))
    assert [(record["id"], record["image"]) for _, record in alone] == [(record["id"], record["image"]) for record in found.values()]
    assert all("text" not in record for _, record in alone)


def test_captions_and_images_of_every_kind(tmp_path):
    members = [
        ("./1.jpg", picture(kind="JPEG")), ("./1.txt", "\ufeff one \n"), ("1.json", '{"caption": "not this one"}'),
        ("2.WEBP", picture(kind="WEBP")), ("2.json", '{"caption": "two"}'),
        ("3.json", '{"caption": null, "text": "three"}'), ("3.jpeg", b"x"), ("3.seg.png", b"a mask"),
        ("3.cls", "7"), ("._4.jpg", b"a leftover"), ("deep/5.png", picture()), ("deep/5.txt", "five"),
    ]  # fmt: skip
    shard(tmp_path / "raw/00000.tar", members)
    found = [(r["text"], Path(r["image"]).name) for _, r in formats.pairs(tmp_path / "raw", unpack=tmp_path / "out")]
    assert [text for text, _ in found] == ["one", "two", "three", "five"]
    assert [name for _, name in found[:3]] == ["1.jpg", "2.webp", "3.jpeg"], "./1 and 1 are one key"
    assert len(below(tmp_path / "out")) == 4 and (tmp_path / "out/00000/3.jpeg").read_bytes() == b"x"


def test_splits_by_shard_by_folder_and_by_key(tmp_path):
    shard(tmp_path / "a/x-train-0000.tar", many(200))
    shard(tmp_path / "a/x-val-0000.tar", pair("v"))
    assert counts(formats.pairs(tmp_path / "a", unpack=tmp_path / "out")) == {"train": 200, "val": 1}
    shard(tmp_path / "b/train/00000.tar", many(2))
    shard(tmp_path / "b/validation/00000.tar", many(3))
    found = list(formats.pairs(tmp_path / "b", unpack=tmp_path / "out"))
    assert counts(found) == {"train": 2, "val": 3} and len({record["image"] for _, record in found}) == 5
    shard(tmp_path / "c/00000.tar", many(200))
    for split, record in formats.pairs(tmp_path / "c", unpack=tmp_path / "out"):
        assert (split == "val") == formats.holdout(record["id"].rpartition("/")[2], 0.05)
    assert {split for split, _ in formats.pairs(tmp_path / "c/00000.tar", unpack=tmp_path / "out")} == {"train", "val"}


def test_a_second_time_writes_the_same(tmp_path):
    shard(tmp_path / "raw/00000.tar", many(120))

    def prepared() -> dict[str, bytes]:
        pairs = formats.pairs(tmp_path / "raw", unpack=tmp_path / "root/pretrain/pairs/images")
        assert sum(write_splits(tmp_path / "root", "pretrain", "pairs", pairs)["records"].values()) == 120
        return below(tmp_path / "root")

    first = prepared()
    (tmp_path / "root/pretrain/pairs/images/00000/0003.png").write_bytes(b"half an ima")
    assert prepared() == first and len(first) == 122


def test_faults_are_counted_named_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    broken = [
        ("b0.png", picture()), ("b1.txt", "no image"), ("b2.png", picture()), ("b2.json", "{"),
        ("b3.png", picture()), ("b3.txt", b"caf\xe9"),
        ("b4.png", b"x" * 5001), ("b4.txt", "large"), ("b5.png", picture()), ("b5.txt", "y" * (tars.MAX_TEXT + 1)), ("b6.png", b"no image"),
        ("b6.txt", "six"), ("b7.png", picture()), ("b7.txt", "  "), *pair("b8"), *pair("b9"), *pair("b8", 9),
    ]  # fmt: skip
    shard(tmp_path / "raw/00000.tar", [*many(1000), *broken], links={"b10.png": "/etc/passwd"})
    report = write_splits(tmp_path, "pretrain", "pairs", formats.pairs(tmp_path / "raw", unpack=tmp_path / "images"))
    assert sum(report["records"].values()) == 1002
    said = dict(line.removeprefix("00000/").split(": ", 1) for line in report["passed_over"])
    wanted = {
        "b0": "no caption", "b1": "no image", "b2": "not JSON", "b3": "not UTF-8", "b4": "'b4.png' has 5001 bytes, more than 5000",
        "b5": "'b5.txt' has 1048577 bytes", "b6": "cannot be read", "b7": "its text is empty",
        "b8": "00000.tar has its members in two places", "b10": "'b10.png' is a link or a device",
    }  # fmt: skip
    assert said.keys() == wanted.keys() and all(wanted[key] in said[key] for key in wanted), said
    assert (tmp_path / "images/00000/b8.png").read_bytes() == picture(), "the second record of a key does not replace the first"


def test_names_lead_nowhere_else(tmp_path):
    keys = ["../../escaped", "/absolute", "..", "a/../../b", "a b", "ä", "ö", "x" * 300, "\n", "-rf", "CON\\c"]
    shard(tmp_path / "raw/00000.tar", [member for i, key in enumerate(keys) for member in pair(key, i)])
    found = list(formats.pairs(tmp_path / "raw", unpack=tmp_path / "deep/down/out"))
    assert len(found) == len(keys) - 1, "'...png' has no name before its dot"
    assert len({record["id"] for _, record in found}) == len(found) == len(below(tmp_path / "deep/down/out/00000"))
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "deep"}
    names = [Path(record["image"]).name for _, record in found]
    assert all(name.isascii() and len(name) < 120 and not set(name) & set("/\\ \n") for name in names)


def cut_after(tar: Path, cut: int) -> int | None:
    """How many records a tar cut at byte `cut` still has for sure, slowly: those before a member of another key; None = all."""
    with tarfile.open(tar) as whole:
        members = whole.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    if cut >= end + 512:
        return None
    begun = [member.name.partition(".")[0] for member in members if member.offset_data <= cut]
    return max(0, len(dict.fromkeys(begun)) - 1)


def test_a_cut_at_any_place_is_named_with_what_came_before(tmp_path):
    whole = shard(tmp_path / "whole.tar", many(3))
    content = whole.read_bytes()
    (tmp_path / "raw").mkdir()
    cuts = {*range(0, len(content), 256), *range(1, len(content), 1777), len(content) - 1}
    for cut in sorted(cuts):
        (tmp_path / "raw/00007.tar").write_bytes(content[:cut])
        wanted = cut_after(whole, cut)
        if wanted is None:
            assert len(list(formats.pairs(tmp_path / "raw", unpack=tmp_path / "out"))) == 3
        else:
            words = ["raw/00007.tar is cut or damaged", f"after {wanted} whole records", "no records were written: download it again"]
            refused(lambda raw: formats.pairs(raw, unpack=tmp_path / "out"), tmp_path / "raw", *words)


def test_a_cut_shard_leaves_older_records_alone(tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "root"
    shard(raw / "00000.tar", many(40))
    shard(raw / "00001.tar", many(40))
    (raw / "00001.tar").write_bytes((raw / "00001.tar").read_bytes()[: 60 * 512])
    files(root, {"pretrain/pairs/train.jsonl": '{"id": "older"}\n'})
    with pytest.raises(ValueError, match=r"00001\.tar is cut or damaged after \d+ whole records"):
        write_splits(root, "pretrain", "pairs", formats.pairs(raw, unpack=root / "pretrain/pairs/images"))
    assert (root / "pretrain/pairs/train.jsonl").read_text() == '{"id": "older"}\n'
    assert [path.name for path in (root / "pretrain/pairs").iterdir() if path.is_file()] == ["train.jsonl"]
    assert not list(root.rglob("*.partial"))


def test_damage_in_the_middle_and_what_is_no_tar(tmp_path):
    content = bytearray(shard(tmp_path / "00000.tar", many(3)).read_bytes())
    content[5120:5632] = b"\xff" * 512  # a header, or the picture before it
    for bad in (bytes(content), b"no tar at all" * 100, b"\x1f\x8b" + b"x" * 2000):
        (tmp_path / "00000.tar").write_bytes(bad)
        refused(lambda raw: formats.pairs(raw, unpack=tmp_path / "out"), tmp_path, "00000.tar is cut or damaged")


def test_a_folder_to_unpack_into_is_asked_for(tmp_path):
    shard(tmp_path / "00000.tar", many(1))
    for reader in (formats.pairs, formats.images):
        refused(reader, tmp_path, "holds tar files", "unpack=DIR")


def test_images_come_before_tars(tmp_path):
    """ImageNet's downloads often lie beside what they were unpacked to."""
    shard(tmp_path / "n01.tar", many(1))
    files(tmp_path, {"n01/a.png": None})
    assert [record["id"] for _, record in formats.images(tmp_path)] == ["n01/a.png"]


def test_json_of_the_caption_may_be_anything(tmp_path):
    given = ["[]", "3", "null", '"text"', json.dumps({"caption": 3}), "[" * 100_000, "nan"]
    shard(tmp_path / "00000.tar", [m for i, text in enumerate(given) for m in ((f"{i}.png", picture()), (f"{i}.json", text))])
    found = [record for _, record in formats.pairs(tmp_path, unpack=tmp_path / "out")]
    assert len(found) == len(given) and all("fault" in record and "\n" not in record["fault"] for record in found)
