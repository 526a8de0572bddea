"""Readers: real samples where available, small files made here, and malformed ones,
which are refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.prepare.formats.captions import read_flickr8k, read_karpathy
from beit3.data.prepare.formats.daquar import read_daquar
from beit3.data.prepare.formats.detect import (
    FORMATS,
    detect_format,
    read_captioned_images,
    read_classified_images,
    read_images,
    read_pairs,
    read_questions,
    read_statements,
    read_texts,
)
from beit3.data.prepare.formats.easy_vqa import read_easy_vqa
from beit3.data.prepare.formats.image_folders import read_image_folder
from beit3.data.prepare.formats.split_names import is_held_out
from beit3.data.prepare.formats.text_files import MAX_TEXT_CHARS, read_text_files
from beit3.data.prepare.formats.vqa import read_vqav2
from beit3.data.prepare.splits import find_fault

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def find_sample(name):
    if not (DATA / name).exists():
        pytest.skip(f"real sample not available: {DATA / name}")
    return DATA / name


def write_files(root, contents):
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (2, 2)).save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(
                content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
            )
    return root


def count_splits(pairs):
    return dict(Counter(split for split, _ in pairs))


def assert_refused(reader, raw, *words):
    with pytest.raises(ValueError) as error:
        list(reader(raw))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# The real samples ---------------------------------------------------------------------------------


def test_real_images_are_found():
    records = list(read_image_folder(find_sample("imagenet_sample_1k")))
    left_out = [record for record in records if "left_out" in record]
    assert sorted(record["left_out"] for record in left_out) == [".md", ".tsv"]
    records = [record for record in records if "image" in record]
    assert len(records) == 1000 and records[0]["id"] == "images/n01440764_tench.JPEG"
    assert all(Path(record["image"]).is_file() for record in records)
    images = read_images(find_sample("cifar10_mini"))
    split = count_splits(pair for pair in images if "image" in pair[1])
    assert (
        split["test"] == 500 and split["train"] + split["val"] == 2000 and 50 < split["val"] < 160
    )


def test_real_texts_become_paragraphs():
    records = [
        record for _, record in read_text_files(find_sample("text_corpus")) if "text" in record
    ]
    assert len({record["id"] for record in records}) == len(records) > 8000
    assert max(len(record["text"]) for record in records) <= MAX_TEXT_CHARS
    speech = next(record for record in records if record["id"] == "tinyshakespeare/input.txt:1")
    assert speech["text"] == "First Citizen: Before we proceed any further, hear me speak."
    written = sum(
        len(path.read_text().split()) for path in find_sample("text_corpus").rglob("*.txt")
    )
    assert sum(len(record["text"].split()) for record in records) == written


def test_real_captions_are_the_same_in_both_formats():
    raw = find_sample("flickr8k_mini")
    karpathy, flickr = list(read_karpathy(raw)), list(read_flickr8k(raw))
    assert (
        count_splits(karpathy) == count_splits(flickr) == {"train": 6000, "val": 750, "test": 750}
    )
    assert sorted(map(str, karpathy)) == sorted(map(str, flickr))
    assert detect_format(raw) == "karpathy" and list(read_pairs(raw)) == karpathy
    split, record = karpathy[0]
    assert split == "train" and record["id"] == "1020651753_06077ec457.jpg#0"
    assert record["text"] == "a black and white dog jumping in the air to get a toy ."
    assert all(Path(record["image"]).is_file() for _, record in karpathy)


def test_real_vqav2_is_read():
    questions = list(read_questions(find_sample("vqav2_sample")))
    assert count_splits(questions) == {"train": 3}
    first = questions[0][1]
    assert first["id"] == 458752000 and first["text"] == "What is this photo taken looking through?"
    assert first["answers"][:4] == ["net", "net", "net", "netting"] and len(first["answers"]) == 10
    assert first["multiple_choice_answer"] == "net"
    assert (
        Path(first["image"]).name == "COCO_train2014_000000458752.jpg"
        and Path(first["image"]).is_file()
    )


def test_real_easy_vqa_is_read():
    questions = list(read_questions(find_sample("easy_vqa")))
    assert count_splits(questions) == {"train": 9656, "val": 1470}
    assert len({record["multiple_choice_answer"] for _, record in questions}) == 13
    assert len({record["id"] for _, record in questions}) == len(questions)
    assert all(Path(image).is_file() for image in {record["image"] for _, record in questions})
    first = questions[0][1]
    assert first["text"] == "what is the blue shape?" and first["answers"] == ["rectangle"]
    assert first["image"].endswith("train/images/0.png")


def test_real_daquar_is_the_same_in_both_formats(tmp_path):
    raw = find_sample("daquar_train")
    texts = list(read_questions(raw))
    # 795 images, of which one has no question.
    assert len(texts) == 6795 and len({record["image"] for _, record in texts}) == 794
    assert len({record["multiple_choice_answer"] for _, record in texts}) == 968
    assert all(Path(image).is_file() for image in {record["image"] for _, record in texts})
    shutil.copy(raw / "data_train.csv", tmp_path)
    table = list(read_daquar(tmp_path))
    for (split, a), (table_split, b) in zip(texts, table, strict=True):
        assert (
            split == table_split
            and a["answers"] == b["answers"]
            and Path(a["image"]).stem == Path(b["image"]).stem
        )
        assert a["text"].endswith("?") and not any(
            digit.isdigit() for digit in a["text"].partition("image")[2]
        )
    # The table's makers also cut "of the image3" and its like; all other questions are equal.
    different = [
        a["text"] for (_, a), (_, b) in zip(texts, table, strict=True) if a["text"] != b["text"]
    ]
    assert len(different) < 170 and all("image" in text for text in different)
    images = {
        split: {r["image"] for side, r in texts if side == split} for split in ("train", "val")
    }
    assert not images["train"] & images["val"] and 50 < len(images["val"]) < 110


SAMPLES = {
    **{
        "flickr8k_mini": "karpathy",
        "vqav2_sample": "vqav2",
        "easy_vqa": "easy_vqa",
        "daquar_train": "daquar",
    },
    **{
        "imagenet_sample_1k": "image_folder",
        "cifar10_mini": "image_folder",
        "text_corpus": "text_files",
    },
    **{
        "coco_mini": "soft_labels",
        "nlvr1_dev": "nlvr1",
        "nlvr2_sample": "nlvr2",
        "cc12m_webdataset": "webdataset",
    },
}


@pytest.mark.parametrize("name, reader", SAMPLES.items())
def test_real_samples_are_recognized(name, reader):
    assert detect_format(find_sample(name)) == reader


# Images and texts ---------------------------------------------------------------------------------


def test_an_image_folder_skips_hidden_files(tmp_path):
    names = [
        "b/2.PNG",
        "b/1.jpeg",
        "a.webp",
        "b/c/z.gif",
        ".hidden/x.png",
        "b/.x.png",
        "__MACOSX/y.png",
        "notes.txt",
    ]
    write_files(tmp_path, dict.fromkeys(names, b""))
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    records = list(read_image_folder(tmp_path))
    assert records.pop(1) == {"id": "notes.txt", "left_out": ".txt"}
    assert [record["id"] for record in records] == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/z.gif"]
    assert all(record["image"] == str(tmp_path / record["id"]) for record in records)
    assert_refused(read_image_folder, tmp_path / "absent", "absent")


def test_text_files_become_paragraphs(tmp_path):
    long = "\n".join(["nine chars"] * 1000)
    write_files(
        tmp_path, {"a/x.txt": "\ufeffOne line\nof two.\r\n\r\n \n Second.\n", "b.TXT": long}
    )
    write_files(tmp_path, {"c.md": "no", "d.txt": " \n", "e.txt": long.replace("\n", " ")})
    records = [record for _, record in read_text_files(tmp_path)]
    assert [record["text"] for record in records[-2:]] == ["One line of two.", "Second."]
    assert [record["id"] for record in records[-2:]] == ["a/x.txt:1", "a/x.txt:2"]
    for name in ("b.TXT", "e.txt"):
        cut = [record for record in records if record["id"].startswith(name)]
        assert [record["id"] for record in cut] == [f"{name}:{number}" for number in range(1, 7)]
        assert " ".join(record["text"] for record in cut) == " ".join(long.split())
    write_files(tmp_path, {"e.txt": b"fine\n\ncaf\xe9\n"})
    (faulty,) = (record for _, record in read_text_files(tmp_path) if "fault" in record)
    assert faulty["id"] == "e.txt" and "not UTF-8" in faulty["fault"] and "0xe9" in faulty["fault"]
    write_files(tmp_path / "more", {"a.jsonl": '{"body": "One.\\n\\nTwo."}\n{"body": ["three"]}\n'})
    records = [record for _, record in read_texts(tmp_path / "more", field="body")]
    assert records[:2] == [{"id": "a.jsonl:1", "text": "One."}, {"id": "a.jsonl:2", "text": "Two."}]
    assert records[2]["id"] == "a.jsonl line 2" and "no text 'body'" in records[2]["fault"]


@pytest.mark.parametrize(
    "train, val", [("train", "val"), ("training", "validation"), ("train2017", "val2017")]
)
def test_splits_come_from_folders(tmp_path, train, val):
    write_files(
        tmp_path, dict.fromkeys([f"{train}/a.png", f"{val}/a.png", "test/a.png", "other.png"], b"")
    )
    split_by_id = {record["id"]: split for split, record in read_images(tmp_path)}
    assert split_by_id == {
        f"{train}/a.png": "train",
        f"{val}/a.png": "val",
        "test/a.png": "test",
        "other.png": "train",
    }


def test_splits_come_from_hashes(tmp_path):
    write_files(
        tmp_path,
        {"x.txt": "\n\n".join(f"text {i}" for i in range(2000)), "test/y.txt": "one\n\ntwo"},
    )
    first = [(split, record["id"]) for split, record in read_texts(tmp_path)]
    assert first == [(split, record["id"]) for split, record in read_texts(tmp_path)]
    assert 60 < count_splits(first)["val"] < 140 and count_splits(first)["test"] == 2
    # The same keys on every machine.
    assert [key for key in "abcdefghijklmnopqrst" if is_held_out(key, 0.2)] == list("efpq")
    assert not is_held_out("a", 0.0) and is_held_out("a", 1.0)


# Captions -----------------------------------------------------------------------------------------

IMAGE = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]}


FOLDERS = [
    "",
    "images/",
    "Images/",
    "val2014/",
    "images/val2014/",
    "flickr30k-images/",
    "flickr30k_images/",
]


@pytest.mark.parametrize("image_name", [f"{folder}a.jpg" for folder in FOLDERS])
def test_karpathy_finds_images(tmp_path, image_name):
    entry = {**IMAGE, "filepath": "val2014", "split": "restval"}
    write_files(tmp_path, {"dataset_coco.json": {"images": [entry]}, image_name: None})
    for raw in (tmp_path, tmp_path / "dataset_coco.json"):
        assert list(read_pairs(raw)) == [
            ("train", {"id": f"a.jpg#{k}", "image": str(tmp_path / image_name), "text": text})
            for k, text in enumerate(("one", "two"))
        ]


def test_karpathys_file_may_lie_in_its_own_folder(tmp_path):
    entry = {**IMAGE, "filepath": "train2014"}
    write_files(
        tmp_path, {"annotations/dataset_coco.json": {"images": [entry]}, "train2014/a.jpg": None}
    )
    for raw in (tmp_path, tmp_path / "annotations/dataset_coco.json"):
        assert next(read_pairs(raw))[1]["image"] == str(tmp_path / "train2014/a.jpg")


def test_missing_images_name_the_folders_searched(tmp_path):
    entry = {**IMAGE, "filepath": "train2014"}
    write_files(tmp_path, {"annotations/dataset_coco.json": {"images": [entry]}})
    fault = find_fault(next(read_pairs(tmp_path))[1], {})
    assert fault.startswith(
        f"image {tmp_path / 'annotations/train2014/a.jpg'} is missing, looked for in train2014, "
        "., images, Images"
    )
    assert str(tmp_path / "images/train2014") in fault


def test_karpathy_leaves_missing_images_to_prepare(tmp_path):
    write_files(tmp_path, {"dataset_x.json": {"images": [{**IMAGE, "filepath": "images"}]}})
    assert next(read_karpathy(tmp_path))[1]["image"] == str(tmp_path / "images" / "a.jpg")


MALFORMED = [
    ("{", ["not JSON"]),
    ({"x": []}, ["images"]),
    ([], ["images"]),
    ({"images": [IMAGE, {"filename": "b.jpg"}]}, ["images[1]", "split"]),
    ({"images": [{**IMAGE, "split": "odd"}]}, ["images[0]", "odd"]),
    ({"images": [{**IMAGE, "sentences": ["x"]}]}, ["images[0]", "raw"]),
    ({"images": [{**IMAGE, "filepath": 3}]}, ["images[0]", "filepath"]),
    ({"images": ["a.jpg"]}, ["images[0]", "filename"]),
]


@pytest.mark.parametrize("content, words", MALFORMED)
def test_malformed_karpathy_files_are_refused(tmp_path, content, words):
    assert_refused(
        read_karpathy, write_files(tmp_path, {"dataset_x.json": content}), "dataset_x.json", *words
    )


def test_two_karpathy_files_are_ambiguous(tmp_path):
    write_files(
        tmp_path,
        {"dataset_coco.json": {"images": []}, "dataset_flickr8k.json": {"images": [IMAGE]}},
    )
    assert_refused(read_karpathy, tmp_path, "dataset_coco.json", "dataset_flickr8k.json")
    assert len(list(read_pairs(tmp_path / "dataset_flickr8k.json"))) == 2


def test_flickr8k_lists_are_read(tmp_path):
    tokens = "a.jpg#0\tA dog .\na.jpg#1\tOne  dog\n\nb.jpg#0\tA cat\nunlisted.jpg#0\tnothing\n"
    lists = {"Flickr_8k.trainImages.txt": "a.jpg\r\n", "Flickr_8k.devImages.txt": "b.jpg\n"}
    write_files(
        tmp_path,
        {
            "Flickr8k.token.txt": tokens,
            **lists,
            "Flicker8k_Dataset/a.jpg": None,
            "Images/b.jpg": None,
        },
    )
    assert [(split, r["id"], r["text"]) for split, r in read_pairs(tmp_path)] == [
        ("train", "a.jpg#0", "A dog ."),
        ("train", "a.jpg#1", "One  dog"),
        ("val", "b.jpg#0", "A cat"),
    ]
    assert all(Path(record["image"]).is_file() for _, record in read_flickr8k(tmp_path))
    write_files(tmp_path, {"Flickr8k.token.txt": "a.jpg#0\tA dog .\na.jpg A dog\n"})
    assert_refused(read_flickr8k, tmp_path, "Flickr8k.token.txt line 2")
    for name in lists:
        (tmp_path / name).unlink()
    assert_refused(read_flickr8k, tmp_path, "Flickr_8k.trainImages.txt")


# Questions ----------------------------------------------------------------------------------------

ANNOTATOR_ANSWERS = [{"answer": answer} for answer in ["Net"] * 9 + ["mesh"]]
QUESTIONS = [{"question_id": 70, "image_id": 7, "question": "What?"}]
ANNOTATIONS = [
    {
        "question_id": 70,
        "image_id": 7,
        "answers": ANNOTATOR_ANSWERS,
        "multiple_choice_answer": "Net",
    }
]


@pytest.mark.parametrize("subset, split", [("train2014", "train"), ("val2014", "val")])
@pytest.mark.parametrize("folder", ["", "Questions/"])
@pytest.mark.parametrize("declared", [True, False])
def test_vqav2_is_read_by_its_released_names(tmp_path, subset, split, folder, declared):
    head = {"data_subtype": subset} if declared else {}
    name = f"COCO_{subset}_000000000007.jpg"
    question_file, annotation_file = (
        {**head, "questions": QUESTIONS},
        {**head, "annotations": ANNOTATIONS},
    )
    write_files(
        tmp_path,
        {
            f"{folder}v2_OpenEnded_mscoco_{subset}_questions.json": question_file,
            f"{subset}/{name}": None,
        },
    )
    write_files(
        tmp_path,
        {f"{'Annotations/' if folder else ''}v2_mscoco_{subset}_annotations.json": annotation_file},
    )
    write_files(tmp_path, {f"MultipleChoice_mscoco_{subset}_questions.json": question_file})
    assert list(read_questions(tmp_path)) == [
        (
            split,
            {
                "id": 70,
                "image": str(tmp_path / subset / name),
                "text": "What?",
                "answers": ["Net"] * 9 + ["mesh"],
                "multiple_choice_answer": "Net",
            },
        )
    ]


@pytest.mark.parametrize("subset, split", [("test2015", "test"), ("test-dev2015", "test-dev")])
def test_vqav2_test_has_no_answers(tmp_path, subset, split):
    asked = {"data_subtype": subset, "questions": QUESTIONS}
    write_files(tmp_path, {f"v2_OpenEnded_mscoco_{subset}_questions.json": asked})
    write_files(tmp_path, {"v2_mscoco_val2014_annotations.json": {"annotations": ANNOTATIONS}})
    write_files(tmp_path, {"test2015/COCO_test2015_000000000007.png": None})
    ((found, record),) = read_vqav2(tmp_path)
    assert found == split and record["answers"] == [] and record["multiple_choice_answer"] is None
    assert record["image"].endswith("test2015/COCO_test2015_000000000007.png")


def test_malformed_vqav2_files_are_refused(tmp_path):
    write_files(
        tmp_path,
        {"questions.json": {"questions": QUESTIONS}, "annotations.json": {"annotations": []}},
    )
    assert_refused(read_vqav2, tmp_path, "questions.json questions[0]", "70")
    write_files(tmp_path, {"annotations.json": {"annotations": [{"question_id": 70}]}})
    assert_refused(read_vqav2, tmp_path, "annotations.json annotations[0]", "answers")
    write_files(
        tmp_path,
        {
            "questions.json": {"questions": [{"question_id": "70"}]},
            "annotations.json": {"annotations": []},
        },
    )
    assert_refused(read_vqav2, tmp_path, "questions[0]", "question_id")
    write_files(tmp_path, {"questions.json": "nonsense"})
    assert_refused(read_vqav2, tmp_path, "questions.json is not JSON")
    write_files(tmp_path, {"questions.json": QUESTIONS})
    assert_refused(read_vqav2, tmp_path, "questions.json has no questions (list)")
    write_files(tmp_path, {"questions.json": {"questions": QUESTIONS}})
    for key, value, word in (
        ("answers", [], "answers"),
        ("answers", ["yes"], "answer (str)"),
        ("multiple_choice_answer", 5, "(str)"),
    ):
        write_files(
            tmp_path, {"annotations.json": {"annotations": [{**ANNOTATIONS[0], key: value}]}}
        )
        assert_refused(read_vqav2, tmp_path, "annotations.json annotations[0]", word)


def test_a_split_has_one_file_and_a_folder_one_dataset(tmp_path):
    name = "OpenEnded_mscoco_test2015_questions.json"
    write_files(
        tmp_path / "a",
        {
            f"v2_{name}": {"questions": QUESTIONS},
            f"v2_Questions_Test/v2_{name}": {"questions": QUESTIONS},
        },
    )
    assert_refused(
        read_questions,
        tmp_path / "a",
        f"a/v2_{name} and",
        f"v2_Questions_Test/v2_{name} are both test",
    )
    write_files(
        tmp_path / "b",
        {
            f"v2_{name}": {"questions": QUESTIONS},
            name.replace("test2015", "val2014"): {"questions": QUESTIONS},
        },
    )
    assert_refused(
        read_questions,
        tmp_path / "b",
        f"v2_{name} of VQAv2",
        "OpenEnded_mscoco_val2014_questions.json of VQA v1 or OK-VQA",
    )


def test_easy_vqa_lists_are_read(tmp_path):
    write_files(
        tmp_path,
        {"train/questions.json": [["a?", "yes", 3]], "test/questions.json": [["b?", "no", 0]]},
    )
    assert [(split, r["text"], r["answers"], r["id"]) for split, r in read_questions(tmp_path)] == [
        ("train", "a?", ["yes"], "train-0"),
        ("val", "b?", ["no"], "test-0"),
    ]
    write_files(tmp_path, {"test/questions.json": [["b?", "no", 0], ["c?", "no"]]})
    assert_refused(read_easy_vqa, tmp_path, "questions.json [1]")
    write_files(tmp_path, {"test/questions.json": [["b?", 1, 0]]})
    assert_refused(read_easy_vqa, tmp_path, "test/questions.json [0]")


def test_daquar_is_read_and_checked(tmp_path):
    lines = [
        "what is near the bed in the image3 ?",
        "lamp",
        "how many cups in image12 are red ?",
        "2, cup ,x",
        "what is on the left side of the image3 ?",
        "door",
    ]
    write_files(
        tmp_path, {"qa.train.txt": "\n".join(lines), "qa.test.txt": "what in the image4 ?\nbed\n"}
    )
    write_files(tmp_path, {"images/image3.png": None})
    questions = list(read_questions(tmp_path))
    assert [(split, r["text"], r["answers"], Path(r["image"]).name) for split, r in questions] == [
        ("test", "what?", ["bed"], "image4.jpg"),
        ("train", "what is near the bed?", ["lamp"], "image3.png"),
        ("train", "how many cups in image are red?", ["2, cup, x"], "image12.jpg"),
        ("train", "what is on the left side of the image?", ["door"], "image3.png"),
    ]
    write_files(tmp_path, {"data_train.csv": 'question,answer,image_id\nother,"a, b",image9\n'})
    assert list(read_daquar(tmp_path)) == questions
    for content, words in (
        (lines[:3], ["line 3", "no answer"]),
        (["what?", "x"], ["line 1", "imageN"]),
    ):
        write_files(tmp_path, {"qa.train.txt": "\n".join(content)})
        assert_refused(read_daquar, tmp_path, "qa.train.txt", *words)
    (tmp_path / "qa.train.txt").unlink()
    assert [r["text"] for split, r in read_daquar(tmp_path) if split == "train"] == ["other?"]
    write_files(tmp_path, {"data_train.csv": "question,answer,image_id\nother,,image9\n"})
    assert_refused(read_daquar, tmp_path, "data_train.csv line 2")
    write_files(tmp_path, {"qa.37.raw.train.txt": "a", "qa.894.raw.train.txt": "a"})
    assert_refused(read_daquar, tmp_path, "qa.37.raw.train.txt", "qa.894.raw.train.txt")


def test_detection_lists_the_known_formats(tmp_path):
    write_files(tmp_path, {"readme.md": "nothing"})
    with pytest.raises(ValueError) as error:
        detect_format(tmp_path)
    assert all(f"({name})" in str(error.value) for name in FORMATS)
    write_files(tmp_path, {"a.png": None})
    assert detect_format(tmp_path) == "image_folder"
    for reader in (
        read_pairs,
        read_questions,
        read_statements,
        read_captioned_images,
        read_classified_images,
    ):
        assert_refused(reader, tmp_path, str(tmp_path), "no known format")
    for name in (
        "vqav2",
        "easy_vqa",
        "daquar",
        "nlvr2",
        "nlvr1",
        "coco_captions",
        "class_folders",
        "tables",
    ):
        reader = FORMATS[name].read
        assert_refused(reader, tmp_path, str(tmp_path))
    assert all(callable(FORMATS[name].read) for name in FORMATS)
