"""Objects in the formats of LVIS, Roboflow, Label Studio and Pascal VOC, and their faults."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit3.data.prepare.formats.detect import read_instances
from beit3.data.prepare.formats.objects import ObjectCleaner
from beit3.data.stores.rle import encode_rle

SIZE = (24, 20)  # width, height
POLYGON = [[1, 1, 6, 1, 6, 6, 1, 6]]


def save_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(root / name)


def write_json(path, images, annotations, categories):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def make_image(id, **fields):
    return {"id": id, "width": SIZE[0], "height": SIZE[1]} | fields


def make_annotation(id, image_id, category_id, **fields):
    box = {"bbox": [1, 1, 5, 5], "area": 25.0, "segmentation": POLYGON}
    return {"id": id, "image_id": image_id, "category_id": category_id} | box | fields


def read(raw):
    """Returns the class names, the records by (split, id), and the repairs."""
    repaired = Counter()
    categories, pairs = read_instances(raw, repaired=repaired)
    records = {(split, record["id"]): record for split, record in pairs}
    return [category["name"] for category in categories], records, dict(repaired)


def read_labels(record):
    return [item["label"] for item in record["objects"]]


def assert_refused(raw, *words):
    with pytest.raises(ValueError) as error:
        list(read_instances(raw)[1])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# Files of COCO's format ---------------------------------------------------------------------------


def test_lvis_names_its_images_by_url(tmp_path):
    """Images of train2017 may belong to LVIS's val."""
    categories = [
        {"id": 2, "name": "zebra", "synonyms": ["zebra"], "frequency": "f"},
        {"id": 1, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"]},
    ]
    url = "http://images.cocodataset.org/train2017/000000000009.jpg"
    images = [make_image(9, coco_url=url, neg_category_ids=[1], not_exhaustive_category_ids=[])]
    for split in ("train", "val"):
        path = tmp_path / f"lvis_v1_{split}.json"
        write_json(path, images, [make_annotation(1, 9, 2)], categories)
    save_images(tmp_path, "train2017/000000000009.jpg")
    names, records, repaired = read(tmp_path)
    assert names == ["aerosol_can", "zebra"] and not repaired
    assert set(records) == {("train", "9"), ("val", "9")}
    record = records["val", "9"]
    assert Path(record["image"]) == tmp_path / "train2017/000000000009.jpg"
    assert read_labels(record) == [1] and record["objects"][0]["segmentation"] == POLYGON
    (tmp_path / "lvis_v1_val.json").rename(tmp_path / "lvis_v1.json")
    assert_refused(tmp_path, "lvis_v1.json", "tells no split")


def test_roboflow_has_its_images_beside_the_files(tmp_path):
    """The category of the whole project is left out and counted."""
    categories = [
        {"id": 0, "name": "cat", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cat"},
        {"id": 2, "name": "dog", "supercategory": "cat"},
    ]
    for folder in ("train", "valid", "test"):
        images = [make_image(number, file_name=f"{folder}{number}.jpg") for number in range(2)]
        annotations = [make_annotation(1, 0, 2, segmentation=[]), make_annotation(2, 1, 1)]
        path = tmp_path / folder / "_annotations.coco.json"
        write_json(path, images, annotations, categories)
        save_images(tmp_path, *(f"{folder}/{folder}{number}.jpg" for number in range(2)))
    names, records, repaired = read(tmp_path)
    assert names == ["cat", "dog"]
    assert repaired == {"categories that stand for the whole project, left out": 1}
    assert Counter(split for split, _ in records) == {"train": 2, "val": 2, "test": 2}
    assert all(Path(record["image"]).is_file() for record in records.values())
    assert read_labels(records["val", "0"]) == [1] and read_labels(records["val", "1"]) == [0]
    (tmp_path / "valid").rename(tmp_path / "fold2")
    assert_refused(tmp_path, "fold2", "rename")


@pytest.mark.parametrize(
    "name",
    [
        "images/3f-a.jpg",
        "images\\3f-a.jpg",
        "3f-a.jpg",
        "upload/1/3f-a.jpg",
        "../../label-studio/data/media/upload/1/3f-a.jpg",
        "http://localhost:8080/data/upload/1/3f-a.jpg",
        "/data/local-files/?d=photos/3f-a.jpg",
        "/data/upload/1/3f%2Da.jpg",
    ],
)
def test_label_studio_names_images_in_many_ways(tmp_path, name):
    save_images(tmp_path, "images/3f-a.jpg")
    images, annotations = [make_image(0, file_name=name)], [make_annotation(0, 0, 0)]
    write_json(tmp_path / "result.json", images, annotations, [{"id": 0, "name": "cat"}])
    names, records, _ = read(tmp_path)
    ((_, record),) = records.items()
    assert names == ["cat"] and Path(record["image"]) == tmp_path / "images/3f-a.jpg"
    assert read_labels(record) == [0]


def test_one_image_for_two_names_is_a_fault(tmp_path):
    save_images(tmp_path, "images/a.jpg")
    images = [make_image(number, file_name=f"upload/{number}/a.jpg") for number in range(2)]
    write_json(tmp_path / "result.json", images, [], [{"id": 0, "name": "cat"}])
    faults = [record["fault"] for record in read(tmp_path)[1].values() if "fault" in record]
    assert len(faults) == 1 and "upload/1/a.jpg and upload/0/a.jpg" in faults[0]


def test_runs_in_a_string_must_fill_the_image():
    rng = torch.Generator().manual_seed(0)
    cleaner = ObjectCleaner({0: 0}, Counter())
    for size in range(1, 60):
        mask = (torch.rand(size, 61 - size, generator=rng) < 0.3).to(torch.uint8)
        rle = encode_rle(mask)
        assert cleaner.clean_mask(rle, "", 61 - size, size) == rle
    assert not cleaner.repaired
    for counts in ("", "garbage!", rle["counts"][:-1], rle["counts"] + "1", "o" * 50):
        assert cleaner.clean_mask(rle | {"counts": counts}, "", 2, 59) is None
    assert cleaner.repaired.total() == 5


# Pascal VOC ---------------------------------------------------------------------------------------


def make_object(name, box=(1, 1, 24, 20), more=""):
    fields = ("xmin", "ymin", "xmax", "ymax")
    sides = "".join(f"<{key}>{side}</{key}>" for key, side in zip(fields, box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def make_xml(*objects, size=SIZE):
    width, height = size
    sizes = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>no.jpg</filename>{sizes}{''.join(objects)}</annotation>"


def write_voc(root, files, **lists):
    """Writes XML files by stem and their images, and lists of stems."""
    for stem, content in files.items():
        path = root / f"Annotations/{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        save_images(root, f"JPEGImages/{stem}.jpg")
    for name, stems in lists.items():
        path = root / f"ImageSets/Main/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in stems))
    return root


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2007"])
def test_voc_counts_pixels_from_1_and_marks_difficult_objects(tmp_path, above):
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    first = make_xml(
        make_object("dog", (3, 2, 10, 9)),
        make_object("cat", more=f"<difficult>1</difficult>{part}"),
    )
    files = {"a": first, "b": make_xml(make_object("cat", (2.5, 1, 9, 9))), "c": make_xml()}
    write_voc(tmp_path / above, files, train=["a", "c"], val=["b"], cat_train=["a  1"])
    names, records, repaired = read(tmp_path)
    assert names == ["cat", "dog"] and not repaired
    assert set(records) == {("train", "a"), ("train", "c"), ("val", "b")}
    objects = records["train", "a"]["objects"]
    assert [(item["box"], item["label"], item["crowd"]) for item in objects] == [
        ([2.0, 1.0, 8.0, 8.0], 1, False),
        ([0.0, 0.0, 24.0, 20.0], 0, True),
    ]
    assert records["val", "b"]["objects"][0]["box"] == [1.5, 0.0, 7.5, 9.0]
    assert records["train", "c"]["objects"] == []
    ids = [item["id"] for record in records.values() for item in record["objects"]]
    assert sorted(ids) == [1, 2, 3]


def test_voc_lists_decide_what_is_read(tmp_path):
    files = {stem: make_xml(make_object("cat")) for stem in "abc"}
    write_voc(tmp_path, files, trainval=["a"], test=["t"])
    save_images(tmp_path, "JPEGImages/t.jpg")
    _, records, repaired = read(tmp_path)
    assert repaired == {"annotation files that no list names, passed over": 2}
    assert len(records) == 2 and "objects" not in records["test", "t"]
    write_voc(tmp_path, {}, train=["a"], val=["a"])
    assert_refused(tmp_path, "has a in train.txt and in val.txt")
    write_voc(tmp_path, {}, val=["missing"])
    assert "missing.xml are missing" in read(tmp_path)[1]["val", "missing"]["fault"]
    write_voc(tmp_path / "VOC2007", files)
    assert_refused(tmp_path, "VOC2007", "give one of them")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (make_xml()[:40], "is not VOC's XML"),
        (b"", "no element found"),
        (bytes(range(256)), "is not VOC's XML"),
        ("<html></html>", "no annotation of VOC"),
        ('<!DOCTYPE a [<!ENTITY b "bbb">]><annotation>&b;</annotation>', "document type"),
        (
            '<!DOCTYPE a [<!ENTITY b "bbb">]><annotation>&b;</annotation>'.encode("utf-16"),
            "document type",
        ),
        ('<?xml version="1.0" encoding="nothing"?><annotation/>', "unknown encoding"),
        (make_xml(make_object("")), "object 1 has no name"),
        (make_xml("<object><name>cat</name></object>"), "has no bndbox"),
        (make_xml(make_object("cat", ("a", 1, 2, 3))), "xmin 'a'"),
        (make_xml(make_object("cat", (1, 1, "nan", 3))), "xmax 'nan'"),
        (make_xml(make_object("cat", (1, 1, 3, 10**9))), "ymax '1000000000'"),
        (make_xml(make_object("cat", more="<difficult>yes</difficult>")), "difficult 'yes'"),
    ],
)
def test_an_unreadable_xml_file_is_the_fault_of_its_image(tmp_path, content, words):
    write_voc(tmp_path, {"a": make_xml(make_object("cat")), "b": content})
    _, records, _ = read(tmp_path)
    faults = [record["fault"] for record in records.values() if "fault" in record]
    assert len(faults) == 1 and words in faults[0] and "b.xml" in faults[0]
    assert "\n" not in faults[0]


def test_voc_boxes_beyond_the_image_are_clipped_and_empty_ones_dropped(tmp_path):
    objects = [
        make_object("cat", (0, 0, 23, 19)),  # counted from 0
        make_object("cat", (30, 30, 40, 40)),
        make_object("cat", (9, 9, 3, 12)),
    ]
    write_voc(tmp_path, {"a": make_xml(*objects, size=(0, 0))})
    _, records, repaired = read(tmp_path)
    ((_, record),) = records.items()
    assert (record["width"], record["height"]) == SIZE, "taken from the image"
    assert [item["box"] for item in record["objects"]] == [[0.0, 0.0, 23.0, 19.0]]
    assert repaired == {"boxes beyond the image, clipped to it": 2, "empty boxes, dropped": 2}


def test_vocs_own_images_have_its_20_classes(tmp_path):
    """A part of the dataset, as its test split, must not have labels of its own."""
    write_voc(tmp_path, {"000005": make_xml(make_object("tvmonitor"))}, test=["000005"])
    names, records, _ = read(tmp_path)
    assert len(names) == 20 and names == sorted(names)
    assert read_labels(records["test", "000005"]) == [19]


def test_voc_without_a_named_object_is_refused(tmp_path):
    write_voc(tmp_path, {"a": make_xml()})
    assert_refused(tmp_path, "name no object")
