"""Tests of retrieval: features of images or texts alone, several captions per record, and distinct
images."""

import numpy as np
import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.ops.losses import contrastive_loss
from beit3.task import grow_vocabulary
from beit3.tasks.retrieval import Retrieval
from beit3.tokenizer.text import TextTokenizer
from tests.world_root import make_finetuning_recipe


@pytest.fixture(scope="module")
def task(root) -> Retrieval:
    tokenizer = TextTokenizer(root / "text.model")
    task = Retrieval(
        grow_vocabulary(make_finetuning_recipe("retrieval", root).task, tokenizer),
        tokenizer=tokenizer,
    )
    task.init_weights(0)
    return task.eval()


def test_contrastive_loss_is_the_cross_entropy_of_rows_and_columns():
    generator = np.random.default_rng(0)
    image, text = (generator.normal(size=(5, 8)) for _ in range(2))
    image, text = (
        features / np.linalg.norm(features, axis=1, keepdims=True) for features in (image, text)
    )
    similarities = 7.0 * image @ text.T
    total = 0.0
    for i in range(5):
        total -= 0.5 * (similarities[i, i] - np.log(np.exp(similarities[i]).sum()))
        total -= 0.5 * (similarities[i, i] - np.log(np.exp(similarities[:, i]).sum()))
    loss, num_correct = contrastive_loss(
        torch.tensor(image), torch.tensor(text), torch.tensor([7.0], dtype=torch.float64)
    )
    assert float(loss) == pytest.approx(total, rel=1e-12)
    assert int(num_correct) == sum(
        similarities[i].argmax() == i == similarities[:, i].argmax() for i in range(5)
    )


def test_images_and_texts_alone_have_the_same_features(task, root):
    records = list(RecordDataset(root / "retrieval/main/val.jsonl", root))[:3]
    assert [len(record["captions"]) for record in records] == [3, 3, 3]
    predictions = task.predict(task.collate([task.example(record, False) for record in records]))
    for record, prediction in zip(records, predictions, strict=True):
        assert prediction["image"].shape == (32,) and prediction["texts"].shape == (3, 32)
        np.testing.assert_allclose(np.linalg.norm(prediction["texts"], axis=1), 1, rtol=1e-5)
        (alone,) = task.predict(
            task.collate([task.example({"id": "0", "image": record["image"]}, False)])
        )
        np.testing.assert_allclose(alone["image"], prediction["image"], atol=1e-5)
        (alone,) = task.predict(
            task.collate([task.example({"id": "0", "text": record["captions"][1]}, False)])
        )
        np.testing.assert_allclose(alone["texts"][0], prediction["texts"][1], atol=1e-5)


def test_a_record_per_caption_scores_as_a_record_per_image():
    rng = np.random.default_rng(1)
    images, texts = (
        rng.normal(size=(4, 6)).astype(np.float32),
        rng.normal(size=(4, 3, 6)).astype(np.float32),
    )
    scores_per_image = Retrieval.score(
        [{"id": str(i), "image": images[i], "texts": texts[i]} for i in range(4)],
        [{"id": str(i), "image_id": i} for i in range(4)],
    )
    positions = [(i, k) for k in range(3) for i in range(4)]
    scores_per_caption = Retrieval.score(
        [
            {"id": f"{i}#{k}", "image": images[i], "texts": texts[i, k : k + 1]}
            for i, k in positions
        ],
        [{"id": f"{i}#{k}", "image_id": i} for i, k in positions],
    )
    assert (
        scores_per_image == pytest.approx(scores_per_caption)
        and 0 < scores_per_image["mean_recall"] < 1
    )


def test_training_needs_one_caption_a_record(task, root):
    records = list(RecordDataset(root / "retrieval/main/val.jsonl", root))[:2]
    batch = task.collate([task.example(record, False) for record in records])
    with pytest.raises(ValueError, match="2 images and 6 texts"):
        task(batch)
    with pytest.raises(ValueError, match="lacks an image or captions"):
        Retrieval.score([{"id": "1", "image": np.ones(3)}], [{"id": "1", "image_id": 1}])


def test_the_temperature_starts_at_the_releases_value(task):
    assert float(task.logit_scale.exp()) == pytest.approx(1 / 0.07)


def test_similarities_stay_precise_under_autocast():
    """Features and temperature are float32. A product in bfloat16 would change logits of 100 by
    half a nat."""
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 32), dim=-1) for _ in range(2))
    plain, _ = contrastive_loss(image, text, torch.tensor([100.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = contrastive_loss(image, text, torch.tensor([100.0]))
    assert torch.equal(plain, cast)


def test_records_of_one_batch_have_the_same_fields(task, root):
    records = list(RecordDataset(root / "retrieval/main/val.jsonl", root))[:2]
    examples = [
        task.example(records[0], False),
        task.example({"id": "7", "image": records[1]["image"]}, False),
    ]
    with pytest.raises(ValueError, match=r"record 7 gives no text(_padding)?, record .* does"):
        task.collate(examples)


def test_features_of_different_widths_are_refused():
    predictions = [{"id": 1, "image": [0.1], "texts": [[0.1, 0.2]]}]
    with pytest.raises(ValueError, match=r"features of different widths \[1, 2\]: predict"):
        Retrieval.score(predictions, [{"id": 1, "image": "a.jpg"}])
