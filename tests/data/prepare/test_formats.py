"""Readers: the real samples where they are at hand; small files made here; malformed ones, which
must be named."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.prepare import formats
from beit3.data.prepare.splits import find_fault

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def sample(name):
    if not (DATA / name).exists():
        pytest.skip(f"real sample not at hand: {DATA / name}")
    return DATA / name


def files(root, contents):
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


def counts(pairs):
    return dict(Counter(split for split, _ in pairs))


def refused(reader, raw, *words):
    with pytest.raises(ValueError) as error:
        list(reader(raw))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# The real samples ---------------------------------------------------------------------------------


def test_real_images():
    records = list(formats.image_folder(sample("imagenet_sample_1k")))
    assert len(records) == 1000 and records[0]["id"] == "images/n01440764_tench.JPEG"
    assert all(Path(record["image"]).is_file() for record in records)
    split = counts(formats.images(sample("cifar10_mini")))
    assert (
        split["test"] == 500 and split["train"] + split["val"] == 2000 and 50 < split["val"] < 160
    )


def test_real_texts():
    records = [record for _, record in formats.text_files(sample("text_corpus"))]
    assert len({record["id"] for record in records}) == len(records) > 8000
    assert max(len(record["text"]) for record in records) <= formats.LONGEST_TEXT
    speech = next(record for record in records if record["id"] == "tinyshakespeare/input.txt:1")
    assert speech["text"] == "First Citizen: Before we proceed any further, hear me speak."
    written = sum(len(path.read_text().split()) for path in sample("text_corpus").rglob("*.txt"))
    assert sum(len(record["text"].split()) for record in records) == written


def test_real_captions_are_the_same_in_both_formats():
    raw = sample("flickr8k_mini")
    karpathy, flickr = list(formats.karpathy(raw)), list(formats.flickr8k(raw))
    assert counts(karpathy) == counts(flickr) == {"train": 6000, "val": 750, "test": 750}
    assert sorted(map(str, karpathy)) == sorted(map(str, flickr))
    assert formats.detect(raw) == "karpathy" and list(formats.pairs(raw)) == karpathy
    split, record = karpathy[0]
    assert split == "train" and record["id"] == "1020651753_06077ec457.jpg#0"
    assert record["text"] == "a black and white dog jumping in the air to get a toy ."
    assert all(Path(record["image"]).is_file() for _, record in karpathy)


def test_real_vqav2():
    questions = list(formats.questions(sample("vqav2_sample")))
    assert counts(questions) == {"train": 3}
    first = questions[0][1]
    assert first["id"] == 458752000 and first["text"] == "What is this photo taken looking through?"
    assert first["answers"][:4] == ["net", "net", "net", "netting"] and len(first["answers"]) == 10
    assert first["multiple_choice_answer"] == "net"
    assert (
        Path(first["image"]).name == "COCO_train2014_000000458752.jpg"
        and Path(first["image"]).is_file()
    )


def test_real_easy_vqa():
    questions = list(formats.questions(sample("easy_vqa")))
    assert counts(questions) == {"train": 9656, "val": 1470}
    assert len({record["multiple_choice_answer"] for _, record in questions}) == 13
    assert len({record["id"] for _, record in questions}) == len(questions)
    assert all(Path(image).is_file() for image in {record["image"] for _, record in questions})
    first = questions[0][1]
    assert first["text"] == "what is the blue shape?" and first["answers"] == ["rectangle"]
    assert first["image"].endswith("train/images/0.png")


def test_real_daquar_is_the_same_in_both_formats(tmp_path):
    raw = sample("daquar_train")
    texts = list(formats.questions(raw))
    # 795 images, of which one has no question.
    assert len(texts) == 6795 and len({record["image"] for _, record in texts}) == 794
    assert len({record["multiple_choice_answer"] for _, record in texts}) == 968
    assert all(Path(image).is_file() for image in {record["image"] for _, record in texts})
    shutil.copy(raw / "data_train.csv", tmp_path)
    table = list(formats.daquar(tmp_path))
    for (split, a), (other, b) in zip(texts, table, strict=True):
        assert (
            split == other
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
def test_real_samples_are_recognised(name, reader):
    assert formats.detect(sample(name)) == reader


# Images and texts ---------------------------------------------------------------------------------


def test_image_folder(tmp_path):
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
    files(tmp_path, dict.fromkeys(names, b""))
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    records = list(formats.image_folder(tmp_path))
    assert [record["id"] for record in records] == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/z.gif"]
    assert all(record["image"] == str(tmp_path / record["id"]) for record in records)
    refused(formats.image_folder, tmp_path / "absent", "absent")


def test_text_files(tmp_path):
    long = "\n".join(["nine chars"] * 1000)
    files(tmp_path, {"a/x.txt": "\ufeffOne line\nof two.\r\n\r\n \n Second.\n", "b.TXT": long})
    files(tmp_path, {"c.md": "no", "d.txt": " \n", "e.txt": long.replace("\n", " ")})
    records = [record for _, record in formats.text_files(tmp_path)]
    assert [record["text"] for record in records[-2:]] == ["One line of two.", "Second."]
    assert [record["id"] for record in records[-2:]] == ["a/x.txt:1", "a/x.txt:2"]
    for name in ("b.TXT", "e.txt"):
        cut = [record for record in records if record["id"].startswith(name)]
        assert [record["id"] for record in cut] == [f"{name}:{number}" for number in range(1, 7)]
        assert " ".join(record["text"] for record in cut) == " ".join(long.split())
    files(tmp_path, {"e.txt": b"fine\n\ncaf\xe9\n"})
    (faulty,) = (record for _, record in formats.text_files(tmp_path) if "fault" in record)
    assert faulty["id"] == "e.txt" and "not UTF-8" in faulty["fault"] and "0xe9" in faulty["fault"]
    files(tmp_path / "more", {"a.jsonl": '{"body": "One.\\n\\nTwo."}\n{"body": ["three"]}\n'})
    found = [record for _, record in formats.texts(tmp_path / "more", field="body")]
    assert found[:2] == [{"id": "a.jsonl:1", "text": "One."}, {"id": "a.jsonl:2", "text": "Two."}]
    assert found[2]["id"] == "a.jsonl line 2" and "no text 'body'" in found[2]["fault"]


@pytest.mark.parametrize(
    "train, val", [("train", "val"), ("training", "validation"), ("train2017", "val2017")]
)
def test_split_by_folders(tmp_path, train, val):
    files(
        tmp_path, dict.fromkeys([f"{train}/a.png", f"{val}/a.png", "test/a.png", "other.png"], b"")
    )
    found = {record["id"]: split for split, record in formats.images(tmp_path)}
    assert found == {
        f"{train}/a.png": "train",
        f"{val}/a.png": "val",
        "test/a.png": "test",
        "other.png": "train",
    }


def test_split_by_hash(tmp_path):
    files(
        tmp_path,
        {"x.txt": "\n\n".join(f"text {i}" for i in range(2000)), "test/y.txt": "one\n\ntwo"},
    )
    first = [(split, record["id"]) for split, record in formats.texts(tmp_path)]
    assert first == [(split, record["id"]) for split, record in formats.texts(tmp_path)]
    assert 60 < counts(first)["val"] < 140 and counts(first)["test"] == 2
    # The same for ever, on every machine.
    assert [key for key in "abcdefghijklmnopqrst" if formats.holdout(key, 0.2)] == list("efpq")
    assert not formats.holdout("a", 0.0) and formats.holdout("a", 1.0)


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


@pytest.mark.parametrize("place", [f"{folder}a.jpg" for folder in FOLDERS])
def test_karpathy_finds_images(tmp_path, place):
    entry = {**IMAGE, "filepath": "val2014", "split": "restval"}
    files(tmp_path, {"dataset_coco.json": {"images": [entry]}, place: None})
    for raw in (tmp_path, tmp_path / "dataset_coco.json"):
        assert list(formats.pairs(raw)) == [
            ("train", {"id": f"a.jpg#{k}", "image": str(tmp_path / place), "text": text})
            for k, text in enumerate(("one", "two"))
        ]


def test_karpathys_file_in_a_folder_of_its_own(tmp_path):
    entry = {**IMAGE, "filepath": "train2014"}
    files(tmp_path, {"annotations/dataset_coco.json": {"images": [entry]}, "train2014/a.jpg": None})
    for raw in (tmp_path, tmp_path / "annotations/dataset_coco.json"):
        assert next(formats.pairs(raw))[1]["image"] == str(tmp_path / "train2014/a.jpg")


def test_missing_images_name_the_folders_searched(tmp_path):
    entry = {**IMAGE, "filepath": "train2014"}
    files(tmp_path, {"annotations/dataset_coco.json": {"images": [entry]}})
    fault = find_fault(next(formats.pairs(tmp_path))[1], {})
    assert fault.startswith(
        f"image {tmp_path / 'annotations/train2014/a.jpg'} is missing, looked for in train2014, "
        "., images, Images"
    )
    assert str(tmp_path / "images/train2014") in fault


def test_karpathy_leaves_missing_images_to_prepare(tmp_path):
    files(tmp_path, {"dataset_x.json": {"images": [{**IMAGE, "filepath": "images"}]}})
    assert next(formats.karpathy(tmp_path))[1]["image"] == str(tmp_path / "images" / "a.jpg")


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
def test_malformed_karpathy(tmp_path, content, words):
    refused(
        formats.karpathy, files(tmp_path, {"dataset_x.json": content}), "dataset_x.json", *words
    )


def test_two_karpathy_files_are_ambiguous(tmp_path):
    files(
        tmp_path,
        {"dataset_coco.json": {"images": []}, "dataset_flickr8k.json": {"images": [IMAGE]}},
    )
    refused(formats.karpathy, tmp_path, "dataset_coco.json", "dataset_flickr8k.json")
    assert len(list(formats.pairs(tmp_path / "dataset_flickr8k.json"))) == 2


def test_flickr8k(tmp_path):
    tokens = "a.jpg#0\tA dog .\na.jpg#1\tOne  dog\n\nb.jpg#0\tA cat\nunlisted.jpg#0\tnothing\n"
    lists = {"Flickr_8k.trainImages.txt": "a.jpg\r\n", "Flickr_8k.devImages.txt": "b.jpg\n"}
    files(
        tmp_path,
        {
            "Flickr8k.token.txt": tokens,
            **lists,
            "Flicker8k_Dataset/a.jpg": None,
            "Images/b.jpg": None,
        },
    )
    assert [(split, r["id"], r["text"]) for split, r in formats.pairs(tmp_path)] == [
        ("train", "a.jpg#0", "A dog ."),
        ("train", "a.jpg#1", "One  dog"),
        ("val", "b.jpg#0", "A cat"),
    ]
    assert all(Path(record["image"]).is_file() for _, record in formats.flickr8k(tmp_path))
    files(tmp_path, {"Flickr8k.token.txt": "a.jpg#0\tA dog .\na.jpg A dog\n"})
    refused(formats.flickr8k, tmp_path, "Flickr8k.token.txt line 2")
    for name in lists:
        (tmp_path / name).unlink()
    refused(formats.flickr8k, tmp_path, "Flickr_8k.trainImages.txt")


# Questions ----------------------------------------------------------------------------------------

VOTES = [{"answer": answer} for answer in ["Net"] * 9 + ["mesh"]]
ASKED = [{"question_id": 70, "image_id": 7, "question": "What?"}]
ANSWERED = [{"question_id": 70, "image_id": 7, "answers": VOTES, "multiple_choice_answer": "Net"}]


@pytest.mark.parametrize("subset, split", [("train2014", "train"), ("val2014", "val")])
@pytest.mark.parametrize("folder", ["", "Questions/"])
@pytest.mark.parametrize("declared", [True, False])
def test_vqav2_official_names(tmp_path, subset, split, folder, declared):
    head = {"data_subtype": subset} if declared else {}
    name = f"COCO_{subset}_000000000007.jpg"
    asked, answered = {**head, "questions": ASKED}, {**head, "annotations": ANSWERED}
    files(
        tmp_path,
        {f"{folder}v2_OpenEnded_mscoco_{subset}_questions.json": asked, f"{subset}/{name}": None},
    )
    files(
        tmp_path,
        {f"{'Annotations/' if folder else ''}v2_mscoco_{subset}_annotations.json": answered},
    )
    files(tmp_path, {f"MultipleChoice_mscoco_{subset}_questions.json": asked})
    assert list(formats.questions(tmp_path)) == [
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
    asked = {"data_subtype": subset, "questions": ASKED}
    files(tmp_path, {f"v2_OpenEnded_mscoco_{subset}_questions.json": asked})
    files(tmp_path, {"v2_mscoco_val2014_annotations.json": {"annotations": ANSWERED}})
    files(tmp_path, {"test2015/COCO_test2015_000000000007.png": None})
    ((found, record),) = formats.vqav2(tmp_path)
    assert found == split and record["answers"] == [] and record["multiple_choice_answer"] is None
    assert record["image"].endswith("test2015/COCO_test2015_000000000007.png")


def test_vqav2_malformed(tmp_path):
    files(
        tmp_path, {"questions.json": {"questions": ASKED}, "annotations.json": {"annotations": []}}
    )
    refused(formats.vqav2, tmp_path, "questions.json questions[0]", "70")
    files(tmp_path, {"annotations.json": {"annotations": [{"question_id": 70}]}})
    refused(formats.vqav2, tmp_path, "annotations.json annotations[0]", "answers")
    files(
        tmp_path,
        {
            "questions.json": {"questions": [{"question_id": "70"}]},
            "annotations.json": {"annotations": []},
        },
    )
    refused(formats.vqav2, tmp_path, "questions[0]", "question_id")
    files(tmp_path, {"questions.json": "nonsense"})
    refused(formats.vqav2, tmp_path, "questions.json is not JSON")
    files(tmp_path, {"questions.json": ASKED})
    refused(formats.vqav2, tmp_path, "questions.json has no questions (list)")
    files(tmp_path, {"questions.json": {"questions": ASKED}})
    for key, value, word in (
        ("answers", [], "answers"),
        ("answers", ["yes"], "answer (str)"),
        ("multiple_choice_answer", 5, "(str)"),
    ):
        files(tmp_path, {"annotations.json": {"annotations": [{**ANSWERED[0], key: value}]}})
        refused(formats.vqav2, tmp_path, "annotations.json annotations[0]", word)


def test_one_file_a_split_and_one_set_a_folder(tmp_path):
    name = "OpenEnded_mscoco_test2015_questions.json"
    files(
        tmp_path / "a",
        {f"v2_{name}": {"questions": ASKED}, f"v2_Questions_Test/v2_{name}": {"questions": ASKED}},
    )
    refused(
        formats.questions,
        tmp_path / "a",
        f"a/v2_{name} and",
        f"v2_Questions_Test/v2_{name} are both test",
    )
    files(
        tmp_path / "b",
        {
            f"v2_{name}": {"questions": ASKED},
            name.replace("test2015", "val2014"): {"questions": ASKED},
        },
    )
    refused(
        formats.questions,
        tmp_path / "b",
        f"v2_{name} of VQAv2",
        "OpenEnded_mscoco_val2014_questions.json of VQA v1 or OK-VQA",
    )


def test_easy_vqa(tmp_path):
    files(
        tmp_path,
        {"train/questions.json": [["a?", "yes", 3]], "test/questions.json": [["b?", "no", 0]]},
    )
    assert [
        (split, r["text"], r["answers"], r["id"]) for split, r in formats.questions(tmp_path)
    ] == [("train", "a?", ["yes"], "train-0"), ("val", "b?", ["no"], "test-0")]
    files(tmp_path, {"test/questions.json": [["b?", "no", 0], ["c?", "no"]]})
    refused(formats.easy_vqa, tmp_path, "questions.json [1]")
    files(tmp_path, {"test/questions.json": [["b?", 1, 0]]})
    refused(formats.easy_vqa, tmp_path, "test/questions.json [0]")


def test_daquar(tmp_path):
    lines = [
        "what is near the bed in the image3 ?",
        "lamp",
        "how many cups in image12 are red ?",
        "2, cup ,x",
        "what is on the left side of the image3 ?",
        "door",
    ]
    files(
        tmp_path, {"qa.train.txt": "\n".join(lines), "qa.test.txt": "what in the image4 ?\nbed\n"}
    )
    files(tmp_path, {"images/image3.png": None})
    found = list(formats.questions(tmp_path))
    assert [(split, r["text"], r["answers"], Path(r["image"]).name) for split, r in found] == [
        ("test", "what?", ["bed"], "image4.jpg"),
        ("train", "what is near the bed?", ["lamp"], "image3.png"),
        ("train", "how many cups in image are red?", ["2, cup, x"], "image12.jpg"),
        ("train", "what is on the left side of the image?", ["door"], "image3.png"),
    ]
    files(tmp_path, {"data_train.csv": 'question,answer,image_id\nother,"a, b",image9\n'})
    assert list(formats.daquar(tmp_path)) == found
    for content, words in (
        (lines[:3], ["line 3", "no answer"]),
        (["what?", "x"], ["line 1", "imageN"]),
    ):
        files(tmp_path, {"qa.train.txt": "\n".join(content)})
        refused(formats.daquar, tmp_path, "qa.train.txt", *words)
    (tmp_path / "qa.train.txt").unlink()
    assert [r["text"] for split, r in formats.daquar(tmp_path) if split == "train"] == ["other?"]
    files(tmp_path, {"data_train.csv": "question,answer,image_id\nother,,image9\n"})
    refused(formats.daquar, tmp_path, "data_train.csv line 2")
    files(tmp_path, {"qa.37.raw.train.txt": "a", "qa.894.raw.train.txt": "a"})
    refused(formats.daquar, tmp_path, "qa.37.raw.train.txt", "qa.894.raw.train.txt")


def test_detect_lists_what_is_understood(tmp_path):
    files(tmp_path, {"readme.md": "nothing"})
    with pytest.raises(ValueError) as error:
        formats.detect(tmp_path)
    assert all(f"({name})" in str(error.value) for name in formats.FORMATS)
    files(tmp_path, {"a.png": None})
    assert formats.detect(tmp_path) == "image_folder"
    for reader in (
        formats.pairs,
        formats.questions,
        formats.statements,
        formats.captioned,
        formats.classes,
    ):
        refused(reader, tmp_path, str(tmp_path), "nothing known")
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
        reader = formats.FORMATS[name].read
        refused(reader, tmp_path, str(tmp_path))
    assert all(callable(getattr(formats, name)) for name in formats.FORMATS)
