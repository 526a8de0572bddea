"""The visual tokenizer against the official VQ-KD's recorded numbers, its sizes, and its
refusals."""

import dataclasses

import pytest
import torch
from torch import Tensor

from beit3.tokenizer.efficientnet import load_efficientnet
from beit3.tokenizer.teacher_efficientnet import EfficientNetTeacher
from beit3.tokenizer.visual import VisualTokenizer, VisualTokenizerConfig
from beit3.weights.beit2_format import read_vqkd
from tests.golden import load_tensors
from tests.tokenizer.test_efficientnet import make_state

TINY = VisualTokenizerConfig(
    image_size=16,
    patch_size=4,
    dim=32,
    depth=2,
    num_heads=2,
    ffn_dim=48,
    decoder_depth=1,
    code_dim=8,
    num_codes=24,
    teacher_dim=10,
)
BASE = VisualTokenizerConfig(
    image_size=224,
    patch_size=16,
    dim=768,
    depth=12,
    num_heads=12,
    ffn_dim=3072,
    decoder_depth=3,
    code_dim=32,
    num_codes=8192,
    teacher_dim=512,
)


def official() -> VisualTokenizer:
    config, state = read_vqkd(load_tensors("vqkd", "model"), num_heads=4)
    tokenizer = VisualTokenizer(config)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def tiny(seed: int = 0) -> VisualTokenizer:
    tokenizer = VisualTokenizer(TINY)
    tokenizer.init_weights(seed)
    return tokenizer


def pixels(size: int = 16, batch: int = 4) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["image_0_1", "image_0_255", "uint8"])
def test_equals_the_official_tokenizer(case: str):
    outputs = load_tensors("vqkd", "outputs")
    images = load_tensors("vqkd", "inputs")["image_0_1" if case == "image_0_1" else "image_0_255"]
    if case == "image_0_255":
        images = images / 255
    elif case == "uint8":
        case, images = "image_0_255", images.to(torch.uint8)
    tokenizer = official()
    codes = outputs[f"{case}.codebook_indices"]
    close(tokenizer.encode(images), outputs[f"{case}.to_quantizer_features"])
    assert torch.equal(tokenizer.tokenize(images), codes)
    features, commitment, chosen = tokenizer(images)
    assert torch.equal(chosen, codes)
    close(features, outputs[f"{case}.decode"])
    close(commitment, outputs[f"{case}.quantize_loss"])
    close(tokenizer.decode(codes), outputs[f"{case}.decode"])
    quantised = outputs[f"{case}.quantize"].flatten(2).transpose(1, 2)
    close(tokenizer.decode(quantised), outputs[f"{case}.decode"])


def test_cosine_loss_of_the_official_recipe():
    outputs, inputs = load_tensors("vqkd", "outputs"), load_tensors("vqkd", "inputs")
    features, _, _ = official()(inputs["image_0_1"])
    loss = (1 - torch.cosine_similarity(features, inputs["rec_target"], dim=-1)).mean()
    close(loss, outputs["rec_loss_cosine"])


def test_base_size():
    with torch.device("meta"):
        tokenizer = VisualTokenizer(BASE)
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()
    }
    assert round(count["encoder"] / 1e5) == 858
    assert round(count["decoder"] / 1e5) == 214
    bookkeeping = (
        8192 + 8192 + 8192 * 32 + 1
    )  # the official file's further copies beside the codebook
    total = sum(count.values()) + tokenizer.quantizer.codebook.numel() + bookkeeping
    assert round(total / 1e5) == 1094


def test_codes_change_nothing_even_in_train_mode():
    tokenizer = tiny().train()
    tokenizer(pixels())
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    codes = tokenizer.tokenize(pixels())
    assert codes.shape == (4, 16) and codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.eval().tokenize(pixels()))
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_a_training_step_reaches_every_parameter_and_moves_the_codebook():
    tokenizer = tiny().train()
    tokenizer(pixels())
    before = tokenizer.quantizer.codebook.clone()
    features, commitment, _ = tokenizer(pixels())
    (features.square().sum() + commitment).backward()
    missing = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert missing == []
    assert not torch.equal(before, tokenizer.quantizer.codebook)


def test_other_sizes_and_rectangles():
    tokenizer = tiny().eval()
    assert tokenizer.tokenize(pixels(20)).shape == (4, 25)
    wide = pixels(20)[:, :, :8]
    features, _, codes = tokenizer(wide)
    assert (features.shape, codes.shape) == ((4, 10, 10), (4, 10))
    close(tokenizer.decode(codes, (2, 5)), features.detach())
    with pytest.raises(ValueError, match="10 codes"):
        tokenizer.decode(codes)


def test_normalized_pixels_are_refused():
    for wrong in (pixels() * 2 - 1, pixels() * 255):
        with pytest.raises(ValueError, match="not normalized"):
            tiny().tokenize(wrong)


def test_initial_values_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    one = tiny(5).state_dict()
    torch.manual_seed(2)
    two, other = tiny(5).state_dict(), tiny(6).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    weights = [name for name in one if name.endswith("weight") and "norm" not in name] + [
        "quantizer.codebook"
    ]
    assert len(weights) > 10 and all(not torch.equal(one[name], other[name]) for name in weights)
    assert abs(float(one["encoder.blocks.0.attention.qkv.weight"].std()) - 0.02) < 1e-3
    assert (
        abs(float(one["encoder.blocks.1.ffn.fc2.weight"].std()) - 0.02 / 2) < 1e-3
    )  # sqrt(2 * layer 2)
    assert abs(float(one["encoder.blocks.0.attention.out.weight"].std()) - 0.02 / 2**0.5) < 1e-3
    assert (
        one["encoder.norm.weight"].eq(1).all()
        and one["encoder.blocks.0.attention.query_bias"].eq(0).all()
    )


def test_materialising_from_meta_leaves_nothing_uninitialised():
    with torch.device("meta"):
        tokenizer = VisualTokenizer(TINY)
    tokenizer.to_empty(device="cpu")
    for value in tokenizer.state_dict().values():
        value.fill_(1)
    tokenizer.init_weights(5)
    assert all(
        torch.equal(value, tiny(5).state_dict()[name])
        for name, value in tokenizer.state_dict().items()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 18), ("num_heads", 3), ("decay", 1.0), ("revive_after", -1)],
)
def test_config_refuses(field: str, value: float):
    with pytest.raises(ValueError, match=field):
        VisualTokenizer(dataclasses.replace(TINY, **{field: value}))


def test_read_drops_training_leftovers_and_reads_half_precision():
    state = {name: tensor.half() for name, tensor in load_tensors("vqkd", "model").items()}
    leftovers = {
        name: torch.ones(1) for name in ("teacher_model.x", "scaling_layer.shift", "loss.y")
    }
    config, ours = read_vqkd({**state, **leftovers}, num_heads=4)
    assert (config.depth, config.decoder_depth, config.image_size, config.teacher_dim) == (
        3,
        2,
        64,
        24,
    )
    VisualTokenizer(config).load_state_dict(ours)
    assert ours["encoder.patch.weight"].dtype == torch.float32 and bool(ours["quantizer.started"])


def test_read_refuses_by_name():
    state = load_tensors("vqkd", "model")
    assert read_vqkd(state)[0].num_heads == 1  # 64 wide: one head as published, unless told
    with pytest.raises(ValueError, match=r"unknown tensors encoder\.blocks\.0\.gamma_1"):
        read_vqkd({**state, "encoder.blocks.0.gamma_1": torch.ones(64)})
    with pytest.raises(ValueError, match=r"no tensors for decoder\.blocks\.0\.norm1\.bias"):
        read_vqkd(
            {
                name: tensor
                for name, tensor in state.items()
                if name != "decoder.blocks.0.norm1.bias"
            }
        )
    with pytest.raises(ValueError, match=r"encode_task_layer\.0\.weight has shape \[3\]"):
        read_vqkd({**state, "encode_task_layer.0.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"no tensor of 4 dimensions for encoder\.patch\.weight"):
        read_vqkd({"x": torch.ones(1)})


# EfficientNet as the encoder ----------------------------------------------------------------------


def make_frozen_encoder() -> VisualTokenizer:
    """Returns a tokenizer on EfficientNet with random weights, whose codebook has started."""
    config = dataclasses.replace(
        TINY, image_size=32, patch_size=16, depth=0, encoder_network="efficientnet"
    )
    tokenizer = VisualTokenizer(config)
    tokenizer.init_weights(0)
    teacher = EfficientNetTeacher(load_efficientnet(make_state()), patch_size=16)
    tokenizer.encoder.load_state_dict(teacher.state_dict())
    tokenizer.train()(pixels(64, batch=16))
    return tokenizer.eval()


def test_codes_of_a_frozen_encoder_are_those_of_its_features():
    tokenizer, images = make_frozen_encoder(), pixels(64)
    teacher = EfficientNetTeacher(load_efficientnet(make_state()), patch_size=16)
    states = teacher.extract_features(images)
    first, _, second = tokenizer.to_code
    vectors = torch.tanh(states @ first.weight.T + first.bias) @ second.weight.T + second.bias
    similarity = torch.nn.functional.normalize(vectors, dim=2) @ tokenizer.quantizer.codebook.T
    codes = tokenizer.tokenize(images)
    chosen = similarity.gather(2, codes[..., None])[..., 0]
    assert codes.unique().numel() > 4
    close(chosen, similarity.max(2).values)  # the nearest code, or one as near
    features, commitment, _ = tokenizer(images)
    given_features, given_commitment, _ = tokenizer(images, states)
    close(features, given_features)
    close(commitment, given_commitment)


def test_a_frozen_encoder_is_not_trained():
    tokenizer = make_frozen_encoder().train()
    names = [name for name, _ in tokenizer.named_parameters()]
    assert names and not any(name.startswith("encoder.") for name in names)
    before = {name: value.clone() for name, value in tokenizer.encoder.state_dict().items()}
    features, commitment, _ = tokenizer(pixels(64))
    (features.square().mean() + commitment).backward()
    assert tokenizer.to_code[0].weight.grad is not None
    after = tokenizer.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_frozen_encoder_has_no_depth():
    with pytest.raises(ValueError, match="depth 2: the encoder efficientnet has blocks of its own"):
        dataclasses.replace(TINY, encoder_network="efficientnet")
