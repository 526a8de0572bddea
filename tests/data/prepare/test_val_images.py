"""Tests of `prepare vqa --val_images`: most of val becomes training data, as upstream splits it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.prepare.val_images import train_on_val
from beit3.data.stores.records import Records
from beit3.tasks.vqa import VQA

NUM_VAL_IMAGES = 12


def make_questions(folder: str = "val2014") -> list[tuple[str, dict]]:
    """Two questions about each of 12 val images, and one training and one test question."""
    val = [
        ("val", {"id": 10 * image + k, "image": f"/{folder}/{image:012d}.jpg", "text": "what?"})
        for image in range(NUM_VAL_IMAGES)
        for k in range(2)
    ]
    return [
        ("train", {"id": 1000, "image": "/a.jpg"}),
        *val,
        ("test", {"id": 1001, "image": "/b.jpg"}),
    ]


def write_vqav2(raw: Path) -> Path:
    """Writes VQAv2's files: val has 12 images with two questions, Visual Genome shows them too."""
    for split, num_images in (("train", 1), ("val", NUM_VAL_IMAGES)):
        (raw / f"{split}2014").mkdir(parents=True)
        questions, annotations = [], []
        for image in range(1, num_images + 1):
            path = raw / f"{split}2014/COCO_{split}2014_{image + len(split) * 100:012d}.jpg"
            Image.new("RGB", (8, 8)).save(path)
            for k in range(2):
                id = (image + len(split) * 100) * 1000 + k
                questions.append(
                    {"question_id": id, "image_id": image + len(split) * 100, "question": "what?"}
                )
                annotations.append(
                    {
                        "question_id": id,
                        "answers": [{"answer": "yes"}] * 10,
                        "multiple_choice_answer": "yes",
                    }
                )
        (raw / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(
            json.dumps({"questions": questions})
        )
        (raw / f"v2_mscoco_{split}2014_annotations.json").write_text(
            json.dumps({"annotations": annotations})
        )
    (raw / "VG_100K").mkdir()
    genome, image_data = [], []
    for image in range(1, NUM_VAL_IMAGES + 1):
        Image.new("RGB", (8, 8)).save(raw / f"VG_100K/{image}.jpg")
        genome.append({"id": image, "qas": [{"qa_id": image, "question": "is?", "answer": "yes"}]})
        image_data.append({"image_id": image, "coco_id": image + 300})
    (raw / "question_answers.json").write_text(json.dumps(genome))
    (raw / "image_data.json").write_text(json.dumps(image_data))
    return raw


def test_questions_about_an_image_stay_together_and_the_choice_does_not_depend_on_the_folder():
    moved, ids = train_on_val(make_questions(), 3)
    assert [question["id"] for _, question in moved] == [q["id"] for _, q in make_questions()]
    held_out = {question["image"] for split, question in moved if split == "val"}
    in_train = {question["image"] for split, question in moved if split == "train"}
    assert len(held_out) == 3 and not held_out & in_train and moved[-1][0] == "test"
    assert ids == {
        str(question["id"])
        for split, question in moved
        if split == "train" and question["id"] != 1000
    }
    assert [split for split, _ in train_on_val(make_questions("elsewhere"), 3)[0]] == [
        split for split, _ in moved
    ]


@pytest.mark.parametrize("num_held_out", [NUM_VAL_IMAGES, 1000])
def test_a_val_split_that_would_not_be_trained_on_is_refused(num_held_out):
    with pytest.raises(ValueError, match=f"--val_images {num_held_out}: val has 12 images"):
        train_on_val(make_questions(), num_held_out)


def test_prepare_moves_val_questions_and_visual_genomes_about_the_same_images(tmp_path):
    raw = write_vqav2(tmp_path / "raw")
    report = VQA.prepare(raw, tmp_path / "official", "main")
    assert report["records"] == {"train": 2, "val": 24}, "official splits, no image of val in train"
    report = VQA.prepare(raw, tmp_path / "root", "main", val_images=4)
    assert report["records"] == {"train": 2 + 16 + 8, "val": 8}
    names = {
        split: [
            Path(record["image"]).stem
            for record in Records(tmp_path / f"root/vqa/main/{split}.jsonl")
        ]
        for split in ("train", "val")
    }
    held_out_ids = {int(name[-12:]) - 300 for name in names["val"]}
    genome_ids = {int(name) for name in names["train"] if name.isdecimal()}
    assert len(held_out_ids) == 4
    assert genome_ids == set(range(1, NUM_VAL_IMAGES + 1)) - held_out_ids
