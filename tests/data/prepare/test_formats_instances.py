"""COCO's and Objects365's objects: the real sample against its JSON, the embedded world, and files
with every known defect."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from beit3.data.loader import RecordDataset
from beit3.data.prepare.formats.detect import read_instances
from beit3.data.prepare.splits import write_splits
from beit3.world.export import write_world
from beit3.world.scene import SHAPES

COCO_MINI = Path(__file__).resolve().parents[4] / "shared" / "data" / "coco_mini"
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def image(number, **changes):
    return {"id": number, "file_name": f"{number:03d}.jpg", "width": 20, "height": 10} | changes


def make_annotation(id, image_id, **changes):
    """An annotation with a mask; segmentation=None takes the mask away."""
    made = {
        "id": id,
        "image_id": image_id,
        "category_id": 3,
        "bbox": [1, 1, 4, 4],
        "area": 16.0,
        "iscrowd": 0,
        "segmentation": SQUARE,
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def write_instances(
    root, images, annotations, *, name="annotations/instances_train2017.json", categories=CATEGORIES
):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


def save_images(root, *names, size=(20, 10)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)


def read(raw):
    """(categories, records by id, what was repaired), faults left out."""
    repaired = Counter()
    categories, pairs = read_instances(raw, repaired=repaired)
    return (
        categories,
        {record["id"]: record for _, record in pairs if "fault" not in record},
        dict(repaired),
    )


def refused(raw, *words):
    with pytest.raises(ValueError) as error:
        list(read_instances(raw)[1])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# The real sample ----------------------------------------------------------------------------------


def test_real_coco_is_what_its_files_say():
    if not COCO_MINI.exists():
        pytest.skip(f"real sample not at hand: {COCO_MINI}")
    repaired = Counter()
    categories, pairs = read_instances(COCO_MINI, repaired=repaired)
    records = list(pairs)
    assert Counter(split for split, _ in records) == {"train": 80, "val": 79} and not repaired
    assert len(categories) == 80 and [category["id"] for category in categories][10:13] == [
        11,
        13,
        14,
    ]
    assert sum(found["crowd"] for _, record in records for found in record["objects"]) == 13
    for split in ("train", "val"):
        content = json.loads((COCO_MINI / f"annotations/instances_{split}2017.json").read_text())
        mine = {record["id"]: record for side, record in records if side == split}
        assert list(mine) == [str(entry["id"]) for entry in content["images"]]
        for record in mine.values():
            with Image.open(record["image"]) as file:
                assert file.size == (record["width"], record["height"])
        found = {
            item["id"]: (record["id"], item)
            for record in mine.values()
            for item in record["objects"]
        }
        assert len(found) == len(content["annotations"])
        for row in content["annotations"]:
            key, item = found[row["id"]]
            assert (
                key == str(row["image_id"])
                and categories[item["label"]]["id"] == row["category_id"]
            )
            same = item["box"], item["area"], item["crowd"], item["segmentation"]
            assert same == (row["bbox"], row["area"], bool(row["iscrowd"]), row["segmentation"])


def test_the_embedded_world_and_back_from_its_records(tmp_path):
    write_world(tmp_path / "world", num_train=60, num_val=50, num_test=1, num_questions=3)
    raw, root = tmp_path / "world" / "coco", tmp_path / "root"
    categories, pairs = read_instances(raw)
    assert [category["name"] for category in categories] == list(SHAPES)
    report = write_splits(root, "coco", "main", pairs)
    assert report["passed_over"] == [] and report["records"] == {"train": 10, "val": 10}
    source = RecordDataset(root / "coco" / "main" / "val.jsonl", root)
    rows = json.loads((raw / "annotations" / "instances_val.json").read_text())["annotations"]
    assert sum(len(source[index]["objects"]) for index in range(len(source))) == len(rows)
    assert all(Path(source[index]["image"]).is_file() for index in range(len(source)))


# COCO's files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["train2017", "images/train2017", "train", "images/train", "images", "."]
)
def test_images_are_found_where_they_usually_lie(tmp_path, place):
    save_images(tmp_path, f"{place}/001.jpg")
    record = read(write_instances(tmp_path, [image(1)], []))[1]["1"]
    assert Path(record["image"]) == tmp_path / place / "001.jpg" and record["objects"] == []


def test_a_file_name_may_hold_a_folder(tmp_path):
    save_images(tmp_path, "images/a/b/1.jpg")
    raw = write_instances(
        tmp_path, [image(1, file_name="a/b/1.jpg")], [], name="instances_train.json"
    )
    assert read(raw)[1]["1"]["image"] == str(tmp_path / "images/a/b/1.jpg")


def test_labels_count_the_sorted_ids_of_all_files(tmp_path):
    write_instances(
        tmp_path,
        [image(1)],
        [make_annotation(1, 1, category_id=7)],
        categories=[{"id": 7, "name": " small \n cat"}],
    )
    write_instances(
        tmp_path,
        [image(2)],
        [make_annotation(1, 2)],
        name="annotations/instances_val2017.json",
        categories=[{"id": 3, "name": "dog"}],
    )
    categories, records, _ = read(tmp_path)
    assert categories == [{"id": 3, "name": "dog"}, {"id": 7, "name": "small cat"}]
    assert records["1"]["objects"][0]["label"] == 1 and records["2"]["objects"][0]["label"] == 0


def test_without_a_val_file_some_images_are_held_out(tmp_path):
    write_instances(tmp_path, [image(id) for id in range(400)], [])
    counts = Counter(split for split, _ in read_instances(tmp_path)[1])
    assert counts["train"] + counts["val"] == 400 and 5 <= counts["val"] <= 40


def test_images_of_the_evaluation_server_have_no_objects(tmp_path):
    """image_info_test2017.json and its part test-dev, both of the pictures in test2017."""
    save_images(tmp_path, *(f"test2017/{number:03d}.jpg" for number in (1, 2, 3)))
    for name, numbers in (("test2017", (1, 2, 3)), ("test-dev2017", (1, 3))):
        content = {
            "info": {},
            "licenses": [],
            "images": [image(number) for number in numbers],
            "categories": CATEGORIES,
        }
        path = tmp_path / "annotations" / f"image_info_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    categories, pairs = read_instances(tmp_path)
    found = [
        (
            split,
            record["id"],
            Path(record["image"]).relative_to(tmp_path).as_posix(),
            "objects" in record,
        )
        for split, record in pairs
    ]
    assert [item["id"] for item in categories] == [3, 7]
    dev = [("test-dev", str(number), f"test2017/{number:03d}.jpg", False) for number in (1, 3)]
    assert sorted(found) == sorted(
        dev + [("test", str(number), f"test2017/{number:03d}.jpg", False) for number in (1, 2, 3)]
    )


def test_masks_that_are_none(tmp_path):
    """Polygons without an inside go, objects go with the last of them; a box without any mask stays
    a box."""
    rle = {"size": [10, 20], "counts": [3, 100, 97]}
    rows = [
        make_annotation(1, 1, segmentation=[[1, 2, 3, 4], *SQUARE, [1, 1, 2, 2, 3, 3, 4]]),
        make_annotation(2, 1, segmentation=[[1, 2, 3, 4]]),
        make_annotation(3, 1, segmentation=[], bbox=[2, 2, 4, 4]),
        make_annotation(4, 1, segmentation=rle, iscrowd=1),
        make_annotation(5, 1, segmentation=rle | {"counts": [3, 100, 96]}),
        make_annotation(6, 1, segmentation=rle | {"size": [20, 10]}),
        make_annotation(7, 1, segmentation=rle | {"counts": "3T3Q3"}),
    ]
    _, records, repaired = read(write_instances(tmp_path, [image(1)], rows))
    objects = {item["id"]: item for item in records["1"]["objects"]}
    assert list(objects) == [1, 3, 4, 7]
    assert objects[1]["segmentation"] == SQUARE and "segmentation" not in objects[3]
    assert objects[4]["segmentation"] == rle and objects[4]["crowd"] and not objects[1]["crowd"]
    assert (
        sorted(repaired.values()) == [1, 2, 3]
        and repaired["polygons of fewer than three points or half a point, dropped"] == 3
    )


def test_boxes_beside_masks_stay_as_evaluators_know_them(tmp_path):
    rows = [
        make_annotation(1, 1, bbox=[-3, 1, 9, 4]),
        make_annotation(2, 1, bbox=[-3, 1, 9, 4]),
        make_annotation(3, 1, area=None),
    ]
    _, records, repaired = read(write_instances(tmp_path, [image(1)], rows))
    assert [item["box"] for item in records["1"]["objects"]] == [
        [-3, 1, 9, 4],
        [-3, 1, 9, 4],
        [1, 1, 4, 4],
    ]
    assert [item["area"] for item in records["1"]["objects"]] == [16, 16, 16] and not repaired


def test_sizes_are_compared_with_the_files(tmp_path):
    save_images(tmp_path, "train/001.jpg", "train/002.jpg")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (10, 20)).save(tmp_path / "train/003.jpg", exif=turned)
    Image.new("RGB", (20, 10)).save(tmp_path / "train/004.jpg", exif=turned)
    raw = write_instances(
        tmp_path, [image(1), image(2, width=10, height=20), image(3), image(4)], []
    )
    report = write_splits(tmp_path / "root", "coco", "main", read_instances(raw)[1], bad_share=0.9)
    assert sum(report["records"].values()) == 2 and len(report["passed_over"]) == 2
    for line, name in zip(report["passed_over"], ("002.jpg", "004.jpg"), strict=True):
        assert name in line and "20 x 10" in line and "10 x 20" in line


# Objects365 ---------------------------------------------------------------------------------------


def objects365(root, images, annotations, split="train"):
    return write_instances(root, images, annotations, name=f"{split}/zhiyuan_objv2_{split}.json")


@pytest.mark.parametrize(
    "place",
    [
        "train/patch8",
        "images/v1/patch8",
        "train/images/v1/patch8",
        "images/train/patch8",
        "train",
        "patch8",
    ],
)
def test_objects365_is_found_as_it_unpacks(tmp_path, place):
    name = "objects365_v1_00420917.jpg"
    save_images(tmp_path, f"{place}/{name}")
    raw = objects365(tmp_path, [image(420917, file_name=f"images/v1/patch8/{name}")], [])
    assert read(raw)[1]["420917"]["image"] == str(tmp_path / place / name)


def test_every_defect_of_objects365_is_repaired_and_counted(tmp_path):
    def box(id, image_id=1, **changes):
        return make_annotation(id, image_id, segmentation=None, **changes)

    rows = [
        box(0),  # an id that evaluators take for "no match"
        box(5, bbox=[-2, 4, 30, 30]),  # beyond the image on three sides
        box(5, bbox=[18, 2, 2.005, 3]),  # beyond by rounding
        box(6, bbox=[3, 3, 0, 4]),  # empty
        box(7, bbox=[25, 3, 4, 4]),  # empty once clipped
        box(8),  # the first again
        box(9, category_id=7),  # another class in the same place
        box(10, iscrowd=1),  # a crowd in the same place
        box(11, image_id=99),
        box(12, category_id=99),
    ]
    raw = objects365(tmp_path, [image(1), image(1), image(2)], rows)
    categories, pairs = read_instances(raw, repaired=(repaired := Counter()))
    records = [record for _, record in pairs]
    assert [category["name"] for category in categories] == ["dog", "cat"]
    objects = records[0]["objects"]
    assert [item["id"] for item in objects] == [1, 2, 3, 7, 8], (
        "numbered from 1 in the order of the file"
    )
    assert [item["box"] for item in objects] == [
        [1, 1, 4, 4],
        [0, 4, 20, 6],
        [18, 2, 2.005, 3],
        [1, 1, 4, 4],
        [1, 1, 4, 4],
    ]
    assert [item["area"] for item in objects] == [16, 120, 16, 16, 16], (
        "that of the box where it was clipped"
    )
    assert [(item["label"], item["crowd"]) for item in objects[-2:]] == [(1, False), (0, True)]
    assert records[1]["fault"] and records[2]["objects"] == []
    assert repaired == {
        "annotation ids below 1 or repeated, for which all were numbered from 1": 2,
        "boxes beyond the image, clipped to it": 2,
        "empty boxes, dropped": 2,
        "boxes that repeat another, dropped": 1,
        "annotations of images that are not listed, dropped": 1,
        "annotations of categories that are not listed, dropped": 1,
    }


def test_missing_images_are_named_and_passed_over(tmp_path):
    save_images(tmp_path, "train/patch0/a.jpg")
    names = ["images/v1/patch0/a.jpg", "images/v1/patch0/b.jpg"]
    raw = objects365(tmp_path, [image(id, file_name=name) for id, name in enumerate(names)], [])
    report = write_splits(
        tmp_path / "root", "coco", "objects365", read_instances(raw)[1], bad_share=0.5
    )
    assert sum(report["records"].values()) == 1 and len(report["passed_over"]) == 1
    assert (
        "b.jpg is missing" in report["passed_over"][0]
        and "train/patch0" in report["passed_over"][0]
    )


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, rows, words",
    [
        ([image(1, width=0)], [], ["images[0]", "0 x 10"]),
        ([image(1, id="1")], [], ["images[0]", "id (int)"]),
        ([image(1, file_name=None)], [], ["images[0]", "file_name"]),
        ([image(1)], [3], ["annotations[0]", "image_id"]),
        ([image(1)], [make_annotation(1, 1, bbox=[1, 2, 3])], ["annotations[0]", "[1, 2, 3]"]),
        (
            [image(1)],
            [make_annotation(1, 1, bbox=[1, 2, 3, float("nan")])],
            ["annotations[0]", "nan"],
        ),
        ([image(1)], [make_annotation(1, 1, bbox=[1, 2, 3, 10**400])], ["annotations[0]", "bbox"]),
        ([image(1)], [make_annotation(1, 1, iscrowd="no")], ["annotations[0]", "iscrowd 'no'"]),
        (
            [image(1)],
            [make_annotation(1, 1, segmentation=[1, 2, 3])],
            ["annotations[0]", "segmentation"],
        ),
        (
            [image(1)],
            [make_annotation(1, 1, segmentation=[["a"] * 6])],
            ["annotations[0]", "segmentation"],
        ),
        (
            [image(1)],
            [make_annotation(1, 2), make_annotation(2, 2)],
            ["2 annotations", "does not list"],
        ),
    ],
)
def test_what_is_not_of_the_format_is_named(tmp_path, images, rows, words):
    refused(write_instances(tmp_path, images, rows), "instances_train2017.json", *words)


@pytest.mark.parametrize(
    "categories, words",
    [
        ([], ["no categories"]),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "a"}], ["categories[1]", "id 1"]),
        ([{"id": 1, "name": " "}], ["categories[0]"]),
        ([{"id": 1, "name": "a\x1b[2J"}], ["categories[0]", "printed"]),
        ([{"id": 3, "name": "wolf"}], ["instances_val.json", "wolf", "dog"]),
    ],
)
def test_categories_that_are_refused(tmp_path, categories, words):
    if words[0] == "instances_val.json":
        write_instances(tmp_path, [image(1)], [])
        write_instances(
            tmp_path, [image(2)], [], name="annotations/instances_val.json", categories=categories
        )
    else:
        write_instances(tmp_path, [image(1)], [], categories=categories)
    refused(tmp_path, *words)


def test_folders_that_are_refused(tmp_path):
    refused(tmp_path / "absent", "absent")
    refused(tmp_path, "instances_*.json", "zhiyuan_objv2_*.json")
    write_instances(tmp_path, [image(1)], [])
    write_instances(tmp_path, [image(1)], [], name="instances_train2014.json")
    refused(tmp_path, "instances_train2014.json", "instances_train2017.json", "both train")
