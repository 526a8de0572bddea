"""OK-VQA, tables of questions and Visual Genome: real samples, small files, and errors of broken
files."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from beit3.data.prepare.answers import build_answers, make_vqa_record
from beit3.data.prepare.formats.detect import detect_format, read_extra_questions, read_questions
from tests.data.prepare.test_formats import assert_refused, count_splits, find_sample, write_files

# OK-VQA -------------------------------------------------------------------------------------------


def test_okvqa_official(tmp_path):
    """VQA's files but for the chosen answer; `answer` is what its scores compare, `raw_answer` what
    people typed."""
    asked = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 7, "question": "What race?", "question_id": 75}],
    }
    votes = [
        {"answer_id": k, "raw_answer": "racing" if k else "Pony", "answer": "race" if k else "pony"}
        for k in range(10)
    ]
    answered = {
        "annotations": [
            {
                "image_id": 7,
                "question_id": 75,
                "answer_type": "other",
                "question_type": "four",
                "answers": votes,
            }
        ]
    }
    write_files(
        tmp_path,
        {
            "OpenEnded_mscoco_val2014_questions.json": asked,
            "mscoco_val2014_annotations.json": answered,
        },
    )
    write_files(tmp_path, {"val2014/COCO_val2014_000000000007.jpg": None})
    ((split, record),) = read_questions(tmp_path)
    assert (
        split == "val"
        and record["id"] == 75
        and record["image"] == str(tmp_path / "val2014/COCO_val2014_000000000007.jpg")
    )
    assert (
        record["answers"] == ["pony", *["race"] * 9] and record["multiple_choice_answer"] == "race"
    )
    del votes[3]["answer"]
    write_files(tmp_path, {"mscoco_val2014_annotations.json": answered})
    assert_refused(
        read_questions, tmp_path, "mscoco_val2014_annotations.json annotations[0] has no answer"
    )


def test_real_okvqa_soft_labels():
    raw = find_sample("coco_mini")
    rows = {
        row["question_id"]: row
        for row in json.loads((raw / "annotations/okvqa_soft_labels.json").read_text())
    }
    for place in (raw, raw / "annotations/okvqa_soft_labels.json"):
        pairs = list(read_questions(place))
        assert count_splits(pairs) == {"train": 6, "val": 8}
        for split, record in pairs:
            row = rows[int(record["id"])]
            assert row["okvqa_split"] == f"{split}2014" and record["text"] == row["question"]
            assert record["answers"] == row["label"] and record["answers"][
                record["multiple_choice_answer"]
            ] == max(row["label"].values())
            assert record["image"] == str(raw / row["image"]) and Path(record["image"]).is_file()


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "image,question,answer\na.png,What?,Red\na.png,Is it?,yes\n"),
        (
            "mine.tsv",
            "split\timg\ttext\tanswer\ntrain\ta.png\tWhat?\tRed\ntrain\ta.png\tIs "
            "it?\tyes\nval\ta.png\tWho?\tme\n",
        ),
        (
            "train.jsonl",
            '{"image": "a.png", "question": "What?", "answer": "Red"}\n'
            '{"image": "a.png", "question": "Is it?", "answers": ["yes"]}\n',
        ),
    ],
)
def test_tables_of_questions(tmp_path, name, content):
    write_files(tmp_path, {name: content, "images/a.png": None})
    if not name.startswith("mine"):
        write_files(tmp_path, {"val.csv": "image,question,answer\na.png,Who?,me\n"})
    pairs = list(read_questions(tmp_path))
    assert count_splits(pairs) == {"train": 2, "val": 1}
    one, two = (record for split, record in pairs if split == "train")
    image = str(tmp_path / "images/a.png")
    assert one == {
        "id": "a.png#0",
        "image": image,
        "text": "What?",
        "answers": ["Red"],
        "multiple_choice_answer": "Red",
    }
    assert (two["id"], two["text"], two["answers"]) == ("a.png#1", "Is it?", ["yes"])


def test_several_answers_scores_and_given_ids(tmp_path):
    rows = [
        {
            "id": 5,
            "image": "a.png",
            "question": "x",
            "answers": ["no", "yes", "yes"],
            "split": "train",
        },
        {
            "id": 6,
            "image": "a.png",
            "question": "x",
            "answers": {"no": 0.3, "yes": 1},
            "split": "val",
        },
        {"id": 7, "image": "a.png", "question": "x", "answer": 3, "split": "val"},
        {"id": 8, "image": "a.png", "question": "x", "split": "test"},
    ]
    write_files(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert [
        (r["id"], r["answers"], r["multiple_choice_answer"]) for _, r in read_questions(tmp_path)
    ] == [
        ("5", ["no", "yes", "yes"], "yes"),
        ("6", {"no": 0.3, "yes": 1}, "yes"),
        ("7", ["3"], "3"),
        ("8", [], None),
    ]


def test_questions_are_held_out_by_image(tmp_path):
    rows = "".join(f"{n % 300}.png,question {n},x\n" for n in range(900))
    pairs = list(read_questions(write_files(tmp_path, {"x.csv": "image,question,answer\n" + rows})))
    sides = {
        split: {record["image"] for side, record in pairs if side == split}
        for split in ("train", "val")
    }
    assert not sides["train"] & sides["val"] and 3 < len(sides["val"]) < 40


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_cells_hold_one_answer_or_many(tmp_path, suffix):
    """As Python, JSON and pandas write them; what is empty is left out, and counted."""
    cells = {
        "['red', 'red', 'blue']": ["red", "red", "blue"],
        '["Red", "blue", "blue", "red", "RED "]': ["Red", "blue", "blue", "red", "RED"],
        "{'no': 0.3, 'yes': 1}": {"no": 0.3, "yes": 1},
        "['red', None]": ["red"],
        "[a] or [b]": ["[a] or [b]"],
        "none": ["none"],
        "0": ["0"],
    }
    rows = [("a.png", "what?", cell) for cell in [*cells, "", "nan", "[]", "[None]"]]
    with (tmp_path / f"x{suffix}").open("w", newline="") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([("image", "question", "answer"), *rows])
        else:
            names = ("image", "question", "answers")
            file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    records = [record for _, record in read_questions(tmp_path)]
    assert [record["answers"] for record in records[: len(cells)]] == [*cells.values()]
    assert [record["fault"] for record in records[len(cells) :]] == ["it has no answer"] * 4
    assert records[0]["multiple_choice_answer"] == "red"
    assert records[1]["multiple_choice_answer"] == "Red", "three spellings of one answer win"
    assert records[2]["multiple_choice_answer"] == "yes"
    assert [record.get("null_answers", 0) for record in records[: len(cells)]] == [0, 0, 0, 1] + [
        0
    ] * 3


def test_spellings_of_an_answer_are_one_answer(tmp_path):
    answers = [["Red"], ["red "], ["RED", "red", "blue"], {"Red": 0.3, "red": 0.6}, ["caf\u00e9"]]
    answers += [["cafe\u0301"], [None], 3.0, "3"]
    rows = [
        {"image": "a.png", "question": "x", "answers": value, "split": "train"} for value in answers
    ]
    write_files(tmp_path, {"x.jsonl": "\n".join(map(json.dumps, rows))})
    questions = [question for _, question in read_questions(tmp_path)]
    vocabulary = build_answers(questions, 1, is_vqa=False)
    assert vocabulary == ("red", "caf\u00e9", "3")
    records = [make_vqa_record(question, vocabulary, is_vqa=False) for question in questions]
    scores = [record.get("answers") for record in records]
    assert scores[:3] == [{"red": 1.0}, {"red": 1.0}, {"red": 0.6}]
    assert scores[3] == {"red": pytest.approx(0.9)}
    assert scores[4:] == [{"caf\u00e9": 1.0}] * 2 + [None] + [{"3": 1.0}] * 2


def test_arrays_without_commas_are_refused(tmp_path):
    write_files(tmp_path, {"x.csv": "image,question,answer\na.png,what?,['red' 'blue']\n"})
    assert_refused(read_questions, tmp_path, "x.csv line 2", "lacks commas", "JSON")


BROKEN = [
    (
        "x.csv",
        "image,answer\na.png,b\n",
        ["x.csv has the columns 'image', 'answer'", "one question (or text"],
    ),
    (
        "x.jsonl",
        '{"image": "a.png", "question": "x", "answer": {"yes": 2}}\n',
        ["x.jsonl line 1", "numbers from 0 to 1"],
    ),
    (
        "x.jsonl",
        '{"image": "a.png", "question": "x", "answer": [["yes"]]}\n',
        ["x.jsonl line 1", "a list of answers"],
    ),
    (
        "x.jsonl",
        '{"image": "a.png", "question": 3, "answer": "b"}\n',
        ["x.jsonl line 1 has no question (str)"],
    ),
    (
        "x.jsonl",
        '["a.png", "what?", "x"]\n',
        ["x.jsonl line 1 holds a list", "an image, a question"],
    ),
    ("okvqa_soft_labels.json", {"questions": []}, ["okvqa_soft_labels.json holds a dict"]),
    (
        "okvqa_soft_labels.json",
        [{"image": "a.png", "label": {}}],
        ["okvqa_soft_labels.json [0] has the columns", "question"],
    ),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_broken_tables(tmp_path, name, content, words):
    assert_refused(read_questions, write_files(tmp_path, {name: content}), *words)


def test_a_question_without_an_answer_is_a_fault(tmp_path):
    write_files(tmp_path, {"x.csv": "image,question,answer\na.png,What?,\nb.png,What?,Red\n"})
    assert [record.get("fault") for _, record in read_questions(tmp_path)] == [
        "it has no answer",
        None,
    ]


def test_a_table_of_ones_own_may_be_called_as_daquars(tmp_path):
    write_files(tmp_path, {"data_train.csv": "image,question,answer\na.png,What?,Red\n"})
    assert detect_format(tmp_path, "daquar", "question_tables") == "question_tables"


# Visual Genome ------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path) -> Path:
    """VQA's validation asks about COCO's image 42, which is Visual Genome's 2."""
    entries = [
        {
            "id": id,
            "qas": [
                {
                    "qa_id": 10 * id + k,
                    "image_id": id,
                    "question": f"What {k}?",
                    "answer": f"Thing {k}.",
                }
                for k in range(2)
            ],
        }
        for id in (1, 2, 3)
    ]
    write_files(
        tmp_path,
        {"genome/question_answers.json": entries, "VG_100K/1.jpg": None, "VG_100K_2/2.jpg": None},
    )
    for split, image in (("val", 42), ("train", 43)):
        questions = [{"question_id": image, "image_id": image, "question": "Who?"}]
        write_files(
            tmp_path, {f"v2_OpenEnded_mscoco_{split}2014_questions.json": {"questions": questions}}
        )
    return tmp_path


def test_visual_genome(genome):
    write_files(genome, {"genome/image_data.json": [{"image_id": 9, "coco_id": 42}]})
    pairs = list(read_extra_questions(genome))
    assert count_splits(pairs) == {"train": 6}
    assert pairs[0][1] == {
        "id": "vg-10",
        "image": str(genome / "VG_100K/1.jpg"),
        "text": "What 0?",
        "answers": ["Thing 0."],
        "multiple_choice_answer": "Thing 0.",
    }
    images = Counter(Path(record["image"]).relative_to(genome).as_posix() for _, record in pairs)
    assert images == {"VG_100K/1.jpg": 2, "VG_100K_2/2.jpg": 2, "VG_100K/3.jpg": 2}, (
        "a missing one is prepare's to count"
    )
    assert count_splits(read_questions(genome)) == {"train": 1, "val": 1}, (
        "they are no questions of VQA's own"
    )


def test_visual_genome_leaves_out_what_val_asks_about(genome):
    known = [
        {"image_id": 1, "coco_id": 43},
        {"image_id": 2, "coco_id": 42},
        {"image_id": 3, "coco_id": None},
    ]
    write_files(genome, {"genome/image_data.json": known})
    assert [record["id"] for _, record in read_extra_questions(genome)] == [
        "vg-10",
        "vg-11",
        "vg-30",
        "vg-31",
    ]


def test_visual_genome_beside_val_needs_to_know_its_images(genome):
    """Else val's images would be trained on."""
    assert_refused(
        read_extra_questions,
        genome,
        "needs its image_data.json",
        "v2_OpenEnded_mscoco_val2014_questions.json",
    )
    for content in (["x"], [{"coco_id": 42}], {"image_id": 1}):
        assert_refused(
            read_extra_questions,
            write_files(genome, {"genome/image_data.json": content}),
            "image_data.json",
        )


def test_no_or_broken_visual_genome(genome, tmp_path):
    write_files(genome, {"genome/image_data.json": []})
    assert list(read_extra_questions(write_files(tmp_path / "none", {"a.txt": ""}))) == []
    write_files(
        genome,
        {"genome/question_answers.json": [{"id": 1, "qas": [{"qa_id": 1, "question": "x"}]}]},
    )
    assert_refused(read_extra_questions, genome, "question_answers.json [0] has no answer")
    write_files(genome, {"genome/question_answers.json": [{"image": 1}]})
    assert_refused(read_extra_questions, genome, "question_answers.json [0] has no id")
    write_files(genome, {"genome/question_answers.json": {"id": 1}})
    assert_refused(read_extra_questions, genome, "question_answers.json")
