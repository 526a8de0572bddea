"""Tests of visual reasoning: two images of a statement, boxes, and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.loader import RecordDataset
from beit3.task import grow_vocabulary
from beit3.tasks.nlvr2 import NLVR2, crop_box
from beit3.tokenizer.text import TextTokenizer
from tests.world_root import make_finetuning_recipe


@pytest.fixture(scope="module")
def task(root) -> NLVR2:
    tokenizer = TextTokenizer(root / "text.model")
    task = NLVR2(
        grow_vocabulary(make_finetuning_recipe("nlvr2", root).task, tokenizer), tokenizer=tokenizer
    )
    task.init_weights(0)
    return task.eval()


def test_the_head_reads_both_pairs_in_order(task, root):
    """Compares with pairs that are encoded one by one."""
    records = [RecordDataset(root / "nlvr2/main/train.jsonl", root)[i] for i in range(3)]
    batch = task.collate([task.example(record, False) for record in records])
    assert batch["image"].shape == (3, 2, 3, 32, 32)
    with torch.no_grad():
        logits = task.outputs(batch)["logits"]
        for index in range(3):
            states = []
            for side in range(2):
                selected = slice(index, index + 1)
                text, padding = batch["text"][selected], batch["text_padding"][selected]
                encoded = task.backbone(
                    task.normalize_images(batch)[selected, side], text, text_padding=padding
                )
                states += [encoded.first("image"), encoded.first("text")]
            torch.testing.assert_close(
                task.head(torch.cat(states, 1))[0], logits[index], rtol=1e-5, atol=1e-6
            )


def test_boxes_cut_a_canvas_into_two_images(task, tmp_path):
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 25:] = 255
    Image.fromarray(pixels).save(tmp_path / "canvas.png")
    record = {
        "id": "1",
        "image": str(tmp_path / "canvas.png"),
        "image2": str(tmp_path / "canvas.png"),
        "text": "a red circle",
        "label": 1,
    }
    boxes = [[0, 0, 25, 10], [25, 0, 40, 10]]
    first, second = task.example(record | {"boxes": boxes}, False)["image"]
    assert first.max() == 0 and second.min() == 255
    with pytest.raises(
        ValueError, match=r"box \[0, 0, 41, 10\] does not lie in an image of 40 x 10"
    ):
        task.example(record | {"boxes": [[0, 0, 41, 10], [25, 0, 40, 10]]}, False)


def test_a_box_is_left_top_right_bottom():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    assert torch.equal(crop_box(image, [1, 2, 5, 4]), image[:, 2:4, 1:5])


def test_each_image_gets_a_crop_of_its_own(task, root):
    record = RecordDataset(root / "nlvr2/main/train.jsonl", root)[0]
    augmenting_task = NLVR2(
        replace(task.config, crop=(0.3, 0.6), flip=0.5), tokenizer=task.tokenizer
    )
    same_image_twice = record | {"image2": record["image"]}
    example = augmenting_task.example(same_image_twice, True, rng=np.random.default_rng(0))
    first, second = example["image"]
    assert not torch.equal(first, second)


def test_consistency_counts_statements_that_are_right_on_all_images():
    records = [
        {"id": str(i), "label": label, "group": group}
        for i, (label, group) in enumerate(zip([1, 0, 1, 1], "aabc", strict=True))
    ]
    predictions = [
        {"id": str(i), "answer": answer}
        for i, answer in enumerate(["true", "true", "true", "false"])
    ]
    scores = NLVR2.score(predictions, records)
    assert scores == {"accuracy": 0.5, "consistency": pytest.approx(1 / 3), "most_frequent": 0.75}
    with pytest.raises(ValueError, match="no label"):
        NLVR2.score(predictions[:1], [{"id": "0"}])


def test_labels_other_than_0_and_1_are_refused(task, root):
    record = RecordDataset(root / "nlvr2/main/train.jsonl", root)[0]
    with pytest.raises(ValueError, match="label 2 is neither"):
        task.example(record | {"label": 2}, False)
    unlabeled = {key: value for key, value in record.items() if key != "label"} | {"id": "7"}
    with pytest.raises(ValueError, match="record 7 gives no target"):
        task.collate([task.example(record, False), task.example(unlabeled, False)])
