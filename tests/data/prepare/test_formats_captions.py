"""One record per captioned image: the real samples, COCO's and NoCaps' JSON, tables; what breaks
them is named."""

import json
from pathlib import Path

import pytest

from beit3.data.prepare.formats.captions import read_karpathy
from beit3.data.prepare.formats.detect import read_captioned_images
from tests.data.prepare.test_formats import assert_refused, count_splits, find_sample, write_files


def test_real_flickr8k_is_the_same_in_both_formats_but_for_its_ids(tmp_path):
    raw = find_sample("flickr8k_mini")
    karpathy = list(read_captioned_images(raw))
    for place in ("Flickr8k_text", "Images"):
        (tmp_path / place).symlink_to(raw / place)
    own = list(read_captioned_images(tmp_path))
    assert count_splits(karpathy) == count_splits(own) == {"train": 1200, "val": 150, "test": 150}
    by_name = {Path(record["image"]).name: (split, record) for split, record in own}
    for split, record in karpathy:
        name = Path(record["image"]).name
        assert (split, record["captions"]) == (
            by_name[name][0],
            by_name[name][1]["captions"],
        ) and len(record["captions"]) == 5
        assert record["id"] == str(record["image_id"]) and isinstance(record["image_id"], int)
        assert by_name[name][1]["id"] == by_name[name][1]["image_id"] == name
    assert len({record["id"] for _, record in karpathy}) == 1500
    # The same words as for pretraining, in the same order.
    texts = [text for _, record in karpathy for text in record["captions"]]
    assert texts == [record["text"] for _, record in read_karpathy(raw)]


def test_real_coco():
    raw = find_sample("coco_mini")
    split_records = list(read_captioned_images(raw))
    assert count_splits(split_records) == {"train": 80, "val": 79}
    for split in ("train", "val"):
        data = json.loads((raw / f"annotations/captions_{split}2017.json").read_text())
        texts = {
            image["id"]: [
                row["caption"] for row in data["annotations"] if row["image_id"] == image["id"]
            ]
            for image in data["images"]
        }
        assert {
            record["image_id"]: record["captions"]
            for side, record in split_records
            if side == split
        } == texts
    assert all(
        Path(record["image"]).name == f"{record['image_id']:012d}.jpg"
        and Path(record["image"]).is_file()
        for _, record in split_records
    )


def test_the_world_reads_as_coco_and_karpathy(raw):
    split_records = list(read_captioned_images(raw / "pairs"))
    assert {len(record["captions"]) for _, record in split_records} == {3} and set(
        count_splits(split_records)
    ) == {
        "train",
        "val",
        "test",
    }
    assert all(
        Path(record["image"]).is_file()
        for _, record in [*split_records, *read_captioned_images(raw / "coco")]
    )


SENTENCES = [{"raw": f"text {k}"} for k in range(7)]


def test_karpathy_numbers_and_splits(tmp_path):
    entries = [
        {"filename": "a.jpg", "split": "restval", "imgid": 4, "cocoid": 99, "sentences": SENTENCES},
        {"filename": "b.jpg", "split": "val", "imgid": 5, "sentences": SENTENCES[:1]},
        {"filename": "c.jpg", "split": "test", "sentences": []},
    ]
    write_files(tmp_path, {"dataset_coco.json": {"images": entries}})
    assert list(read_captioned_images(tmp_path)) == [
        (
            "train",
            {
                "id": "99",
                "image": str(tmp_path / "a.jpg"),
                "image_id": 99,
                "captions": [f"text {k}" for k in range(7)],
            },
        ),
        (
            "val",
            {"id": "5", "image": str(tmp_path / "b.jpg"), "image_id": 5, "captions": ["text 0"]},
        ),
        (
            "test",
            {"id": "c.jpg", "image": str(tmp_path / "c.jpg"), "image_id": "c.jpg", "captions": []},
        ),
    ]


def coco(*ids: int, captions: bool = True, **fields) -> dict:
    rows = [
        {"id": 10 * id + k, "image_id": id, "caption": f"{id} {k}"} for k in range(2) for id in ids
    ]
    return {"images": [{"id": id, "file_name": f"{id}.jpg", **fields} for id in ids]} | (
        {"annotations": rows} if captions else {}
    )


def test_nocaps_beside_coco(tmp_path):
    """Trained on COCO, scored on NoCaps, as its rules have it."""
    write_files(
        tmp_path, {"annotations/captions_train2017.json": coco(1, 2), "train2017/1.jpg": None}
    )
    write_files(
        tmp_path,
        {"nocaps_val_4500_captions.json": coco(0, domain="near-domain"), "val/0.jpg": None},
    )
    write_files(
        tmp_path,
        {"nocaps_test_image_info.json": coco(0, captions=False), "images/test/0.jpg": None},
    )
    split_records = {
        (split, record["id"]): record for split, record in read_captioned_images(tmp_path)
    }
    assert split_records.keys() == {("train", "1"), ("train", "2"), ("val", "0"), ("test", "0")}
    assert split_records["train", "1"] == {
        "id": "1",
        "image": str(tmp_path / "train2017/1.jpg"),
        "image_id": 1,
        "captions": ["1 0", "1 1"],
    }
    assert split_records["val", "0"] == {
        "id": "0",
        "image": str(tmp_path / "val/0.jpg"),
        "image_id": 0,
        "captions": ["0 0", "0 1"],
        "domain": "near-domain",
    }
    assert split_records["test", "0"]["captions"] == [] and split_records["test", "0"][
        "image"
    ] == str(tmp_path / "images/test/0.jpg")


def test_coco_without_val_is_held_out(tmp_path):
    split_records = list(
        read_captioned_images(write_files(tmp_path, {"captions_train2014.json": coco(*range(400))}))
    )
    assert (
        5 < count_splits(split_records)["val"] < 40
        and count_splits(split_records)["train"] + count_splits(split_records)["val"] == 400
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (coco(1, captions=False), ["captions_val2017.json has no annotations"]),
        ({"annotations": []}, ["captions_val2017.json has no images"]),
        ([], ["captions_val2017.json has no images"]),
        ({"images": [{"id": 1}], "annotations": []}, ["images[0] has no file_name"]),
        (
            {"images": [], "annotations": [{"image_id": 3, "caption": "x"}]},
            ["image_id 3", "do not list"],
        ),
        (
            {"images": [], "annotations": [{"image_id": 3, "category_id": 1}]},
            ["annotations[0] has no caption"],
        ),
    ],
)
def test_coco_of_another_version(tmp_path, content, words):
    assert_refused(
        read_captioned_images, write_files(tmp_path, {"captions_val2017.json": content}), *words
    )


def test_two_files_for_one_split(tmp_path):
    write_files(
        tmp_path, {"captions_val2017.json": coco(1), "nocaps_val_4500_captions.json": coco(1)}
    )
    assert_refused(
        read_captioned_images,
        tmp_path,
        "captions_val2017.json and nocaps_val_4500_captions.json",
        "both val",
    )


def test_lists_of_images_beside_captions_are_left_out_by_name(tmp_path):
    parts = ["test2017", "test-dev2017", "unlabeled2017", "val2017"]
    lists = {
        f"image_info_{part}.json": {"images": coco(n)["images"]} for n, part in enumerate(parts, 1)
    }
    captions = {f"captions_{part}2017.json": coco(n) for n, part in enumerate(("train", "val"), 7)}
    records = list(read_captioned_images(write_files(tmp_path, lists | captions)))
    left_out = {record["id"] for _, record in records if "left_out" in record}
    assert left_out == {f"image_info_{part}.json" for part in parts[1:]}
    images = [(split, record["id"]) for split, record in records if "image" in record]
    assert {split for split, _ in images} == {"train", "val", "test"}
    write_files(tmp_path, {"image_info_test2014.json": coco(1)})
    assert_refused(read_captioned_images, tmp_path, "image_info_test2014.json", "both test")


def test_tables_with_several_rows_per_image(tmp_path):
    write_files(
        tmp_path,
        {"train.csv": "image,caption\na.png,one\nb.png,two\na.png,three\n,four\n", "a.png": None},
    )
    write_files(
        tmp_path,
        {
            "val.jsonl": '{"id": 7, "image": "a.png", "captions": ["x", "y"]}\n'
            '{"id": 7, "image": "b.png", "text": "z"}\n'
        },
    )
    split_records = list(read_captioned_images(tmp_path))
    assert [(split, record) for split, record in split_records if "fault" not in record] == [
        (
            "train",
            {
                "id": "a.png",
                "image": str(tmp_path / "a.png"),
                "image_id": "a.png",
                "captions": ["one", "three"],
            },
        ),
        (
            "train",
            {
                "id": "b.png",
                "image": str(tmp_path / "b.png"),
                "image_id": "b.png",
                "captions": ["two"],
            },
        ),
        (
            "val",
            {"id": "7", "image": str(tmp_path / "a.png"), "image_id": "7", "captions": ["x", "y"]},
        ),
    ]
    assert [record["fault"] for _, record in split_records if "fault" in record] == [
        "it has no image",
        "7 is the id of another image as well",
    ]
