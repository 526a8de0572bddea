"""JSON lists of LAVIS, VizWiz, A-OKVQA and Visual Genome, and captions beside their images."""

import json
import os

import pytest

from beit3.data.prepare.formats import json_lists
from beit3.data.prepare.formats.detect import (
    QUESTION_FORMATS,
    detect_format,
    holds_vqa_questions,
    read_captioned_images,
    read_instances,
    read_pairs,
    read_questions,
    read_statements,
)
from beit3.data.prepare.formats.json_lists import stream_json_list
from beit3.data.prepare.splits import find_image_fault
from tests.data.prepare.test_formats import assert_refused, count_splits, write_files


def read_by_id(pairs):
    return {record["id"]: (split, record) for split, record in pairs}


# JSON lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_the_same_however_it_is_cut(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_lists, "CHUNK_CHARS", chunk)
    entries = [{"a": n, "text": 'é "}], {' * n, "deep": [{"b": [n]}]} for n in range(9)]
    file = tmp_path / "a.json"
    file.write_text("\ufeff \n" + json.dumps(entries, indent=indent) + "\n", encoding="utf-8")
    assert [entry for _, entry in stream_json_list(file)] == entries
    file.write_text(" [ ]\n")
    assert list(stream_json_list(file)) == []


@pytest.mark.parametrize(
    "text", ["", "{}", '[{"a": 1}', '[{"a": 1}, 3]', '[{"a": 1} {"a": 2}]', '["a"]', '[{"a": 1}, ']
)
def test_what_is_no_list_of_objects_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert_refused(stream_json_list, tmp_path / "a.json", "a.json")


# LAVIS --------------------------------------------------------------------------------------------

COCO_NAMES = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in range(4)]


def write_lavis_captions(raw):
    train = [
        {"image": name, "caption": f"{name} {k}", "image_id": f"coco_{n}"}
        for n, name in enumerate(COCO_NAMES[:2])
        for k in range(2)
    ]
    val = [{"image": COCO_NAMES[2], "caption": ["one", "two"]}]
    images = {f"images/{name}": None for name in COCO_NAMES}
    lists = {"coco_karpathy_train.json": train, "annotations/coco_karpathy_val.json": val}
    return write_files(raw, images | lists)


def test_lavis_captions_become_pairs_and_images(tmp_path):
    raw = write_lavis_captions(tmp_path)
    pairs = list(read_pairs(raw))
    assert count_splits(pairs) == {"train": 4, "val": 2}
    assert all(not find_image_fault(record["image"]) for _, record in pairs)
    images = read_by_id(read_captioned_images(raw))
    assert images.keys() == {"0", "1", "2"}
    split, record = images["2"]
    assert split == "val" and record["image_id"] == 2 and record["captions"] == ["one", "two"]
    alone = list(read_pairs(raw / "coco_karpathy_train.json"))
    assert {record["text"] for _, record in alone} == {
        f"{name} {k}" for name in COCO_NAMES[:2] for k in range(2)
    }


def test_lavis_files_that_cannot_be_told_apart_are_refused(tmp_path):
    raw = write_lavis_captions(tmp_path)
    write_files(raw, {"flickr30k_val.json": [{"image": "a.jpg", "caption": "a"}]})
    assert_refused(read_pairs, raw, "coco_karpathy_val.json", "flickr30k_val.json", "val")
    (raw / "flickr30k_val.json").unlink()
    write_files(raw, {"dataset_coco.json": {"images": []}})
    assert_refused(read_pairs, raw, "lavis_captions", "karpathy")
    (raw / "dataset_coco.json").unlink()
    write_files(raw, {"coco_karpathy_test.json": [{"image": "a.jpg", "caption": {"a": 1}}]})
    assert_refused(read_pairs, raw, "coco_karpathy_test.json [0]", "caption")


def test_lavis_questions(tmp_path):
    entry = {"question_id": 7, "question": "what?", "image": "val2014/c.jpg", "dataset": "vqa"}
    answers = ["cup"] * 7 + ["mug"] * 3
    raw = write_files(
        tmp_path,
        {
            "vqa_train.json": [entry | {"answer": answers}, entry | {"answer": "cup"}, entry],
            "vqa_test.json": [entry],
            "answer_list.json": ["cup", "mug"],
            "val2014/c.jpg": None,
        },
    )
    records = sorted(read_questions(raw), key=lambda pair: pair[0] == "test")
    assert [split for split, _ in records] == ["train", "train", "train", "test"]
    assert records[0][1]["answers"] == answers
    assert records[0][1]["multiple_choice_answer"] == "cup" and records[0][1]["id"] == 7
    assert records[1][1]["answers"] == ["cup"] and records[3][1]["answers"] == []
    assert "vqa_train.json [2]" in records[2][1]["id"] and "no answer" in records[2][1]["fault"]
    assert holds_vqa_questions(raw)
    write_files(raw, {"vqa_test.json": [entry | {"dataset": "okvqa"}]})
    assert not holds_vqa_questions(raw)


def test_lavis_statements(tmp_path):
    entries = [
        {
            "images": [f"dev/dev-8-{pair}-img{side}.png" for side in (0, 1)],
            "sentence": "left is red",
            "label": label,
        }
        for pair, label in enumerate(("True", "False"))
    ]
    images = {name: None for entry in entries for name in entry["images"]}
    raw = write_files(tmp_path, {"nlvr_dev.json": entries} | images)
    records = [record for _, record in read_statements(raw)]
    assert count_splits(read_statements(raw)) == {"val": 2}
    assert [record["label"] for record in records] == [1, 0]
    assert {record["group"] for record in records} == {"dev-8: left is red"}
    assert records[1]["image2"] == str(tmp_path / "dev/dev-8-1-img1.png")
    write_files(raw, {"nlvr_dev.json": [entries[0] | {"label": "perhaps"}]})
    assert_refused(read_statements, raw, "nlvr_dev.json [0]", "perhaps")
    write_files(raw, {"nlvr_dev.json": [entries[0] | {"images": ["a.png"]}]})
    assert_refused(read_statements, raw, "nlvr_dev.json [0]", "images")


# VizWiz and A-OKVQA -------------------------------------------------------------------------------


def test_vizwiz(tmp_path):
    votes = [{"answer": "basil", "answer_confidence": "yes"}] * 6
    votes += [{"answer": "unanswerable", "answer_confidence": "no"}] * 4
    lists = {
        f"Annotations/{split}.json": [
            {"image": f"VizWiz_{split}_0.jpg", "question": "What is it?"}
            | ({} if split == "test" else {"answers": votes, "answerable": 1})
        ]
        for split in ("train", "val", "test")
    }
    images = {f"{split}/VizWiz_{split}_0.jpg": None for split in ("train", "val", "test")}
    records = read_by_id(read_questions(write_files(tmp_path, lists | images)))
    assert {id: split for id, (split, _) in records.items()} == {
        f"VizWiz_{split}_0": split for split in ("train", "val", "test")
    }
    _, record = records["VizWiz_train_0"]
    assert record["answers"] == ["basil"] * 6 + ["unanswerable"] * 4
    assert record["multiple_choice_answer"] == "basil"
    assert records["VizWiz_test_0"][1]["answers"] == []
    assert not any(find_image_fault(record["image"]) for _, record in records.values())


def test_aokvqa(tmp_path):
    def make_entry(split, id, image_id, **more):
        entry = {"split": split, "image_id": image_id, "question_id": id, "question": "why?"}
        return entry | {"choices": ["a", "b"], "difficult_direct_answer": False} | more

    answers = {"direct_answers": ["rain"] * 10, "correct_choice_idx": 0}
    raw = write_files(
        tmp_path,
        {
            "aokvqa_v1p0_train.json": [
                make_entry("train", "x1", 9, **answers),
                make_entry("train", "x2", 9, **answers, difficult_direct_answer=True),
            ],
            "aokvqa_v1p0_val.json": [
                make_entry("val", "y1", 9, **answers),
                make_entry("val", "y2", 9, **answers, difficult_direct_answer=True),
            ],
            "aokvqa_v1p0_test.json": [make_entry("test", "z1", 8)],
            "train2017/000000000009.jpg": None,
            "coco/val2017/000000000009.jpg": None,
            "test2017/000000000008.jpg": None,
        },
    )
    records = read_by_id(read_questions(raw))
    assert {id: split for id, (split, _) in records.items()} == {
        "x1": "train",
        "x2": "train",
        "y1": "val",
        "y2": "val",
        "z1": "test",
    }
    assert "difficult_direct_answer" in records["y2"][1]["left_out"]
    assert records["x1"][1]["answers"] == ["rain"] * 10 and records["z1"][1]["answers"] == []
    folders = {id: records[id][1]["image"].split("/")[-2] for id in ("x1", "y1", "z1")}
    assert folders == {"x1": "train2017", "y1": "val2017", "z1": "test2017"}


# Visual Genome's regions --------------------------------------------------------------------------


def test_region_descriptions_are_pairs_but_no_captions(tmp_path):
    entries = [
        {"id": n, "regions": [{"region_id": 10 * n + k, "phrase": f"p {k} "} for k in range(2)]}
        for n in range(1, 40)
    ]
    images = {f"VG_100K{'_2' if n % 2 else ''}/{n}.jpg": None for n in range(1, 40)}
    raw = write_files(tmp_path, {"region_descriptions.json": entries} | images)
    pairs = list(read_pairs(raw))
    assert len(pairs) == 78 and pairs[0][1]["id"] == "vg-10" and pairs[0][1]["text"] == "p 0"
    splits: dict[str, set[str]] = {}
    for split, record in pairs:
        splits.setdefault(record["image"], set()).add(split)
        assert not find_image_fault(record["image"])
    assert all(len(own) == 1 for own in splits.values())
    assert_refused(read_captioned_images, raw, "region descriptions", "pairs")


# Captions beside images ---------------------------------------------------------------------------


def test_captions_beside_images(tmp_path):
    names = ["train/0.jpg", "train/deep/1.PNG", "val/0.webp", "train/2.jpg", "train/3.jpg"]
    texts = {
        "train/0.txt": "\ufeffa cat\n",
        "train/deep/1.caption": "a dog",
        "val/0.txt": "a bird",
        "train/3.txt": "one\ntwo",
        "train/9.txt": "alone",
        "train/0.json": "{}",
    }
    raw = write_files(tmp_path, {**dict.fromkeys(names), **texts})
    assert detect_format(raw, "tables", "sidecar_captions") == "sidecar_captions"
    pairs = list(read_pairs(raw))
    captions = {
        record["id"]: (split, record["text"]) for split, record in pairs if "text" in record
    }
    assert captions == {
        "train/0.jpg#0": ("train", "a cat"),
        "train/deep/1.PNG#0": ("train", "a dog"),
        "val/0.webp#0": ("val", "a bird"),
    }
    faults = {record["id"]: record["fault"] for _, record in pairs if "fault" in record}
    assert "2.txt" in faults["train/2.jpg"] and "2 lines" in faults["train/3.jpg"]
    left_out = {record["id"]: record["left_out"] for _, record in pairs if "left_out" in record}
    assert left_out == {"train/9.txt": ".txt without an image", "train/0.json": ".json"}
    images = [record for _, record in read_captioned_images(raw) if "captions" in record]
    assert [image["captions"] for image in images] == [["a cat"], ["a dog"], ["a bird"]]
    write_files(raw, {"all.csv": "image,caption\ntrain/0.jpg,a cat\n"})
    assert_refused(read_pairs, raw, "tables", "sidecar_captions")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_a_fault_and_hangs_nothing(tmp_path):
    raw = write_files(tmp_path, {"0.jpg": None, "1.jpg": None, "1.txt": "a cat"})
    os.mkfifo(raw / "0.txt")
    faults = [record["fault"] for _, record in read_pairs(raw) if "fault" in record]
    assert len(faults) == 1 and "pipe" in faults[0]
    os.mkfifo(raw / "dataset_coco.json")
    assert_refused(read_pairs, raw, "dataset_coco.json", "pipe")


def test_texts_beside_a_few_images_make_no_table_ambiguous(tmp_path):
    images = [f"images/{n}.jpg" for n in range(4)]
    table = "".join(f"{name},a cat\n" for name in images)
    raw = write_files(tmp_path, {**dict.fromkeys(images), "all.csv": f"image,caption\n{table}"})
    write_files(raw, {"images/logo.png": None, "images/logo.txt": "our logo"})
    assert detect_format(raw, "tables", "sidecar_captions") == "tables"
    assert len([r for _, r in read_pairs(raw) if "text" in r]) == 4
    write_files(raw, {f"images/{n}.txt": "a cat" for n in range(3)})
    assert_refused(read_pairs, raw, "tables", "sidecar_captions")


# Which format a folder is of ----------------------------------------------------------------------

QUESTION = {"question_id": 7, "image_id": 1, "question": "what?"}
TWO_FORMATS = [
    (
        read_questions,
        {"v2_OpenEnded_mscoco_val2014_questions.json": {"questions": []}},
        {"aokvqa_v1p0_train.json": [{**QUESTION, "choices": ["a"]}]},
        ("vqav2", "aokvqa"),
    ),
    (
        read_questions,
        {"sub/v2_OpenEnded_mscoco_val2014_questions.json": {"questions": []}},
        {"val.json": [{"image": "a.jpg", "question": "what?", "answers": []}]},
        ("vqav2", "vizwiz"),
    ),
    (
        read_questions,
        {"qa.37.raw.train.txt": "a"},
        {"vqa_val.json": [{**QUESTION, "image": "a.jpg"}]},
        ("daquar", "lavis_questions"),
    ),
    (
        read_questions,
        {"train/questions.json": [["what?", "red", 1]]},
        {"OpenEnded_mscoco_val2014_questions.json": {"questions": []}},
        ("easy_vqa", "vqav2"),
    ),
    (
        read_captioned_images,
        {"dataset_flickr30k.json": {"images": []}},
        {"captions_val2014.json": {}},
        ("karpathy", "coco_captions"),
    ),
    (
        read_captioned_images,
        {"dataset_coco.json": {"images": []}},
        {"captions_val2014.json": {}, "nocaps_val_4500_captions.json": {}},
        ("karpathy", "coco_captions"),
    ),
    (read_instances, {"instances_val2017.json": {}}, {"lvis_v1_val.json": {}}, ("coco", "lvis")),
    (
        read_instances,
        {"instances_val2017.json": {}},
        {"result.json": {}},
        ("coco", "label_studio"),
    ),
    (
        read_statements,
        {"dev.json": '{"sentence": "a"}'},
        {"nlvr_val.json": [{"images": ["a", "b"], "sentence": "a"}]},
        ("nlvr2", "lavis_statements"),
    ),
]


@pytest.mark.parametrize(("reader", "first", "second", "names"), TWO_FORMATS)
def test_a_folder_of_two_formats_is_refused_with_both(tmp_path, reader, first, second, names):
    raw = write_files(tmp_path, first | second)
    assert_refused(lambda raw: reader(raw) or (), raw, *names, "move one of them away")


def test_a_folder_may_hold_the_same_data_twice(tmp_path):
    write_files(tmp_path, {"dataset_coco.json": {"images": []}, "captions_val2014.json": {}})
    assert list(read_captioned_images(tmp_path)) == []
    aokvqa = {**QUESTION, "choices": ["a"], "image": "val2014/a.jpg", "direct_answers": ["a"]}
    raw = write_files(tmp_path / "b", {"aokvqa_v1p0_train.json": [aokvqa]})
    assert detect_format(raw, *QUESTION_FORMATS) == "aokvqa"
    raw = write_files(tmp_path / "c", {"train/questions.json": [["what?", "red", 1]]})
    assert detect_format(raw, *QUESTION_FORMATS) == "easy_vqa"


def test_detection_opens_no_file_about_one_image(tmp_path, monkeypatch):
    names = [f"00000/{n:04d}" for n in range(300)]
    files = {f"{name}{suffix}": "{}" for name in names for suffix in (".txt", ".json")}
    raw = write_files(tmp_path, files)
    for name in [*names, "a"]:
        (raw / f"{name}.jpg").touch()
    entry = {"image": "a.jpg", "caption": "a"}
    write_files(raw, {"a.json": "{}", "annotations/other.json": "{}", "many.json": [entry]})
    opened = []
    monkeypatch.setattr(
        json_lists, "stream_json_list", lambda file: opened.append(file) or iter(())
    )
    assert json_lists.find_lists(raw, {"image"}) == []
    assert opened == [raw / "many.json"]
    monkeypatch.undo()
    assert detect_format(raw, "lavis_captions", "sidecar_captions") == "lavis_captions"
    (raw / "many.json").unlink()
    assert detect_format(raw, "lavis_captions", "sidecar_captions") == "sidecar_captions"


# Several files of train; numbers of images --------------------------------------------------------


def test_lavis_trains_on_visual_genome_beside_vqa_and_coco(tmp_path):
    entry = {"question_id": 7, "question": "what?", "answer": ["cup"]}
    raw = write_files(
        tmp_path / "vqa",
        {
            "vqa_train.json": [{**entry, "image": "train2014/a.jpg", "dataset": "vqa"}],
            "vg_qa.json": [{**entry, "image": "VG_100K/7.jpg", "dataset": "vg"}],
            "vqa_val.json": [{**entry, "image": "val2014/b.jpg", "dataset": "vqa"}],
            "train2014/a.jpg": None,
            "images/VG_100K/7.jpg": None,
            "val2014/b.jpg": None,
        },
    )
    pairs = list(read_questions(raw))
    assert count_splits(pairs) == {"train": 2, "val": 1} and holds_vqa_questions(raw)
    assert "vg-7" in {record["id"] for _, record in pairs}
    assert all(not find_image_fault(record["image"]) for _, record in pairs)
    captions = write_lavis_captions(tmp_path / "captions")
    write_files(captions, {"vg_caption.json": [{"image": "VG_100K/7.jpg", "caption": "a"}]})
    assert count_splits(read_pairs(captions)) == {"train": 5, "val": 2}


def test_region_descriptions_name_their_image_in_any_version(tmp_path):
    regions = [{"region_id": 1, "phrase": "a", "image_id": 5}]
    entries = [{"regions": [], "image_id": 7}, {"regions": regions}, {"id": 9, "regions": []}]
    raw = write_files(tmp_path, {"region_descriptions.json": entries, "VG_100K/5.jpg": None})
    assert [record["id"] for _, record in read_pairs(raw)] == ["vg-1"]
    for entry in ({"regions": [3]}, {"id": 1, "regions": ["a"]}, {"regions": [{"image_id": "x"}]}):
        write_files(tmp_path, {"region_descriptions.json": [entry]})
        assert_refused(read_pairs, raw, "region_descriptions.json [0] regions[0]")
    write_files(tmp_path, {"region_descriptions.json": [{"regions": []}]})
    assert_refused(read_pairs, raw, "region_descriptions.json [0]", "id")
