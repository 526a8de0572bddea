"""Fused features, states of layers, maps of patches and attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit3.data.views.preprocessing import Preprocessing, resize
from beit3.images import open_image
from beit3.model.beit3 import BEiT3
from beit3.model.config import POSITION_OFFSET, TINY, TINY_RELEASE
from beit3.model.layers import Attention
from beit3.ops.positions import resample_positions
from beit3.predict import Predictor, load
from beit3.recipe import TaskConfig
from beit3.task import list_tasks
from beit3.tasks.backbone import Backbone
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.predict.networks import make_pixels, make_predictor, make_task

SIZES = {"depth": 3, "patch_size": 16, "vocab_size": 64, "text_positions": 66, "image_size": 32}
PAPER = replace(TINY, dim=32, num_heads=2, ffn_dim=48, fusion_layers=1, **SIZES)
RELEASE = replace(TINY_RELEASE, dim=32, num_heads=2, ffn_dim=48, **SIZES)
"""The paper's form shares attention and fuses the last layer; the release's does neither."""
TEXT = "how many red cubes"
NOWHERE = LoadReport("nowhere", (), {}, {})


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many red cubes are left of the blue ball"], vocab_size=60)


@pytest.fixture(scope="module", params=["paper", "release"])
def predictor(request, tokenizer) -> Predictor:
    model = PAPER if request.param == "paper" else RELEASE
    return make_backbone(model, tokenizer)


def make_backbone(model, tokenizer) -> Predictor:
    config = TaskConfig(model=model, image=Preprocessing(32), text_length=40)
    task = Backbone(config, tokenizer=tokenizer)
    task.init_weights(0)
    with torch.no_grad():  # initial states hardly differ between tokens
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)) * 0.1)
    return Predictor(task, NOWHERE)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return make_pixels(0, 50, 40)


def make_batch(predictor: Predictor, image, text=TEXT) -> dict:
    example = predictor.task.example({"id": "0", "image": image, "text": text}, False)
    length = int((~example["text_padding"]).sum())
    return {
        "image": example["image"][None],
        "text": example["text"][None, :length],
        "text_padding": example["text_padding"][None, :length],
    }


# Pairs --------------------------------------------------------------------------------------------


def test_pairs_are_encoded_as_one_sequence(predictor, image):
    images, texts = [image, make_pixels(1), make_pixels(2)], ["red", TEXT, "how many how many"]
    features = predictor.embed_pairs(images, texts, batch_size=2, workers=2)
    assert {name: (array.shape, array.dtype) for name, array in features.items()} == {
        "image": ((3, 32), np.float32),
        "text": ((3, 32), np.float32),
    }
    for index, (one_image, text) in enumerate(zip(images, texts, strict=True)):
        ((expected,),) = (predictor(one_image, text),)
        for modality in ("image", "text"):
            np.testing.assert_allclose(features[modality][index], expected[modality], atol=1e-4)
    alone = predictor.embed(images, texts)
    assert np.abs(alone["image"] - features["image"]).max() > 0.01, "each sees the other"
    assert np.abs(alone["text"] - features["text"]).max() > 0.01
    one_image = predictor.embed_pairs(image, texts)
    np.testing.assert_allclose(one_image["image"][0], features["image"][0], atol=1e-4)
    assert len(predictor.embed_pairs(image, TEXT)["image"]) == 1
    assert predictor.embed_pairs([], []) == {}


@pytest.mark.parametrize(
    "task_name", [name for name in list_tasks() if name not in ("coco", "ade20k", "vqkd")]
)
def test_weights_of_every_task_with_a_backbone_serve(task_name, root, image):
    predictor = make_predictor(task_name, root)
    pairs = predictor.embed_pairs([image, image], ["red", "a red circle"])
    assert pairs["image"].shape == pairs["text"].shape == (2, predictor.task.config.model.dim)
    inspection = predictor.inspect(image, "red", attention=True)
    np.testing.assert_allclose(inspection.get_image_states()[0], pairs["image"][0], atol=1e-4)
    np.testing.assert_allclose(inspection.get_text_states()[0], pairs["text"][0], atol=1e-4)
    assert inspection.get_word_attention().shape == (len(inspection.words), *inspection.grid)
    assert predictor.embed_patches(image).shape == (1, len(pairs["image"][0]), *inspection.grid)


def test_an_untrained_head_is_no_obstacle_and_an_untrained_backbone_is(root, image):
    task = make_task("vqa", root)
    head = {name: "absent" for name, _ in task.named_parameters() if "backbone" not in name}
    report = LoadReport("a file", (), {}, head)
    assert Predictor(task, report).embed_pairs(image, "red")["image"].shape[0] == 1
    name = "backbone.image_embedding.positions"
    report = LoadReport("a file", (), {}, {name: "absent"})
    for call in ("embed_pairs", "inspect"):
        with pytest.raises(ValueError, match=f"the backbone is untrained .{name}., a file has"):
            getattr(Predictor(task, report), call)(image, "red")


# Layers -------------------------------------------------------------------------------------------


def test_states_are_the_inputs_and_outputs_of_the_blocks(predictor, image):
    backbone, recorded = predictor.task.backbone, []
    hooks = [
        block.register_forward_hook(
            lambda block, inputs, output: recorded.append(
                (torch.cat(inputs[0], 1), torch.cat(output, 1))
            )
        )
        for block in backbone.blocks
    ]
    batch = make_batch(predictor, image)
    with torch.no_grad():
        final = predictor.task.outputs(batch)["tokens"][0]
    for hook in hooks:
        hook.remove()
    inspection = predictor.inspect(image, TEXT, layers=(0, 1, 2, 3, -1))
    assert list(inspection.states) == [0, 1, 2, 3] and not inspection.attention
    for layer in (1, 2):
        np.testing.assert_allclose(inspection.states[layer], recorded[layer - 1][1][0], atol=1e-4)
    np.testing.assert_allclose(inspection.states[0], recorded[0][0][0], atol=1e-5)
    np.testing.assert_allclose(inspection.states[3], final, atol=1e-4)
    split = [inspection.get_image_states(1), inspection.get_text_states(1)]
    np.testing.assert_array_equal(np.concatenate(split), inspection.states[1])
    assert inspection.get_patch_map(2)[:, 1, 0] == pytest.approx(inspection.states[2][1 + 2])
    assert inspection.words[0] == "<s>" and inspection.words[-1] == "</s>"
    assert "".join(inspection.words[1:-1]).strip() == TEXT


def test_images_and_texts_alone_are_inspected_too(predictor, image):
    alone = predictor.inspect(image, attention=True)
    assert alone.words == () and alone.grid == (2, 2)
    features = predictor.embed(image, TEXT)
    np.testing.assert_allclose(alone.get_image_states()[0], features["image"][0], atol=1e-4)
    assert alone.attention[3].shape == (2, 5, 5)
    text = predictor.inspect(text=TEXT, attention=True)
    assert text.grid == (0, 0) and len(text.get_image_states()) == 0
    np.testing.assert_allclose(text.get_text_states()[0], features["text"][0], atol=1e-4)
    for inspection in (alone, text):
        with pytest.raises(ValueError, match="needs an image and a text: give both"):
            inspection.get_word_attention()


def test_patches_are_maps(predictor, image):
    maps = predictor.embed_patches([image, make_pixels(1), make_pixels(2)], batch_size=2, workers=1)
    assert maps.shape == (3, 32, 2, 2) and maps.dtype == np.float32
    for layer in (0, 2, -1):
        maps = predictor.embed_patches([make_pixels(1), image], layer=layer)
        expected = predictor.inspect(image, layers=(layer,)).get_patch_map(layer)
        np.testing.assert_allclose(maps[1], expected, atol=1e-4)


# Other image sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 48, (32, 64), (64, 16)])
def test_any_size_that_patches_tile(predictor, image, size):
    """A network of that size, whose position table was resampled before, gives the same."""
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = height // 16, width // 16
    resized = resize(open_image(image), height, width)
    maps = predictor.embed_patches([resized, image], image_size=size)
    assert maps.shape == (2, 32, rows, columns)
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4)

    backbone = predictor.task.backbone
    state = backbone.state_dict()
    key = "image_embedding.positions"
    state[key] = resample_positions(state[key], (2, 2), (rows, columns), keep=POSITION_OFFSET + 1)
    other = BEiT3(backbone.config).eval()
    other.image_embedding.positions = torch.nn.Parameter(state[key])
    other.image_embedding.grid = (rows, columns)
    other.load_state_dict(state)
    pixels = predictor.task.config.image.normalize(resized)[None]
    with torch.no_grad():
        expected = other(pixels).of("image")[0, 1:].T.reshape(32, rows, columns)
    np.testing.assert_allclose(maps[0], expected, atol=1e-4)

    inspection = predictor.inspect(image, TEXT, attention=True, image_size=size)
    assert inspection.grid == (rows, columns)
    assert inspection.get_word_attention().shape == (len(inspection.words), rows, columns)


# Attention ----------------------------------------------------------------------------------------


def record_attention(monkeypatch: pytest.MonkeyPatch) -> list:
    """Computes what each call of the fused attention hides, one head and query at a time."""
    recorded, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None):
        batch, heads, length, width = query.shape
        weights = torch.zeros(batch, heads, length, key.shape[2], dtype=torch.float64)
        for sample in range(batch):
            for head in range(heads):
                for token in range(length):
                    scores = (key[sample, head].double() @ query[sample, head, token].double()) / (
                        width**0.5
                    )
                    if attn_mask is not None:
                        scores[~attn_mask[sample, 0, 0]] = -torch.inf
                    exponentials = torch.exp(scores - scores.max())
                    weights[sample, head, token] = exponentials / exponentials.sum()
        recorded.append(weights)
        output = attend(query, key, value, attn_mask=attn_mask)
        torch.testing.assert_close((weights @ value.double()).float(), output, atol=1e-5, rtol=1e-4)
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return recorded


def test_attention_equals_a_slow_softmax(predictor, image, monkeypatch):
    recorded = record_attention(monkeypatch)
    inspection = predictor.inspect(image, TEXT, layers=(1, 2, 3), attention=True)
    assert list(inspection.attention) == [1, 2, 3] and len(recorded) == 3
    num_tokens = 1 + 4 + len(inspection.words)
    for layer in (1, 2, 3):
        weights = inspection.attention[layer]
        assert weights.shape == (2, num_tokens, num_tokens) and weights.dtype == np.float32
        np.testing.assert_allclose(weights, recorded[layer - 1][0], atol=1e-5)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.ptp(inspection.attention[3][0], axis=0).max() > 0.01, "tokens differ"

    for head in (0, 1):
        maps = inspection.get_word_attention(2, head)
        for word in range(len(inspection.words)):
            for row in range(2):
                for column in range(2):
                    expected = inspection.attention[2][head, 5 + word, 1 + 2 * row + column]
                    assert maps[word, row, column] == expected
    heads = [inspection.get_word_attention(2, head) for head in (0, 1)]
    np.testing.assert_allclose(inspection.get_word_attention(2), np.mean(heads, 0), atol=1e-6)
    layers = [inspection.get_word_attention(layer) for layer in (1, 2, 3)]
    np.testing.assert_allclose(inspection.get_word_attention(), np.mean(layers, 0), atol=1e-6)
    assert inspection.get_word_attention().sum((1, 2)).max() < 1


def test_padding_gets_no_attention(predictor, image, monkeypatch):
    """A batch of texts of two lengths; its weights equal those that the network multiplies with."""
    task = predictor.task
    records = [{"id": "0", "image": image, "text": text} for text in (TEXT, "red")]
    batch = task.collate([task.example(record, False) for record in records])
    recorded, kept = record_attention(monkeypatch), []

    def observe(layer, parts, layout, mask):
        block = task.backbone.blocks[layer]
        normed = block.norm1(parts, layout.experts)
        kept.append(block.attention.compute_weights(normed, layout, mask))

    with torch.no_grad():
        task.backbone(
            task.normalize_images(batch),
            batch["text"],
            text_padding=batch["text_padding"],
            observe=observe,
        )
    padding = batch["text_padding"][1].nonzero().flatten() + 5
    assert len(padding) > 2
    for weights, expected in zip(kept, recorded, strict=True):
        torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=1e-4)
        assert not weights[1][:, :, padding].any()


def test_the_normal_path_never_forms_the_weights(predictor, image, monkeypatch):
    batch = make_batch(predictor, image)
    with torch.no_grad():
        before = predictor.task.outputs(batch)["tokens"]
    predictor.inspect(image, TEXT, layers=(1, 3), attention=True)
    with torch.no_grad():
        assert torch.equal(predictor.task.outputs(batch)["tokens"], before)

    def fail(*arguments):
        raise AssertionError("computed without need")

    monkeypatch.setattr(Attention, "compute_weights", fail)
    predictor(image, TEXT)
    predictor.embed_pairs(image, TEXT)
    predictor.embed_patches(image)
    predictor.inspect(image, TEXT, layers=(0, 1, 2, 3))


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"packed": True}])
def test_other_forms_of_the_weights_are_inspected_as_well(tokenizer, image, options):
    if options.get("packed") and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    exact = make_backbone(PAPER, tokenizer)
    changed = Predictor(make_backbone(PAPER, tokenizer).task, NOWHERE, **options)
    for _ in range(3):
        expected, actual = (
            predictor.inspect(image, TEXT, layers=(1, 2), attention=True)
            for predictor in (exact, changed)
        )
        for layer in (1, 2):
            np.testing.assert_allclose(
                actual.attention[layer], expected.attention[layer], atol=0.01
            )
            np.testing.assert_allclose(actual.attention[layer].sum(-1), 1, atol=1e-5)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: p.inspect(i, image_size=40), "image_size 40 is no size that patches of 16 "),
        (lambda p, i: p.embed_patches(i, image_size=(32, 40)), r"image_size \(32, 40\) is no size"),
        (lambda p, i: p.embed_patches(i, image_size=0), "image_size 0 is no size"),
        (lambda p, i: p.embed_patches(i, image_size=(32, 32, 3)), "is no size that patches"),
        (lambda p, i: p.inspect(i, layers=(4,)), r"no layer 4: give 0 \(the embeddings\) to 3, or"),
        (lambda p, i: p.embed_patches(i, layer=-5), "there is no layer -5"),
        (lambda p, i: p.inspect(), "nothing to inspect: give an image, a text or both"),
        (lambda p, i: p.inspect([i, i]), "inspect takes one input, not a list of images"),
        (lambda p, i: p.inspect(i, ["a"]), "inspect takes one input, not a list of texts"),
        (lambda p, i: p.inspect("absent.png"), "absent.png"),
        (lambda p, i: p.inspect(i, TEXT).get_word_attention(), "inspect with attention=True"),
        (
            lambda p, i: p.inspect(i, TEXT, attention=True).get_word_attention(2),
            r"layer 2 was not inspected: give it in layers \(kept: 3\)",
        ),
        (
            lambda p, i: p.inspect(i, TEXT, attention=True).get_word_attention(3, 2),
            "head 2 is none of the 2: they count from 0",
        ),
        (lambda p, i: p.embed_pairs([i, i], ["a"]), "different lengths: 2 of image, 1 of text"),
        (lambda p, i: p.embed_pairs([i, None], "a"), r"pairs\[1\]: the image of the pair is empty"),
        (lambda p, i: p.embed_patches([]), "no images to encode"),
        (lambda p, i: p.embed_patches([i, None]), r"images\[1\]: the image is empty"),
    ],
)
def test_what_cannot_be_computed_is_refused(predictor, image, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(predictor, image)
    assert "\n" not in str(error.value)


def test_networks_without_this_backbone_are_refused(root, image):
    for name in ("coco", "vqkd"):
        predictor = make_predictor(name, root)
        for call in (predictor.embed_patches, predictor.inspect):
            with pytest.raises(ValueError, match=f"{name} has no BEiT-3 backbone"):
                call(image)


def test_weights_of_the_image_side_alone_have_no_pairs(tmp_path, tokenizer, image):
    task = Backbone(TaskConfig(model=RELEASE, image=Preprocessing(32)))
    task.init_weights(0)
    state = {
        key: value
        for key, value in to_released_state(task).items()
        if ".B." not in key and "text_embed" not in key
    }
    torch.save(state, tmp_path / "image.pth")
    tokenizer.save(tmp_path / "text.spm")
    predictor = load(tmp_path / "image.pth", text_model=tmp_path / "text.spm", num_heads=2)
    assert predictor.embed_patches(image).shape[1] == 32
    assert predictor.inspect(image, attention=True).attention
    for call in (predictor.embed_pairs, predictor.inspect):
        with pytest.raises(ValueError, match="holds the image side alone"):
            call(image, "red")


def test_texts_need_a_tokenizer(tmp_path, image):
    task = Backbone(TaskConfig(model=RELEASE, image=Preprocessing(32)))
    task.init_weights(0)
    save_weights(task, tmp_path / "w")
    predictor = load(tmp_path / "w")
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match="give text_model=FILE.spm"):
            predictor.embed_pairs([image], ["red"], on_error=on_error)
