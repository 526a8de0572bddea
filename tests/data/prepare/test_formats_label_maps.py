"""Folders of label maps: the real samples, the embedded world, made-up folders of each layout, and
what is wrong with them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.data.loader import RecordDataset
from beit3.data.prepare.formats.detect import read_label_maps
from beit3.data.prepare.formats.label_maps import CAMVID_CLASSES, CITYSCAPES_CLASSES
from beit3.data.prepare.splits import write_splits
from beit3.world.export import write_world

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
SIZE = (6, 4)  # width, height


def find_sample(name):
    if not (DATA / name).exists():
        pytest.skip(f"real sample not available: {DATA / name}")
    return DATA / name


def write_images(root, *names, size=SIZE):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)


def write_label_maps(root, *names, numbers=1, dtype=np.uint8, size=SIZE):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size[::-1], numbers, dtype)).save(root / name)


def assert_refused(raw, *words):
    with pytest.raises(ValueError) as error:
        read_label_maps(raw)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# The real samples ---------------------------------------------------------------------------------


def test_real_ade20k_is_read():
    names, options, pairs = read_label_maps(find_sample("ade20k_sample"))
    records = list(pairs)
    assert (
        len(names) == len(set(names)) == 150
        and names[:3] == ("wall", "building", "sky")
        and names[149] == "flag"
    )
    assert options == {"reduce_zero": True, "ignore": 255}
    assert [(split, record["id"]) for split, record in records] == [
        ("val", f"ADE_val_{number:08d}") for number in (1, 2, 3)
    ]
    for _, record in records:
        assert (
            set(record) == {"id", "image", "label_map"}
            and record["image"].endswith(".jpg")
            and record["label_map"].endswith(".png")
        )
        assert 0 < np.asarray(Image.open(record["label_map"])).max() <= 150


def test_real_camvid_is_read():
    names, options, pairs = read_label_maps(find_sample("camvid_mini"))
    records = list(pairs)
    assert names == CAMVID_CLASSES and options == {"reduce_zero": False, "ignore": 11}
    assert Counter(split for split, _ in records) == {"train": 180, "val": 50} and not any(
        "fault" in record for _, record in records
    )
    assert max(np.asarray(Image.open(record["label_map"])).max() for _, record in records) == 11
    for _, record in records:
        assert Path(record["image"]).stem == Path(record["label_map"]).stem == record["id"]


def test_the_embedded_world_is_read_and_prepared(tmp_path):
    write_world(tmp_path / "world", num_train=60, num_val=50, num_test=1, num_questions=3)
    names, options, pairs = read_label_maps(tmp_path / "world" / "ade20k")
    root = tmp_path / "root"
    report = write_splits(root, "ade20k", "main", pairs)
    assert (
        report["records"] == {"train": 10, "val": 10}
        and report["images"]["distinct"] == 20
        and not report["passed_over"]
    )
    record = RecordDataset(root / "ade20k" / "main" / "val.jsonl", root)[0]
    assert Path(record["image"]).is_file() and Path(record["label_map"]).is_file()
    largest = max(
        np.asarray(Image.open(path)).max()
        for path in (tmp_path / "world" / "ade20k" / "annotations").rglob("*.png")
    )
    assert options["reduce_zero"] and len(names) >= largest


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016/"])
def test_ade20k_takes_names_from_lists_or_numbers(tmp_path, above):
    raw = tmp_path / above
    write_images(raw, "images/training/a.jpg", "images/training/b.PNG", "images/validation/a.png")
    write_label_maps(
        raw,
        "annotations/training/a.png",
        "annotations/training/b.png",
        "annotations/validation/a.png",
        numbers=3,
    )
    write_label_maps(raw, "annotations/training/b.png", numbers=255)
    names, options, pairs = read_label_maps(tmp_path)
    assert names == ("1", "2", "3") and options == {"reduce_zero": True, "ignore": 255}
    assert [(split, record["id"]) for split, record in pairs] == [
        ("train", "a"),
        ("train", "b"),
        ("val", "a"),
    ]
    (raw / "classes.txt").write_text("wall\nlarge  tree\nsky\nsea\n")
    assert read_label_maps(tmp_path)[0] == ("wall", "large tree", "sky", "sea")
    (raw / "classes.txt").write_text("0 wall\n1 tree\n2 sky\n")
    assert read_label_maps(tmp_path)[0] == ("wall", "tree", "sky")
    (raw / "classes.txt").write_text("wall\n\ntree\nsky\n")
    assert_refused(tmp_path, "classes.txt line 2 is blank")
    (raw / "objectInfo150.txt").write_text(
        "Idx\tRatio\tName\n1\t.1\tscreen, crt \n2\t.1\tscreen, door\n3\t.1\ttree, plant\n"
    )
    assert read_label_maps(tmp_path)[0] == ("screen, crt", "screen, door", "tree")


def test_camvid_may_lack_val_and_test_labels(tmp_path):
    stems = [f"{number:03d}" for number in range(200)]
    write_images(tmp_path, *(f"train/{stem}.png" for stem in stems), "test/x.jpg")
    write_label_maps(
        tmp_path, *(f"trainannot/{stem}.png" for stem in stems), "trainannot/of_no_image.png"
    )
    (tmp_path / "classes.txt").write_text("sea\nland\n")
    names, options, pairs = read_label_maps(tmp_path)
    counts = Counter(split for split, _ in read_label_maps(tmp_path)[2])
    assert names == ("sea", "land") and options == {"reduce_zero": False, "ignore": 2}
    assert counts["train"] + counts["val"] == 200 and 2 <= counts["val"] <= 25
    assert dict(pairs)["test"] == {"id": "x", "image": str(tmp_path / "test/x.jpg")}
    write_label_maps(tmp_path, "testannot/x.png")
    assert dict(read_label_maps(tmp_path)[2])["test"]["label_map"] == str(
        tmp_path / "testannot/x.png"
    )


def test_cityscapes_is_read_by_train_ids_or_by_its_ids(tmp_path):
    stem = "aachen/aachen_000000_000019"
    for split in ("train", "val", "test"):
        write_images(tmp_path, f"leftImg8bit/{split}/{stem}_leftImg8bit.png")
        write_label_maps(
            tmp_path,
            f"gtFine/{split}/{stem}_gtFine_labelIds.png",
            f"gtFine/{split}/{stem}_gtFine_instanceIds.png",
            numbers=7,
        )
    names, options, pairs = read_label_maps(tmp_path)
    records = dict(pairs)
    assert names == tuple(CITYSCAPES_CLASSES) and len(names) == 19
    lookup = options["lookup"]
    assert len(lookup) == 34 and [lookup[number] for number in (0, 7, 8, 9, 24, 31, 33)] == [
        255,
        0,
        1,
        255,
        11,
        16,
        18,
    ]
    assert sorted(set(lookup)) == [*range(19), 255]
    assert records["val"]["id"] == stem and records["val"]["label_map"].endswith(
        f"gtFine/val/{stem}_gtFine_labelIds.png"
    )
    assert "label_map" not in records["test"]

    write_label_maps(tmp_path, f"gtFine/train/{stem}_gtFine_labelTrainIds.png")
    names, options, pairs = read_label_maps(tmp_path)
    records = dict(pairs)
    assert options == {"reduce_zero": False, "ignore": 255}
    assert records["train"]["label_map"].endswith("_gtFine_labelTrainIds.png")
    assert (
        "val/aachen/aachen_000000_000019_gtFine_labelTrainIds.png is missing"
        in records["val"]["fault"]
    )


# Faults -------------------------------------------------------------------------------------------


def test_unusable_label_maps_are_faults(tmp_path):
    stems = ("fine", "palette", "sixteen", "absent", "jpeg", "color", "small", "damaged")
    write_images(tmp_path, *(f"train/{stem}.jpg" for stem in stems))
    write_label_maps(tmp_path, "trainannot/fine.png", "trainannot/damaged.png")
    write_label_maps(tmp_path, "trainannot/sixteen.tif", dtype=np.uint16)
    write_label_maps(tmp_path, "trainannot/small.png", size=(4, 6))
    palette = Image.fromarray(np.zeros(SIZE[::-1], np.uint8)).convert("P")
    palette.save(tmp_path / "trainannot" / "palette.png")
    write_images(tmp_path, "trainannot/jpeg.jpg", "trainannot/color.png")
    (tmp_path / "trainannot" / "damaged.png").write_bytes(b"\x89PNG")
    faults = {record["id"]: record.get("fault", "") for _, record in read_label_maps(tmp_path)[2]}
    assert not any(faults[stem] for stem in ("fine", "palette", "sixteen"))
    words = {
        "absent": "is missing",
        "jpeg": "not .jpg",
        "color": "RGB",
        "damaged": "is not an image",
    }
    words["small"] = "has 4 x 6 pixels, the image 6 x 4"
    for stem, word in words.items():
        assert word in faults[stem] and stem in faults[stem] and "\n" not in faults[stem], faults[
            stem
        ]


def test_a_repeated_name_and_an_unreadable_image_are_faults(tmp_path):
    write_images(tmp_path, "val/a.jpg", "val/a.png")
    write_label_maps(tmp_path, "valannot/a.png", "valannot/b.png")
    (tmp_path / "val" / "b.jpg").write_bytes(b"nothing")
    records = [record for _, record in read_label_maps(tmp_path)[2]]
    assert [("fault" in record, record["id"]) for record in records] == [
        (False, "a"),
        (True, "a"),
        (False, "b"),
    ]
    report = write_splits(
        tmp_path / "root", "ade20k", "main", read_label_maps(tmp_path)[2], bad_share=0.7
    )
    assert report["records"] == {"val": 1} and "b.jpg is not an image" in report["passed_over"][1]


def test_folders_of_other_layouts_are_refused(tmp_path):
    assert_refused(tmp_path / "absent", "absent")
    assert_refused(
        tmp_path, "images/{training,validation}/", "{train,val,test}annot/", "leftImg8bit/"
    )
    write_images(
        tmp_path, "train/a.jpg", "images/training/a.jpg", "leftImg8bit/train/a/a_leftImg8bit.png"
    )
    assert_refused(tmp_path, "ade20k", "camvid", "cityscapes")
    shutil.rmtree(tmp_path / "train")
    write_label_maps(tmp_path, "annotations/training/a.png")
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n3\tsky\n")
    assert_refused(tmp_path, "objectInfo150.txt", "again")


# Further layouts ----------------------------------------------------------------------------------


def write_splits_of(root, image_pattern, map_pattern, *, numbers, splits=("train", "val")):
    """Writes an image and a label map of random `numbers` for two keys of each split."""
    rng = np.random.default_rng(0)
    for split in splits:
        for key in "ab":
            write_images(root, image_pattern.format(split=split, key=key))
            values = rng.permutation(np.resize(np.array(numbers), SIZE[0] * SIZE[1]))
            path = map_pattern.format(split=split, key=key)
            write_label_maps(root, path, numbers=values.reshape(SIZE[::-1]))
    return root


MMSEG = ("img_dir/{split}/{key}.jpg", "ann_dir/{split}/{key}.png")
IMAGES = ("images/{split}/{key}.jpg", "annotations/{split}/{key}.png")


@pytest.mark.parametrize(
    ("folders", "numbers", "listed", "names", "reduce_zero"),
    [
        (MMSEG, (0, 1, 2, 255), "", ("0", "1", "2"), False),
        (MMSEG, (1, 2), "", ("1", "2"), True),
        (MMSEG, (0, 1, 2), "sky\nsea\nland", ("sky", "sea", "land"), False),
        (MMSEG, (0, 1, 2), "sea\nland", ("sea", "land"), True),
        (IMAGES, (0, 1), "sea\nland", ("sea", "land"), False),
        (IMAGES, (1, 2), "", ("1", "2"), True),
        (
            (IMAGES[0], "annotations/{split}/{key}_labelTrainIds.png"),
            (0, 1, 255),
            "",
            ("0", "1"),
            False,
        ),
        ((IMAGES[0], "masks/{split}/{key}_mask.png"), (0, 1), "a\nb", ("a", "b"), False),
    ],
)
def test_mmseg_folders_are_numbered_as_their_lists_say(
    tmp_path, folders, numbers, listed, names, reduce_zero
):
    write_splits_of(tmp_path, *folders, numbers=numbers)
    if listed:
        (tmp_path / "classes.txt").write_text(listed)
    class_names, options, pairs = read_label_maps(tmp_path)
    records = list(pairs)
    assert class_names == names and options == {"reduce_zero": reduce_zero, "ignore": 255}
    assert Counter(split for split, _ in records) == {"train": 2, "val": 2}
    for _, record in records:
        assert Path(record["label_map"]).stem.startswith(Path(record["image"]).stem)


def test_an_unlisted_0_is_refused_where_it_may_be_unlabeled(tmp_path):
    write_splits_of(tmp_path, *IMAGES, numbers=(0, 1, 2))
    assert_refused(tmp_path, "as in mmsegmentation", "as in ADE20K", "3 of them", "or 2 if")


def test_voc_label_maps_follow_their_lists(tmp_path):
    voc = (
        "JPEGImages/2007_00000{split}_{key}.jpg",
        "SegmentationClass/2007_00000{split}_{key}.png",
    )
    voc = tuple(pattern.replace("{split}_{key}", "{split}") for pattern in voc)
    raw = tmp_path / "VOCdevkit" / "VOC2012"
    write_splits_of(raw, *voc, numbers=(0, 15, 255), splits="012")
    write_images(raw, "JPEGImages/2007_000009.jpg", "JPEGImages/2007_000005.jpg")
    lists = raw / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000000\n2007_000001\n")
    (lists / "val.txt").write_text("2007_000002\n2007_000008\n")
    (lists / "test.txt").write_text("2007_000009\n")
    write_label_maps(raw, "SegmentationClass/2007_000005.png")
    counts = Counter()
    names, options, pairs = read_label_maps(tmp_path, counts=counts)
    records = list(pairs)
    assert counts == {"label maps that no list names, passed over": 1}
    assert len(names) == 21 and (names[0], names[15]) == ("background", "person")
    assert options == {"reduce_zero": False, "ignore": 255}
    assert [(split, record["id"][-1]) for split, record in records] == [
        ("train", "0"),
        ("train", "1"),
        ("val", "2"),
        ("val", "8"),
        ("test", "9"),
    ]
    assert "missing" in records[3][1]["fault"] and "label_map" not in records[4][1]
    (raw / "classes.txt").write_text("\n".join(f"c{number}" for number in range(1, 16)))
    assert read_label_maps(tmp_path)[0][:2] == ("background", "c1")


def test_own_images_in_vocs_folders_do_not_get_vocs_names(tmp_path):
    write_splits_of(
        tmp_path,
        "JPEGImages/{split}{key}.jpg",
        "SegmentationClass/{split}{key}.png",
        numbers=(0, 2),
    )
    names, _, pairs = read_label_maps(tmp_path)
    assert names == ("background", "1", "2") and len(list(pairs)) == 4


# Numbers that are no class ------------------------------------------------------------------------


@pytest.mark.parametrize("listed", ["", "road\nrest"])
@pytest.mark.parametrize(
    ("folders", "splits", "first"),
    [
        (IMAGES, ("training", "validation"), 1),
        (IMAGES, ("train", "val"), 0),
        (MMSEG, ("train",), 0),
    ],
)
def test_black_and_white_masks_are_refused(tmp_path, folders, splits, first, listed):
    write_splits_of(tmp_path, *folders, numbers=(0, 255), splits=splits)
    if listed:
        (tmp_path / "classes.txt").write_text(listed)
    assert_refused(
        tmp_path, "class", "left", "255, which is ignored", f"write {first} and {first + 1}"
    )


def test_label_maps_without_classes_are_refused_or_counted(tmp_path):
    write_splits_of(tmp_path, *IMAGES, numbers=(255,), splits=("training", "validation"))
    assert_refused(tmp_path, "no class is left in the 4 label maps")
    write_label_maps(tmp_path, "annotations/training/a.png", numbers=3)
    with pytest.raises(ValueError, match=r"none of the 2 label maps of val .*has a labeled pixel"):
        list(read_label_maps(tmp_path)[2])
    write_label_maps(tmp_path, "annotations/validation/a.png", numbers=2)
    counts = Counter()
    assert len(list(read_label_maps(tmp_path, counts=counts)[2])) == 4
    assert counts == {"label maps without a labeled pixel": 2}


def test_ade20k_with_0_and_1_alone_is_ambiguous(tmp_path):
    write_splits_of(tmp_path, *IMAGES, numbers=(0, 1), splits=("training", "validation"))
    assert_refused(tmp_path, "0 may be unlabeled", "or a class", "classes.txt")
    (tmp_path / "classes.txt").write_text("road\n")
    assert read_label_maps(tmp_path)[0] == ("road",)


def test_numbers_beyond_the_list_are_faults(tmp_path):
    write_splits_of(tmp_path, *IMAGES, numbers=(1, 2), splits=("training", "validation"))
    write_label_maps(tmp_path, "annotations/training/b.png", numbers=9)
    (tmp_path / "classes.txt").write_text("road\nrest\n")
    faults = [record["fault"] for _, record in read_label_maps(tmp_path)[2] if "fault" in record]
    assert len(faults) == 1 and "holds 9, but the 2 classes are numbered 1 to 2" in faults[0]
