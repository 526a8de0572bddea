"""Tars of one class each are classified images without unpacking; other tars are refused."""

import gzip
import io
import tarfile

import pytest

from beit3.data.prepare.formats.detect import read_classified_images, read_images, read_pairs
from beit3.data.prepare.splits import find_image_fault
from tests.data.prepare.test_formats import assert_refused, count_splits
from tests.data.prepare.test_formats_tars import (
    encode_image,
    make_many_members,
    read_image_bytes,
    write_tar,
)


def make_images(name, count=3, color=0):
    return [(f"{name}_{n}.JPEG", encode_image(color + n, "JPEG")) for n in range(count)]


def read_all(raw):
    names, records = read_classified_images(raw)
    return names, list(records)


def test_tars_are_classes_and_their_images_are_read_in_place(tmp_path):
    contents = {name: make_images(name, 3, 10 * n) for n, name in enumerate(("n02", "n01"))}
    for name, members in contents.items():
        write_tar(tmp_path / f"winter21/{name}.tar", [*members, ("LICENSE", "text")])
    (tmp_path / "classes.txt").write_text("n01 tench\nn02 goldfish\n")
    names, pairs = read_all(tmp_path)
    assert names == ("tench", "goldfish")
    images = {record["id"]: record for _, record in pairs if "image" in record}
    assert images.keys() == {f"{name}/{name}_{n}.JPEG" for name in contents for n in range(3)}
    for name, members in contents.items():
        for member, data in members:
            record = images[f"{name}/{member}"]
            assert read_image_bytes(record) == data and record["label"] == (name == "n02")
            assert not find_image_fault(record["image"])
    assert [record["left_out"] for _, record in pairs if "left_out" in record] == ["no suffix"] * 2


def test_split_folders_and_tars_inside_a_tar(tmp_path):
    for split in ("train", "val"):
        for name in ("n1", "field_test"):
            write_tar(tmp_path / f"a/{split}/{name}.tar", make_images(name))
    names, pairs = read_all(tmp_path / "a")
    assert names == ("field test", "n1") and count_splits(pairs) == {"train": 6, "val": 6}
    inner = [
        (f"{name}.tar", write_tar(tmp_path / f"{name}.tar", make_images(name)).read_bytes())
        for name in ("n1", "n2")
    ]
    outer = write_tar(tmp_path / "b/ILSVRC2012_img_train.tar", inner)
    for raw in (tmp_path / "b", outer):
        names, pairs = read_all(raw)
        images = [record for _, record in pairs]
        assert names == ("n1", "n2") and len(images) == 6
        assert read_image_bytes(images[4]) == encode_image(1, "JPEG") and images[4]["label"] == 1


def test_what_names_no_class_or_is_damaged(tmp_path):
    write_tar(tmp_path / "a/images-val.tar", make_images("x"))
    assert_refused(lambda raw: read_all(raw)[1], tmp_path / "a", "images-val.tar", "split")
    write_tar(tmp_path / "b/0000.tar", [("0.cls", "3"), ("0.jpg", encode_image(0, "JPEG"))])
    assert_refused(lambda raw: read_all(raw)[1], tmp_path / "b", "0.cls", "class folders")
    for split in ("train", "val"):
        write_tar(tmp_path / f"c/{split}/{split}ed.tar", make_images("x"))
    assert_refused(lambda raw: read_all(raw)[1], tmp_path / "c", "valed.tar", "training")
    whole = write_tar(tmp_path / "d/n1.tar", make_images("n1")).read_bytes()
    for size in (700, 2500, len(whole) - 10240, 0):
        (tmp_path / "d/n1.tar").write_bytes(whole[:size])
        faults = [record["fault"] for _, record in read_all(tmp_path / "d")[1] if "fault" in record]
        assert len(faults) == 1 and "n1.tar is cut or damaged" in faults[0], size


@pytest.mark.parametrize(
    ("name", "program"), [("a.tar.gz", "gunzip"), ("A.TGZ", "gunzip"), ("a.tar.xz", "unxz")]
)
def test_compressed_tars_are_refused_with_the_remedy(tmp_path, name, program):
    shard = write_tar(tmp_path / "shard.tar", make_many_members(2))
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / name).write_bytes(gzip.compress(shard.read_bytes()))
    remedy = f"`{program} {name}`"
    for path in (raw, raw / name):
        for read in (read_pairs, read_classified_images, read_images):
            if path.is_dir() or read is not read_images:
                assert_refused(read, path, name, remedy)


def test_a_tar_of_a_tar_is_addressed_from_the_beginning_of_the_file():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("x")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    file = io.BytesIO(bytes(512) + buffer.getvalue())
    file.seek(512)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        assert tar.next().offset_data == 1024


def test_a_class_may_be_called_after_a_split_beside_others(tmp_path):
    for name in ("bullet_train", "dog"):
        write_tar(tmp_path / f"{name}.tar", make_images(name))
    assert read_all(tmp_path)[0] == ("bullet train", "dog")
    write_tar(tmp_path / "val.tar", make_images("val"))
    assert_refused(read_classified_images, tmp_path, "val.tar", "split")
    (tmp_path / "val.tar").unlink()
    (tmp_path / "dog.tar").unlink()
    assert_refused(read_classified_images, tmp_path, "bullet_train.tar", "split")
