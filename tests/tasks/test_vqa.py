"""Tests of question answering: the answer list, soft targets, the released loss, and the official
score."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit3.data.loader import RecordDataset
from beit3.data.prepare.answers import MIN_ANSWER_COUNT, build_answers, make_vqa_record
from beit3.data.stores.label_names import read_answers
from beit3.data.stores.split_files import locate_split
from beit3.data.views.preprocessing import VL_MEAN_STD, Preprocessing
from beit3.model.config import BASE, LARGE, TINY_RELEASE
from beit3.task import Batch, grow_vocabulary
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tokenizer.text import TextTokenizer
from tests.world_root import SMALL


def make_questions(*answers: str) -> list[dict]:
    return [{"multiple_choice_answer": answer} for answer in answers]


@pytest.fixture
def task(root) -> VQA:
    config = VQAConfig(
        model=replace(SMALL, final_norm=False),
        image=Preprocessing(32),
        text_length=20,
        crop=(1.0, 1.0),
        flip=0.0,
    )
    tokenizer = TextTokenizer(root / "text.model")
    task = VQA(VQA.configure(grow_vocabulary(config, tokenizer), root), tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


def make_batch(task: VQA, root: Path, count: int = 6, split: str = "train") -> Batch:
    records = list(RecordDataset(locate_split(root, "vqa", "main", split), root))[:count]
    return task.collate([task.example(record, False) for record in records])


# Answers ------------------------------------------------------------------------------------------


def test_answers_keep_the_order_of_their_first_appearance():
    questions = make_questions("red", "The two", "blue", "2", "Blue!", "", "red", "a", "green")
    assert build_answers(questions, 1) == ("red", "2", "blue", "", "green"), (
        "normalized; articles become the empty answer, as in the release"
    )
    assert build_answers(questions, 2) == ("red", "2", "blue", "")
    assert build_answers(questions, 1, is_vqa=False) == ("red", "2", "blue", "a", "green")
    with pytest.raises(ValueError, match="no answer is given 3 times"):
        build_answers(questions, 3)


def test_the_smallest_answer_count_is_the_releases():
    assert MIN_ANSWER_COUNT == 9
    assert build_answers(make_questions(*["yes"] * 9, *["no"] * 8), MIN_ANSWER_COUNT) == ("yes",)


def test_records_score_the_answers_of_the_list():
    """Scores are 0.3, 0.6, 0.9 and 1 for 1, 2, 3 and more of ten annotators. Raw answers are
    matched with the normalized list."""
    answers = ["red"] * 4 + ["blue"] * 3 + ["Red"] * 2 + ["green"]
    question = {"id": 7, "image": "a.png", "text": "which ?", "answers": answers}
    assert make_vqa_record(question, {"red", "blue"}) == {
        "id": "7",
        "image": "a.png",
        "text": "which ?",
        "answers": {"red": 1.0, "blue": pytest.approx(0.9)},
        "annotators": answers,
    }
    assert make_vqa_record(question | {"answers": ["yes"] * 2 + ["no"]}, {"yes", "no"})[
        "answers"
    ] == {
        "yes": 0.6,
        "no": 0.3,
    }


def test_the_official_score_is_by_leave_one_out():
    """Two of ten gave the answer: each of the two is matched by 1/3, the other eight by 2/3."""
    answers = ["red"] * 2 + ["Blue"] * 8
    record = make_vqa_record(
        {"id": 7, "image": "a.png", "text": "?", "answers": answers}, {"red", "blue"}
    )
    scores = VQA.score([{"id": "7", "answer": "red"}], [record])
    assert scores["official"] == pytest.approx((2 / 3 + 8 * 2 / 3) / 10) and scores[
        "accuracy"
    ] == pytest.approx(0.6)
    assert VQA.score([{"id": "7", "answer": "the blue"}], [record])["official"] == pytest.approx(
        1.0
    ), "both sides are normalized"


def test_scored_answers_stay_as_they_are_given():
    question = {
        "id": 7,
        "image": "a.png",
        "text": "?",
        "answers": {"Two": 1, "three": 0.333, "odd": 1.0},
    }
    assert make_vqa_record(question, {"2", "3"}) == {
        "id": "7",
        "image": "a.png",
        "text": "?",
        "answers": {"2": 1.0, "3": 0.333},
    }


def test_submissions_have_question_ids_and_answers():
    records = [{"id": "9", "answers": {}}, {"id": "4", "answers": {}}]
    predictions = [{"id": "4", "answer": "two"}, {"id": "9", "answer": "red"}]
    assert VQA.submission(predictions, records) == [
        {"question_id": 4, "answer": "two"},
        {"question_id": 9, "answer": "red"},
    ]
    with pytest.raises(ValueError, match="id 'train-1' is no number"):
        VQA.submission([{"id": "train-1", "answer": "a"}], [{"id": "train-1"}])


def test_the_answer_of_a_single_annotator_scores_1():
    question = {"id": 7, "image": "a.png", "text": "?", "answers": ["Two."]}
    assert make_vqa_record(question, {"2"})["answers"] == {"2": 1.0}
    assert (
        make_vqa_record(question, {"3"})["answers"]
        == {}
        == make_vqa_record(question | {"answers": []}, {"3"})["answers"]
    )


def test_preparing_writes_the_list_and_soft_answers(raw, root):
    """The list has every question's most common answer, in the order train, val."""
    names = [f"v2_mscoco_{split}2014_annotations.json" for split in ("train", "val")]
    annotations = [
        annotation
        for name in names
        for annotation in json.loads((raw / "vqa" / name).read_text())["annotations"]
    ]
    expected = tuple(
        dict.fromkeys(annotation["multiple_choice_answer"] for annotation in annotations)
    )
    assert read_answers(root / "vqa/main/answer2label.txt") == expected
    lines = [
        json.loads(line) for line in (root / "vqa/main/answer2label.txt").read_text().splitlines()
    ]
    assert lines == [{"answer": answer, "label": label} for label, answer in enumerate(expected)]
    records = {
        r["id"]: r
        for split in ("train", "val")
        for r in RecordDataset(root / f"vqa/main/{split}.jsonl", root)
    }
    assert {
        str(annotation["question_id"]): {annotation["multiple_choice_answer"]: 1.0}
        for annotation in annotations
    } == {k: r["answers"] for k, r in records.items()}


def write_easy_vqa(raw: Path, train: list[str], val: list[str]) -> Path:
    """Writes easy-VQA's files with questions about one image."""
    for folder, answers in (("train", train), ("test", val)):
        (raw / folder / "images").mkdir(parents=True)
        (raw / folder / "questions.json").write_text(
            json.dumps([["q", answer, 0] for answer in answers])
        )
        Image.new("RGB", (8, 8)).save(raw / folder / "images" / "0.png")
    return raw


def test_questions_with_rare_answers_are_dropped(tmp_path):
    """Answers are counted over train and val. Only VQA's own datasets have a smallest count by
    default, whatever the size of others."""
    raw = write_easy_vqa(
        tmp_path / "raw", ["often"] * 9_993 + ["seldom"] * 7 + ["nine"] * 8, ["seldom", "nine"]
    )
    report = VQA.prepare(raw, tmp_path / "root", "main")
    assert (
        report["answers"],
        report["answer_given_at_least"],
        report["train_dropped"],
        report["val_answerable"],
    ) == (3, 1, 0, 1.0)
    report = VQA.prepare(raw, tmp_path / "root", "main", at_least=9)
    assert read_answers(tmp_path / "root/vqa/main/answer2label.txt") == ("often", "9")
    assert report["records"] == {"train": 9_993 + 8, "val": 2} and "attention" not in report
    assert (
        report["answers"],
        report["answer_given_at_least"],
        report["train_dropped"],
        report["val_answerable"],
    ) == (2, 9, 7, 0.5)


def test_the_report_warns_of_many_dropped_questions(tmp_path):
    raw = write_easy_vqa(tmp_path / "raw", ["often"] * 8 + ["seldom"] * 2, ["often"])
    report = VQA.prepare(raw, tmp_path / "root", "main", at_least=3)
    assert (
        report["attention"].startswith("20% of the training questions")
        and "--at_least" in report["attention"]
    )
    with pytest.raises(ValueError, match="no answer is given 10 times .* smaller --at_least"):
        VQA.prepare(raw, tmp_path / "root", "main", at_least=10)


def write_vqa(
    raw: Path, answers: list[str], name: str = "v2_", chosen: bool = True, description: str = ""
) -> Path:
    """Writes VQA's training files with questions about one image; ten annotators agree."""
    questions = [
        {"question_id": k, "image_id": 1, "question": "which letter?"} for k in range(len(answers))
    ]
    annotations: list[dict] = [
        {"question_id": k, "answers": [{"answer": answer}] * 10} for k, answer in enumerate(answers)
    ]
    if chosen:
        annotations = [
            annotation | {"multiple_choice_answer": annotation["answers"][0]["answer"]}
            for annotation in annotations
        ]
    info = {"info": {"description": description}} if description else {}
    (raw / "train2014").mkdir(parents=True)
    (raw / f"{name}OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({**info, "questions": questions})
    )
    (raw / f"{name}mscoco_train2014_annotations.json").write_text(
        json.dumps({**info, "annotations": annotations})
    )
    Image.new("RGB", (8, 8)).save(raw / "train2014/COCO_train2014_000000000001.jpg")
    return raw


@pytest.mark.parametrize(
    "options", [{}, {"name": ""}, {"description": "This is v2.0 of the VQA dataset."}]
)
def test_vqas_own_datasets_get_the_releases_answer_list(tmp_path, options, monkeypatch):
    """The list has answers that are given nine times or more, the empty answer included, so that
    later answers keep the labels of the released head. A small sample lists every answer.
    """
    raw = write_vqa(tmp_path / "raw", ["a"] * 10 + ["yes"] * 9 + ["no"] * 8, **options)
    assert VQA.prepare(raw, tmp_path / "sample", "main")["answer_given_at_least"] == 1
    monkeypatch.setattr("beit3.data.prepare.answers.MIN_VQA_QUESTIONS", 27)
    report = VQA.prepare(raw, tmp_path / "root", "main")
    assert read_answers(tmp_path / "root/vqa/main/answer2label.txt") == ("", "yes")
    assert report["answer_given_at_least"] == 9 and report["records"]["train"] == 9, (
        "upstream scores answers as they stand"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"name": "", "chosen": False},
        {"name": "", "description": "OK-VQA dataset"},
        {"description": "mine"},
    ],
)
def test_other_datasets_in_vqas_format_list_every_answer(tmp_path, options):
    raw = write_vqa(tmp_path / "raw", ["A", "B", "yes"], **options)
    report = VQA.prepare(raw, tmp_path / "root", "main")
    assert read_answers(tmp_path / "root/vqa/main/answer2label.txt") == ("a", "b", "yes")
    assert report["answer_given_at_least"] == 1 and report["records"] == {"train": 3}


def test_letters_of_a_table_are_answers(tmp_path):
    (tmp_path / "raw").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "raw/0.png")
    rows = [
        {"image": "0.png", "question": "which?", "answer": answer, "split": "train"}
        for answer in ("A", "B", 0, ["A", "a", "B"])
    ]
    (tmp_path / "raw/x.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"split": "val"}])
    )
    VQA.prepare(tmp_path / "raw", tmp_path / "root", "main")
    assert read_answers(tmp_path / "root/vqa/main/answer2label.txt") == ("a", "b", "0")
    answers = [
        record["answers"]
        for record in RecordDataset(tmp_path / "root/vqa/main/train.jsonl", tmp_path)
    ]
    assert answers == [{"a": 1.0}, {"b": 1.0}, {"0": 1.0}, {"a": 0.6, "b": 0.3}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes\n no \n\ntwo words\n\n", ("yes", "no", "", "two words")),
        ('\n{"answer": "", "label": 1}\n\n{"answer": "yes", "label": 0}\n', ("yes", "")),
        ('{"answer": "no", "label": 1}\n{"answer": "yes", "label": 0}\n', ("yes", "no")),
    ],
)
def test_answer_files_are_read(tmp_path, text, expected):
    (tmp_path / "a.txt").write_text(text)
    assert read_answers(tmp_path / "a.txt") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"answer": "no", "label": 1}\n', "labels are not 0 to 0"),
        ('{"answer": "no", "label": 0}\n{"answer": "yes", "label": 0}\n', "labels are not 0 to 1"),
        ('{"label": 0}\n', "no answer list"),
        ('{"answer": "no"\n', "no answer list"),
    ],
)
def test_broken_answer_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_answers(tmp_path / "a.txt")
    assert "\n" not in str(caught.value)


def test_configure_takes_answers_and_vocabulary_from_the_data(root):
    tokenizer = TextTokenizer(root / "text.model")
    initial_config = VQAConfig(model=replace(SMALL, vocab_size=50), num_answers=1, text_length=16)
    config: Any = VQA.configure(grow_vocabulary(initial_config, tokenizer), root)
    assert config.answers == read_answers(
        root / "vqa/main/answer2label.txt"
    ) and config.num_answers == len(config.answers)
    assert config.model == replace(initial_config.model, vocab_size=tokenizer.vocab_size)
    assert grow_vocabulary(replace(initial_config, model=SMALL), tokenizer).model == SMALL, (
        "a larger table is kept: weights may fill it"
    )
    assert SMALL.max_text_length == 38
    grow_vocabulary(replace(initial_config, text_length=38), tokenizer)
    with pytest.raises(
        ValueError, match=r"task\.text_length 39 is beyond the 38 tokens of the text table"
    ):
        grow_vocabulary(replace(initial_config, text_length=39), tokenizer)


# Targets and loss ---------------------------------------------------------------------------------


def test_soft_targets_leave_unlisted_answers_out(task):
    task.answer_labels = {"yes": 1, "no": 0}
    target = task.make_soft_target({"no": 0.3, "yes": 1.0, "never heard": 0.9})
    assert target[:2].tolist() == pytest.approx([0.3, 1.0]) and float(
        target.sum()
    ) == pytest.approx(1.3)
    assert task.make_soft_target({}).sum() == 0


def test_the_loss_is_the_releases(task, root):
    """It is the binary cross-entropy, as a mean over examples and answers times the number of
    answers."""
    batch = make_batch(task, root)
    batch["target"] = torch.rand_like(batch["target"]).mul(4).round().div(4)
    logits = task.outputs(batch)["logits"]
    loss = task(batch)["losses"]["loss"] / task.targets(batch)["loss"]
    official = (
        F.binary_cross_entropy_with_logits(logits, batch["target"], reduction="mean")
        * task.config.num_answers
    )
    torch.testing.assert_close(loss, official)
    slow = 0.0
    for probabilities, targets in zip(
        logits.double().sigmoid().tolist(), batch["target"].tolist(), strict=True
    ):
        slow -= sum(
            t * torch.tensor(p).log() + (1 - t) * torch.tensor(1 - p).log()
            for p, t in zip(probabilities, targets, strict=True)
        ) / len(logits)
    assert float(loss.detach()) == pytest.approx(float(slow), rel=1e-4)


def test_accuracy_of_a_batch_is_the_soft_score_of_the_best_logit(task, root):
    batch = make_batch(task, root)
    best = task.outputs(batch)["logits"].argmax(1)
    batch["target"] = torch.zeros_like(batch["target"])
    for index, label in enumerate(best[:3]):
        batch["target"][index, label] = 0.3 * (index + 1)
    assert float(task(batch)["metrics"]["loss/accuracy"]) == pytest.approx(1.8)


def test_padding_has_no_effect(task, root):
    batch = make_batch(task, root)
    padded_batch = batch | {
        "text": F.pad(batch["text"], (0, 5), value=7),
        "text_padding": F.pad(batch["text_padding"], (0, 5), value=True),
    }
    torch.testing.assert_close(
        task.outputs(padded_batch)["logits"], task.outputs(batch)["logits"], atol=1e-5, rtol=1e-5
    )


def test_image_and_question_both_have_an_effect(task, root):
    batch = make_batch(task, root)
    logits = task.outputs(batch)["logits"]
    for key in ("image", "text"):
        assert not torch.allclose(
            task.outputs(batch | {key: batch[key].roll(3, 0)})["logits"], logits
        )


def test_only_training_augments_images(root, task):
    record = RecordDataset(root / "vqa/main/train.jsonl", root)[0]
    augmenting_task = VQA(replace(task.config, crop=(0.3, 0.6), flip=1.0), tokenizer=task.tokenizer)
    assert torch.equal(
        augmenting_task.example(record, False)["image"], task.example(record, True)["image"]
    )
    assert not torch.equal(
        augmenting_task.example(record, True)["image"], task.example(record, False)["image"]
    )


# Predictions and score ----------------------------------------------------------------------------


def test_the_answer_is_the_most_probable_one(task, root):
    batch = make_batch(task, root)
    probabilities = task.outputs(batch)["logits"].sigmoid()
    for prediction, answer_probabilities in zip(task.predict(batch), probabilities, strict=True):
        assert prediction["answer"] == task.config.answers[int(answer_probabilities.argmax())]
        assert prediction["score"] == pytest.approx(float(answer_probabilities.max().detach()))


RECORDS = [
    {"id": "1", "answers": {"yes": 1.0, "no": 0.3}},
    {"id": "2", "answers": {"no": 0.9}},
    {"id": "3", "answers": {}},
    {"id": 4, "answers": {"no": 0.6, "2": 0.6}},
]


def test_scores_equal_those_computed_by_hand():
    answers = {"4": "2", "3": "yes", "2": "no", "1": "no"}
    predictions = [{"id": key, "answer": answer} for key, answer in answers.items()]
    scores = VQA.score(predictions, RECORDS)
    assert scores["accuracy"] == pytest.approx((0.6 + 0 + 0.9 + 0.3) / 4)
    assert scores["most_frequent"] == pytest.approx((0.3 + 0.9 + 0 + 0.6) / 4), "always saying no"


def test_most_frequent_is_the_accuracy_of_always_giving_the_most_common_answer(root):
    records = [dict(record) for record in RecordDataset(root / "vqa/main/val.jsonl", root)]
    best = max(
        VQA.score([{"id": r["id"], "answer": answer} for r in records], records)["accuracy"]
        for answer in read_answers(root / "vqa/main/answer2label.txt")
    )
    counts = Counter(answer for record in records for answer in record["answers"])
    expected = max(counts.values()) / len(records)
    assert VQA.score([{"id": r["id"], "answer": "?"} for r in records], records) == {
        "accuracy": 0,
        "most_frequent": best,
        "official": 0,
    }
    assert best == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["1", "2", "3"], "1 of 4 records have no prediction, the first is 4"),
        (["1", "2", "3", "4", "2"], "two predictions for record 2"),
        (["1", "2", "3", "4", "5"], "a prediction names record 5, which is not in this split"),
    ],
)
def test_every_record_has_one_prediction(ids, message):
    with pytest.raises(ValueError, match=message):
        VQA.score([{"id": key, "answer": "no"} for key in ids], RECORDS)


# The released recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "lr", "drop_path"),
    [("base_480", BASE, 3e-5, 0.1), ("large_480", LARGE, 2e-5, 0.15)],
)
def test_recipes_have_the_releases_numbers(name, model, lr, drop_path):
    recipe = VQA.recipes[name]
    task: Any = recipe.task
    assert task.model == replace(model, image_size=480, final_norm=False, drop_path_rate=drop_path)
    assert (task.image.image_size, task.image.mean, task.image.std, task.image.resize) == (
        480,
        *VL_MEAN_STD,
        "squash",
    )
    assert (task.num_answers, task.text_length, task.crop, task.flip) == (3129, 64, (0.5, 1.0), 0.5)
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.betas, optim.eps, optim.weight_decay) == (
        lr,
        1e-6,
        (0.9, 0.98),
        1e-8,
        0.01,
    )
    assert (
        optim.warmup_epochs,
        optim.warmup_steps,
        optim.layer_decay,
        optim.head_lr_scale,
        optim.clip,
    ) == (1, 0, 1.0, 20, 0)
    assert recipe.data.batch == {"main": 128} and recipe.run.epochs == 10 and not recipe.run.steps


def test_unused_parameters_of_the_released_form():
    """Unused are the text side of the last layer without its keys and values, and the mask token.
    The release counts two more tensors, the text's queries, which are rows of a used tensor in this
    package."""
    with torch.device("meta"):
        task = VQA(VQAConfig(model=replace(TINY_RELEASE, final_norm=False)))
    unused = tuple(f"{prefix}." for prefix in task.unused_parameters)
    names = [name for name, _ in task.trainable_parameters() if f"{name}.".startswith(unused)]
    assert len(names) == 13 and all(
        ".text." in name or name.endswith("mask_token") for name in names
    )
