"""Tests of masked data modeling: masks, losses, the paper's numbers, and cached codes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit3.data.loader import RecordDataset
from beit3.data.views.masking import IGNORE_INDEX
from beit3.data.views.preprocessing import VL_MEAN_STD, Preprocessing
from beit3.images import open_image
from beit3.model.config import BASE, GIANT, LARGE
from beit3.seeding import make_rng
from beit3.task import Batch
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig
from beit3.training.loop import train
from beit3.weights.store import save_weights
from tests.training.runs import read_metrics
from tests.world_root import NUM_CODES, SMALL, make_pretrain_recipe

MODEL = replace(SMALL, vocab_size=512, text_positions=50)
"""A network of 4 x 4 patches of 8 pixels."""
PAIR_LENGTH, TEXT_LENGTH = 24, 48
NUM_MASKED = 6
"""Masked patches of an image: floor(0.4 * 16)."""


def make_config(visual_tokenizer: Path | str = "", **fields: Any) -> PretrainConfig:
    config = PretrainConfig(
        model=MODEL,
        image=Preprocessing(32),
        num_codes=NUM_CODES,
        token_size=32,
        min_mask_block=3,
        visual_tokenizer=str(visual_tokenizer),
        text_length=PAIR_LENGTH,
        monomodal_text_length=TEXT_LENGTH,
    )
    return replace(config, **fields)


def make_task(root: Path, visual_tokenizer: Path | str = "", **fields: Any) -> Pretrain:
    tokenizer = TextTokenizer(root / "text.model")
    task = Pretrain(make_config(visual_tokenizer, **fields), tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


def read_records(root: Path, source: str) -> list[dict]:
    return list(RecordDataset(root / f"pretrain/{source}/train.jsonl", root))


def make_batch(task: Pretrain, records: list[dict], count: int = 6) -> Batch:
    return task.collate([task.example(record, False) for record in records[:count]])


def make_train_example(task: Pretrain, record: dict, epoch: int = 0) -> dict[str, Any]:
    return task.example(record, True, rng=make_rng(0, epoch, record["id"]))


@pytest.fixture
def task(root, vqkd_weights) -> Pretrain:
    return make_task(root, vqkd_weights)


# Masking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "rate", "length"), [("texts", 0.15, TEXT_LENGTH), ("pairs", 0.5, PAIR_LENGTH)]
)
def test_a_fraction_of_the_tokens_is_masked_and_no_special_token(task, root, source, rate, length):
    for record in read_records(root, source)[:20]:
        example = make_train_example(task, record)
        token_ids = task.tokenizer.encode(record["text"], length)
        is_masked = example["text_target"] != IGNORE_INDEX
        assert example["text"].shape == example["text_target"].shape == (length,)
        assert int(is_masked.sum()) == max(1, round(rate * (len(token_ids) - 2)))
        assert not is_masked[0], "BOS is never masked"
        assert not is_masked[len(token_ids) - 1 :].any(), "EOS and padding are never masked"
        for position, token_id in enumerate(token_ids):
            key = "text_target" if is_masked[position] else "text"
            assert int(example[key][position]) == token_id
        is_padding = [position >= len(token_ids) for position in range(length)]
        assert example["text_padding"].tolist() == is_padding


@pytest.mark.parametrize(
    ("model", "num_patches", "num_masked"),
    [(MODEL, 16, 6), (replace(BASE, depth=1), 196, 78), (replace(GIANT, depth=3), 256, 102)],
)
def test_forty_percent_of_the_patches_are_masked(root, model, num_patches, num_masked):
    """The numbers are floor(0.4 * 16), floor(0.4 * 196) and floor(0.4 * 256)."""
    with torch.device("meta"):
        task = Pretrain(make_config(model=model, image=Preprocessing(model.image_size)))
    for record in read_records(root, "images")[:5]:
        mask = make_train_example(task, record)["image_mask"]
        assert mask.shape == (num_patches,) and mask.dtype == torch.bool
        assert int(mask.sum()) == num_masked


def test_patches_are_masked_in_blocks(root):
    """Nearly every masked patch has a masked neighbor; patches drawn one by one would not."""
    with torch.device("meta"):
        task = Pretrain(PretrainConfig(model=replace(BASE, depth=1)))
    for record in read_records(root, "images")[:5]:
        mask = make_train_example(task, record)["image_mask"].reshape(14, 14).numpy()
        padded = np.pad(mask, 1)
        vertical = padded[:-2, 1:-1] | padded[2:, 1:-1]
        horizontal = padded[1:-1, :-2] | padded[1:-1, 2:]
        has_neighbor = vertical | horizontal
        assert (mask & has_neighbor).sum() >= 0.9 * mask.sum()


@pytest.mark.parametrize("pair_masking", ["both", "text_only", "image_only"])
def test_pair_masking_decides_what_is_masked_in_pairs(root, pair_masking):
    task = make_task(root, pair_masking=pair_masking)
    for record in read_records(root, "pairs")[:10]:
        example = make_train_example(task, record)
        token_ids = task.tokenizer.encode(record["text"], PAIR_LENGTH)
        assert ("image_mask" in example) == (pair_masking != "text_only")
        assert ("token_image" in example) == (pair_masking != "text_only")
        assert ("text_target" in example) == (pair_masking != "image_only")
        if pair_masking == "image_only":
            assert example["text"][: len(token_ids)].tolist() == token_ids
        if pair_masking != "text_only":
            assert int(example["image_mask"].sum()) == NUM_MASKED


@pytest.mark.parametrize("pair_masking", ["text_only", "image_only", "alternate"])
def test_images_and_texts_alone_are_masked_whatever_pair_masking_is(root, pair_masking):
    task = make_task(root, pair_masking=pair_masking)
    image_example = task.example(read_records(root, "images")[0], True)
    assert int(image_example["image_mask"].sum()) == NUM_MASKED
    text_example = task.example(read_records(root, "texts")[0], True)
    assert (text_example["text_target"] != IGNORE_INDEX).any()


def test_alternate_masks_one_modality_of_a_pair_at_random(root):
    """Each record draws its modality anew in every epoch."""
    task = make_task(root, pair_masking="alternate")
    counts: Counter[tuple[bool, str]] = Counter()
    for epoch in range(2):
        for record in read_records(root, "pairs")[:60]:
            example = make_train_example(task, record, epoch)
            num_patches = int(example["image_mask"].sum())
            num_tokens = int((example["text_target"] != IGNORE_INDEX).sum())
            assert num_patches in (0, NUM_MASKED)
            assert (num_patches > 0) != (num_tokens > 0)
            counts[num_patches > 0, record["id"]] += 1
    num_images = sum(count for (image_is_masked, _), count in counts.items() if image_is_masked)
    assert 30 < num_images < 90, "120 draws of probability 1/2"
    assert any(count == 1 for count in counts.values()), "some records differ between the epochs"
    assert len({task.choose_masked(True, make_rng(0, 0, "a")) for _ in range(5)}) == 1


def test_network_and_visual_tokenizer_get_the_same_crop(root):
    task = make_task(root)
    for record in read_records(root, "images")[:4]:
        example = make_train_example(task, record, epoch=1)
        assert example["image"].dtype == torch.uint8
        assert torch.equal(example["image"], example["token_image"])


def test_evaluation_has_fixed_masks_and_entire_images(root):
    task = make_task(root, image_flip=1.0)
    record = read_records(root, "images")[0]
    first, second = task.example(record, False), task.example(record, False)
    assert torch.equal(first["image_mask"], second["image_mask"])
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["token_image"], open_image(record["image"]))


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["images", "texts", "pairs"])
def test_losses_at_masked_positions_are_those_of_the_full_logits(task, root, source):
    batch = make_batch(task, read_records(root, source))
    outputs = task.outputs(batch)
    masks, targets = {}, {}
    if "image_mask" in batch:
        masks["image"], targets["image"] = batch["image_mask"], task.compute_codes(batch)
    if "text_target" in batch:
        targets["text"] = batch["text_target"]
        masks["text"] = targets["text"] != IGNORE_INDEX
    masked_losses = list(task.compute_masked_losses(batch))
    assert [masked.modality for masked in masked_losses] == list(masks)
    for modality, losses, is_correct, mask in masked_losses:
        assert torch.equal(mask, masks[modality])
        target = targets[modality][mask]
        logits = outputs[f"{modality}_logits"][mask]
        expected = F.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(is_correct, logits.argmax(-1) == target)


@pytest.mark.parametrize(
    ("source", "pair_masking", "names"),
    [
        ("images", "both", ["image"]),
        ("texts", "both", ["text"]),
        ("pairs", "both", ["pair_image", "pair_text"]),
        ("pairs", "text_only", ["pair_text"]),
        ("pairs", "image_only", ["pair_image"]),
        ("pairs", "alternate", ["pair_image", "pair_text"]),
    ],
)
def test_losses_of_pairs_have_names_and_counts_of_their_own(
    root, vqkd_weights, source, pair_masking, names
):
    task = make_task(root, vqkd_weights, pair_masking=pair_masking)
    batch = make_batch(task, read_records(root, source), 30)
    counts, result = task.targets(batch), task(batch)
    assert list(counts) == list(result["losses"]) == names
    assert [name.rpartition("/")[0] for name in result["metrics"]] == names
    for name, count in counts.items():
        if name.endswith("image"):
            mask = batch["image_mask"]
        else:
            mask = batch["text_target"] != IGNORE_INDEX
        assert count == int(mask.sum()) > 0
        assert 0 <= int(result["metrics"][f"{name}/accuracy"]) <= count


@pytest.mark.parametrize(
    ("source", "pair_masking", "num_visible"),
    [
        ("images", "both", 16 - NUM_MASKED),
        ("pairs", "both", 16 - NUM_MASKED),
        ("pairs", "text_only", 16),
    ],
)
def test_codes_of_visible_patches_are_predicted_where_asked_for(
    root, vqkd_weights, source, pair_masking, num_visible
):
    """Their loss is that of the full logits, and those of masked positions stay what they were."""
    task = make_task(root, vqkd_weights, pair_masking=pair_masking, visible_weight=0.5)
    batch = make_batch(task, read_records(root, source))
    name = f"{task.get_loss_prefix(batch)}visible"
    visible = ~batch["image_mask"] if "image_mask" in batch else torch.ones(6, 16, dtype=torch.bool)
    logits = task.outputs(batch)["image_logits"]
    losses = F.cross_entropy(logits.transpose(1, 2), task.compute_codes(batch), reduction="none")
    result = task(batch)
    torch.testing.assert_close(result["losses"][name], losses[visible].sum())
    assert task.targets(batch)[name] == int(visible.sum()) == 6 * num_visible
    assert task.loss_weights[name] == 0.5

    masked_alone = make_task(root, vqkd_weights, pair_masking=pair_masking)(batch)["losses"]
    assert name not in masked_alone
    for other, loss in masked_alone.items():
        torch.testing.assert_close(result["losses"][other], loss)
    assert not any("visible" in field for field in task.predict(batch)[0])


def test_codes_in_the_batch_replace_those_of_the_visual_tokenizer(root, vqkd_weights):
    task = make_task(root, vqkd_weights)
    batch = make_batch(task, read_records(root, "images"))
    expected = task(batch)["losses"]["image"]
    codes = task.visual_tokenizer.tokenize(batch["token_image"])
    assert codes.shape == (6, 16)
    assert torch.equal(task.compute_codes(batch), codes)

    without_tokenizer = make_task(root)
    with pytest.raises(ValueError, match="image targets need a visual tokenizer"):
        without_tokenizer(batch)
    del batch["token_image"]
    loss = without_tokenizer({**batch, "image_codes": codes})["losses"]["image"]
    torch.testing.assert_close(loss, expected)
    wrong_codes = (codes + 1) % NUM_CODES
    wrong_loss = without_tokenizer({**batch, "image_codes": wrong_codes})["losses"]["image"]
    assert float(wrong_loss.detach()) != pytest.approx(float(expected.detach()))


def test_num_codes_must_be_the_visual_tokenizers(root, vqkd_weights):
    with pytest.raises(ValueError, match=rf"task\.num_codes is 7, but .* has {NUM_CODES} codes"):
        make_task(root, vqkd_weights, num_codes=7)


def test_pixels_of_masked_patches_have_no_effect(task, root):
    batch = make_batch(task, read_records(root, "pairs"))
    batch["image_codes"] = task.compute_codes(batch)
    patch_mask = batch["image_mask"].reshape(-1, 1, 4, 4)
    pixel_mask = patch_mask.repeat_interleave(8, 2).repeat_interleave(8, 3)  # [B, 1, 32, 32]
    noise = torch.randint_like(batch["image"], 256)
    noisy = torch.where(pixel_mask, noise, batch["image"])
    assert not torch.equal(noisy, batch["image"])
    expected, outputs = task.outputs(batch), task.outputs({**batch, "image": noisy})
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_scores_are_means_over_all_masked_positions(task, root):
    """They do not depend on how records are divided into batches."""
    records = read_records(root, "pairs")[:7]
    batch = make_batch(task, records, 7)
    with torch.no_grad():
        predictions = []
        for start in (0, 3, 6):
            predictions += task.predict(make_batch(task, records[start : start + 3]))
        result, counts = task(batch), task.targets(batch)
    scores = Pretrain.score(predictions, records)
    for modality in ("image", "text"):
        name = f"pair_{modality}"
        loss = float(result["losses"][name]) / counts[name]
        accuracy = float(result["metrics"][f"{name}/accuracy"]) / counts[name]
        assert scores[f"{modality}_loss"] == pytest.approx(loss, rel=1e-5)
        assert scores[f"{modality}_accuracy"] == pytest.approx(accuracy)
    assert scores["negative_loss"] == pytest.approx(-scores["image_loss"] - scores["text_loss"])


# The paper's run ----------------------------------------------------------------------------------


def test_the_giants_token_image_has_a_code_for_every_patch(root, tmp_path):
    """Patches of 14 at 224 px and the tokenizer's of 16 at 256 px are both a grid of 16 x 16."""
    tokenizer_config = VisualTokenizerConfig(
        image_size=224,
        patch_size=16,
        dim=16,
        depth=1,
        num_heads=2,
        ffn_dim=16,
        decoder_depth=1,
        code_dim=4,
        num_codes=NUM_CODES,
        teacher_dim=45,
    )
    visual_tokenizer = VQKD(VQKDConfig(model=tokenizer_config))
    visual_tokenizer.init_weights(0)
    save_weights(visual_tokenizer, tmp_path / "visual")

    giant: Any = Pretrain.recipes["giant_224"].task
    assert giant.model.grid == (16, 16) and giant.token_size == 256
    model = replace(giant.model, dim=16, depth=3, num_heads=2, ffn_dim=16, vocab_size=512)
    config = replace(
        giant, model=model, visual_tokenizer=str(tmp_path / "visual"), num_codes=NUM_CODES
    )
    task = Pretrain(config, tokenizer=TextTokenizer(root / "text.model"))
    task.init_weights(0)

    batch = make_batch(task, read_records(root, "pairs"), 2)
    assert batch["image"].shape == (2, 3, 224, 224)
    assert batch["token_image"].shape == (2, 3, 256, 256)
    assert task.compute_codes(batch).shape == (2, 256)
    assert task.outputs(batch)["image_logits"].shape == (2, 256, NUM_CODES)
    assert task.targets(batch)["pair_image"] == 2 * 102
    assert task(batch)["losses"]["pair_image"].isfinite()


@pytest.mark.parametrize(
    ("name", "model", "token_size"),
    [("base_224", BASE, 224), ("large_224", LARGE, 224), ("giant_224", GIANT, 256)],
)
def test_recipes_have_the_papers_numbers(name, model, token_size):
    """Paper sections 2.2, 2.3 and 3.2, appendix A; what it leaves open is argued in
    docs/pretraining.md."""
    recipe = Pretrain.recipes[name]
    config: Any = recipe.task
    assert config.model == replace(model, drop_path_rate=0.1)
    assert config.model.image_size == config.image.image_size == 224
    assert (config.image.mean, config.image.std) == VL_MEAN_STD
    mask_rates = (config.image_mask_rate, config.text_mask_rate, config.pair_text_mask_rate)
    assert mask_rates == (0.4, 0.15, 0.5)
    assert config.pair_masking == "both" and config.min_mask_block == 16
    assert (config.num_codes, config.token_size) == (8192, token_size)
    assert (config.text_length, config.monomodal_text_length) == (64, 512)
    assert (config.color_jitter, config.image_flip, config.pair_flip) == (0.4, 0.5, 0.5)
    assert (config.image_crop, config.pair_crop) == ((0.2, 1.0), (0.5, 1.0))
    assert config.image_weight == config.text_weight == 1
    assert config.pair_image_weight == config.pair_text_weight == 1
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.weight_decay) == (1e-3, 1e-5, 0.05)
    assert (optim.betas, optim.eps) == ((0.9, 0.98), 1e-6)
    assert (optim.warmup_steps, optim.clip) == (10_000, 3.0)
    assert optim.layer_decay == optim.head_lr_scale == 1.0
    assert recipe.data.batch == {"images": 2048, "texts": 2048, "pairs": 2048}
    assert recipe.run.steps == 1_000_000


def test_the_giant_is_the_papers_network():
    model: Any = Pretrain.recipes["giant_224"].task.model
    assert (model.dim, model.depth, model.num_heads, model.ffn_dim) == (1408, 40, 16, 6144)
    assert model.patch_size == 14 and model.fusion_layers == 3 and model.init == "beit"
    assert model.shared_attention and not model.sub_ln and model.final_norm


@pytest.mark.parametrize("name", ["demo", "laptop", "gpu_hour"])
def test_small_recipes_fit_the_visual_tokenizer_of_the_same_name(name):
    """The paper's run takes a released visual tokenizer."""
    recipe = Pretrain.recipes[name]
    config, tokenizer_config = recipe.task, VQKD.recipes[name].task
    assert isinstance(config, PretrainConfig) and isinstance(tokenizer_config, VQKDConfig)
    tokenizer_model = tokenizer_config.model
    assert config.num_codes == tokenizer_model.num_codes
    assert config.token_size == tokenizer_model.image_size == tokenizer_config.image.image_size
    assert config.model.grid == (config.token_size // tokenizer_model.patch_size,) * 2
    assert config.image.image_size == config.model.image_size
    num_masked = config.image_mask_rate * config.model.grid[0] ** 2
    assert config.min_mask_block <= num_masked, "a block fits into the masked patches"
    assert recipe.data.batch.keys() == set(Pretrain.sources)
    assert recipe.run.steps > recipe.optim.warmup_steps


def test_heads_are_untied_and_have_biases(task):
    assert task.text_head.weight is not task.backbone.text_embedding.tokens.weight
    assert task.text_head.bias is not None
    assert task.image_head.bias.shape == (NUM_CODES,)


# Cached codes -------------------------------------------------------------------------------------


def test_cached_codes_change_no_metric(root, vqkd_weights, tmp_path):
    """Three epochs of eight images and eight pairs, then an evaluation of two of each.

    With the cache, the visual tokenizer sees each image of each source once.
    """
    recipe = make_pretrain_recipe(root, vqkd_weights, steps=6, eval_records=2)
    data = replace(recipe.data, batch={"images": 4, "texts": 2, "pairs": 4}, limit=8)
    config = replace(
        recipe.task,
        image_crop=(1.0, 1.0),
        pair_crop=(1.0, 1.0),
        image_flip=0.0,
        pair_flip=0.0,
        color_jitter=0.0,
    )
    metrics, num_tokenized = [], []
    for cache_codes in (False, True):
        run_recipe = replace(recipe, task=replace(config, cache_codes=cache_codes), data=data)
        out = tmp_path / str(cache_codes)
        with patch.object(
            VisualTokenizer, "tokenize", autospec=True, side_effect=VisualTokenizer.tokenize
        ) as tokenize:
            train(run_recipe, Pretrain, out=out)
        metrics.append(read_metrics(out))
        num_tokenized.append(sum(len(call.args[1]) for call in tokenize.call_args_list))
    assert metrics[0] == metrics[1]
    assert num_tokenized == [6 * 8 + 4, 2 * 8 + 4]


def test_codes_of_changing_views_cannot_be_cached(root):
    with pytest.raises(ValueError, match="cache_codes needs fixed views"):
        make_task(root, cache_codes=True)
