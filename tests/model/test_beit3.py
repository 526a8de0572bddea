"""The backbone equals a slow reference implementation: padding, caches, experts, threads."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3, Encoded
from beit3.model.cache import SPARE_TOKENS, Cache, LayerCache
from beit3.model.config import BASE, GIANT, LARGE, TINY, TINY_RELEASE, ModelConfig
from beit3.model.layout import Layout
from tests.reference import backbone as reference

PAPER = replace(TINY, dim=32, depth=3, ffn_dim=48, image_size=16, vocab_size=40, text_positions=20)
RELEASE = replace(
    TINY_RELEASE, dim=32, depth=3, ffn_dim=48, image_size=16, vocab_size=40, text_positions=20
)
BOTH_FORMS = pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> BEiT3:
    """Returns a network whose parameters, norms included, differ from their initial values."""
    model = BEiT3(config).to(dtype).eval()
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.2
            )
    return model


def make_inputs(config: ModelConfig, batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    padding = torch.arange(length) >= torch.tensor([[length], [length - 3], [length - 1]])[:batch]
    return {
        "image": torch.rand(
            batch, 3, config.image_size, config.image_size, generator=generator, dtype=torch.float64
        )
        * 2
        - 1,
        "text": torch.randint(4, config.vocab_size, (batch, length), generator=generator),
        "text_padding": padding,
        "image_mask": torch.rand(batch, config.num_patches, generator=generator) < 0.4,
    }


CASES = {
    "image": ("image",),
    "masked image": ("image", "image_mask"),
    "text": ("text",),
    "padded text": ("text", "text_padding"),
    "pair": ("image", "text"),
    "padded pair": ("image", "text", "text_padding"),
    "masked padded pair": ("image", "text", "text_padding", "image_mask"),
}


@BOTH_FORMS
@pytest.mark.parametrize("case", CASES)
def test_states_equal_the_reference_implementation(config, case):
    model, arguments = make_model(config), make_inputs(config)
    arguments = {name: arguments[name] for name in CASES[case]}
    expected = reference.encode(model.state_dict(), config, **arguments)
    torch.testing.assert_close(model(**arguments).tokens, expected, rtol=0, atol=1e-10)


def select_real_tokens(states: Encoded, padding: torch.Tensor) -> torch.Tensor:
    """Returns the states [T, D] of all tokens but the padding, whose states are arbitrary."""
    return states.tokens[
        ~torch.nn.functional.pad(padding, (states.tokens.shape[1] - padding.shape[1], 0))
    ]


@BOTH_FORMS
@pytest.mark.parametrize("case", ["padded text", "masked padded pair"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_leaving_out_padding_changes_neither_states_nor_gradients(config, case, drop):
    """This holds for padding inside a text and with stochastic depth as well."""
    config = replace(config, drop_path_rate=drop)
    model, arguments = (
        make_model(config).train(),
        {name: make_inputs(config)[name] for name in CASES[case]},
    )
    arguments["text_padding"] = torch.tensor(
        [[0, 0, 1, 0, 1, 0, 0], [0] * 7, [1, 0, 0, 0, 1, 1, 1]]
    ).bool()
    results = []
    for read in ("real", "all"):
        model.zero_grad()
        torch.manual_seed(3)
        states = select_real_tokens(model(**arguments, read=read), arguments["text_padding"])
        states.sin().sum().backward()
        results.append(
            (
                states,
                {
                    name: p.grad.clone()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                },
            )
        )
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_tokens_that_are_not_read_are_not_computed():
    """Texts of seven and two tokens send nine tokens through the experts, two through the last."""
    model, seen = make_model(PAPER), []
    for block in model.blocks:
        block.ffn.text.register_forward_hook(
            lambda module, arguments, states: seen.append(tuple(states.shape[:2]))
        )
    text = make_inputs(PAPER)["text"][:2]
    padding = torch.arange(7) >= torch.tensor([[7], [2]])
    model(text=text, text_padding=padding, read="first")
    assert seen == [(1, 9), (1, 9), (2, 1)]
    model(text=text, text_padding=padding, read="real")
    assert seen[3:] == [(1, 9)] * 3


@BOTH_FORMS
def test_image_tokens_cannot_attend_to_text_under_the_captioning_mask(config):
    model, arguments = make_model(config), make_inputs(config)
    arguments.pop("image_mask")
    mask = make_image_to_text_mask(1 + config.num_patches, arguments["text"].shape[1])
    encoded = model(**arguments, attention_mask=mask)
    expected = reference.encode(model.state_dict(), config, **arguments, may_attend=mask)
    torch.testing.assert_close(encoded.tokens, expected, rtol=0, atol=1e-10)
    with_other_text = model(**arguments | {"text": arguments["text"].flip(1)}, attention_mask=mask)
    torch.testing.assert_close(encoded.of("image"), with_other_text.of("image"), rtol=0, atol=1e-12)


@BOTH_FORMS
@pytest.mark.parametrize("size", [(24, 8), (8, 40), (32, 16)])
def test_rectangular_images_equal_the_reference_implementation(config, size):
    model, arguments = make_model(config), make_inputs(config)
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    expected = reference.encode(model.state_dict(), config, image, arguments["text"][:2])
    # Position tables are resampled in float32 whatever the model's type: 6e-8 of values of a few
    # units.
    torch.testing.assert_close(
        model(image, arguments["text"][:2]).tokens, expected, rtol=0, atol=1e-5
    )


@BOTH_FORMS
def test_states_without_final_norm_equal_the_reference_implementation(config):
    config = replace(config, final_norm=False)
    model, arguments = make_model(config), make_inputs(config)
    expected = reference.encode(model.state_dict(), config, arguments["image"], arguments["text"])
    torch.testing.assert_close(
        model(arguments["image"], arguments["text"]).tokens, expected, rtol=0, atol=1e-10
    )


@BOTH_FORMS
def test_token_ids_of_padding_change_nothing(config):
    model, arguments = make_model(config), make_inputs(config)
    other_text = arguments["text"].where(~arguments["text_padding"], 4)
    assert not torch.equal(other_text, arguments["text"])
    encoded, with_other_padding = (
        model(arguments["image"], text, text_padding=arguments["text_padding"])
        for text in (arguments["text"], other_text)
    )
    torch.testing.assert_close(encoded.tokens, with_other_padding.tokens, rtol=0, atol=0)


@BOTH_FORMS
def test_a_padded_text_equals_a_shorter_text(config):
    model, arguments = make_model(config), make_inputs(config)
    length = int((~arguments["text_padding"][1]).sum())
    padded = model(arguments["image"], arguments["text"], text_padding=arguments["text_padding"])
    alone = model(arguments["image"][1:2], arguments["text"][1:2, :length])
    torch.testing.assert_close(padded.of("image")[1:2], alone.of("image"), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        padded.of("text")[1:2, :length], alone.of("text"), rtol=0, atol=1e-10
    )


@BOTH_FORMS
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 2), (7,)])
def test_cached_states_equal_those_of_one_call(config, cuts):
    model, arguments = make_model(config), make_inputs(config)
    image, text = arguments["image"], arguments["text"]
    rows = 1 + config.num_patches
    mask = make_image_to_text_mask(rows, text.shape[1])
    full = model(image, text, attention_mask=mask).of("text")
    cache, done, parts = Cache(), 0, []
    for count in cuts:
        step = mask[0 if done == 0 else rows + done : rows + done + count, : rows + done + count]
        encoded = model(
            image if done == 0 else None,
            text[:, done : done + count],
            attention_mask=step,
            cache=cache,
        )
        parts.append(encoded.of("text"))
        done += count
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)


@BOTH_FORMS
def test_a_cache_forgets_its_last_tokens(config):
    model, arguments = make_model(config), make_inputs(config)
    image, text = arguments["image"], arguments["text"]
    rows = 1 + config.num_patches
    mask = make_image_to_text_mask(rows, 4)
    cache = Cache()
    model(image, text[:, :3], attention_mask=mask[: rows + 3, : rows + 3], cache=cache)
    cache.drop_last(1)
    step = model(text=text[:, 4:6], attention_mask=mask[rows + 2 :, :], cache=cache).of("text")
    told = torch.cat((text[:, :2], text[:, 4:6]), 1)
    full = model(image, told, attention_mask=mask).of("text")[:, 2:]
    torch.testing.assert_close(step, full, rtol=0, atol=1e-10)


@BOTH_FORMS
@pytest.mark.parametrize("count", [SPARE_TOKENS - 1, SPARE_TOKENS, SPARE_TOKENS + 3])
def test_a_cache_makes_room(config, count):
    torch.manual_seed(0)
    keys = torch.randn(2, 3, count + 4, 5)
    cache = LayerCache()
    cache.extend(keys[:, :, :2], -keys[:, :, :2])
    for start in range(2, count + 4, 2):
        key, value = cache.extend(keys[:, :, start : start + 2], -keys[:, :, start : start + 2])
    assert (
        torch.equal(key, keys[:, :, : key.shape[2]])
        and torch.equal(value, -key)
        and key.shape[2] >= count + 3
    )


@BOTH_FORMS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("read", ["first", "last"])
@pytest.mark.parametrize("modalities", [("image",), ("text",), ("image", "text")])
def test_reading_few_states_changes_neither_them_nor_their_gradients(
    config, modalities, read, masked
):
    model, arguments = make_model(config), make_inputs(config)
    arguments = {name: arguments[name] for name in modalities}
    if masked and len(modalities) == 2:
        arguments["attention_mask"] = make_image_to_text_mask(
            1 + config.num_patches, arguments["text"].shape[1]
        )
    elif masked and "text" in arguments:
        arguments["text_padding"] = torch.tensor(
            [[0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]]
        ).bool()
    results = []
    for alone in (False, True):
        model.zero_grad()
        encoded = model(**arguments, read=read if alone else "all")
        states = [encoded.of(name)[:, 0 if read == "first" else -1] for name in modalities]
        sum((state**2).sum() for state in states).backward()
        results.append(
            (
                states,
                {
                    name: p.grad.clone()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                },
            )
        )
    (full, gradients), (read_states, read_gradients) = results
    torch.testing.assert_close(read_states, full, rtol=0, atol=1e-10)
    assert all(len(encoded.of(name)[0]) == 1 for name in modalities)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            read_gradients.get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-9
        )


@BOTH_FORMS
def test_two_tokens_may_have_the_same_position(config):
    """Two continuations in one sequence, each attending to the text before it, equal two texts."""
    model, arguments = make_model(config), make_inputs(config)
    image, text, rows = arguments["image"][:1], arguments["text"][:1], 1 + config.num_patches
    mask = torch.ones(rows + 4, rows + 4, dtype=torch.bool).tril()
    mask[:rows, :rows] = True
    mask[rows + 3, rows + 2] = False
    branched = model(
        image, text[:, :4], attention_mask=mask, text_position_ids=torch.tensor([0, 1, 2, 2])
    ).of("text")
    for end in (2, 3):
        alone = model(
            image, text[:, [0, 1, end]], attention_mask=make_image_to_text_mask(rows, 3)
        ).of("text")
        torch.testing.assert_close(branched[:, [0, 1, end]], alone, rtol=0, atol=1e-10)


@BOTH_FORMS
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_uses_its_own_experts_only(config, modality):
    model, arguments = make_model(config), make_inputs(config)
    model(**{modality: arguments[modality]}).tokens.square().sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    other_experts = {"image", "text", "fusion"} - {modality}
    foreign_parts = other_experts | {f"{expert}_embedding" for expert in other_experts}
    assert not [name for name in touched if foreign_parts & set(name.split("."))]
    own_parameters = {name for name, _ in model.named_parameters() if modality in name.split(".")}
    assert own_parameters and own_parameters <= touched


def test_a_pair_uses_the_fusion_expert_in_the_top_layers_only():
    model, arguments = make_model(PAPER), make_inputs(PAPER)
    model(arguments["image"], arguments["text"]).tokens.square().sum().backward()
    ffn = {
        (int(name.split(".")[1]), name.split(".")[3]): parameter.grad is not None
        for name, parameter in model.named_parameters()
        if ".ffn." in name
    }
    assert ffn == {
        (0, "image"): True,
        (0, "text"): True,
        (1, "image"): True,
        (1, "text"): True,
        (2, "image"): False,
        (2, "text"): False,
        (2, "fusion"): True,
    }


@BOTH_FORMS
def test_two_threads_share_one_model(config):
    model, arguments = make_model(config, torch.float32), make_inputs(config)
    image, text = arguments["image"].float(), arguments["text"]
    calls = {"image": lambda: model(image).tokens, "text": lambda: model(text=text).tokens}
    with torch.inference_mode():
        expected = {name: call() for name, call in calls.items()}
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.inference_mode():
            wrong.extend(
                name
                for _ in range(400)
                if not torch.allclose(calls[name](), expected[name], atol=1e-6)
            )

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@BOTH_FORMS
def test_recomputed_activations_give_equal_gradients(config):
    model, arguments = make_model(config), make_inputs(config)
    recomputing = make_model(config)
    for block in recomputing.blocks:
        block.forward = recompute(block.forward)
    for network in (model, recomputing):
        # Interleaved passes: a router with state would recompute the first with the experts of the
        # last.
        passes = [
            network(arguments["image"]),
            network(text=arguments["text"]),
            network(arguments["image"], arguments["text"]),
        ]
        sum(encoded.tokens.sin().sum() for encoded in passes).backward()
    for (name, parameter), recomputed in zip(
        model.named_parameters(), recomputing.parameters(), strict=True
    ):
        assert (parameter.grad is None) == (recomputed.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, recomputed.grad, rtol=0, atol=1e-10)


def recompute(forward):
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


def test_stochastic_depth_drops_whole_branches_of_a_sample():
    config = replace(RELEASE, drop_path_rate=0.5)
    block = make_model(config).blocks[-1].train()
    torch.manual_seed(0)
    part = torch.zeros(400, 2, config.dim, dtype=torch.float64)
    (dropped,) = block.add(
        (part,), (torch.ones_like(part),), Layout((("image", 2),), (("image", 2),))
    )
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all()
    assert 0.4 < (dropped[:, 0, 0] > 0).double().mean() < 0.6


def test_the_giant_has_the_sizes_of_the_paper():
    with torch.device("meta"):
        model = BEiT3(GIANT)

    def count(*parts: str) -> int:
        return sum(
            p.numel() for name, p in model.named_parameters() if any(part in name for part in parts)
        )

    # Paper, table 2: 692M vision, 692M language, 52M vision-language experts, 317M shared
    # attention.
    assert count(".ffn.image.") == 692_362_240
    assert count(".ffn.text.") == 692_362_240
    assert count(".ffn.fusion.") == 51_927_168
    assert count(".attention.qkv.", ".attention.out.") == 317_419_520
    assert not [
        name
        for name, _ in model.named_parameters()
        if "attention.norm" in name or "ffn.image.norm" in name
    ]


@pytest.mark.parametrize(("config", "millions"), [(BASE, 276.511), (LARGE, 746.710)])
def test_base_and_large_have_the_released_sizes(config, millions):
    with torch.device("meta"):
        backbone = sum(parameter.numel() for parameter in BEiT3(config).parameters())
    heads = (config.dim + 1) * (config.vocab_size + 8192)
    assert round((backbone + heads) / 1e6, 3) == millions


@pytest.mark.parametrize(
    "config", [TINY, TINY_RELEASE, BASE, GIANT], ids=["tiny", "tiny release", "base", "giant"]
)
def test_every_norm_has_the_released_epsilon(config):
    """No fixture can tell 1e-5 from BEiT v2's 1e-6: inputs have a variance far above both."""
    with torch.device("meta"):
        norms = [
            module for module in BEiT3(config).modules() if isinstance(module, torch.nn.LayerNorm)
        ]
    assert norms and {norm.eps for norm in norms} == {1e-5}


@BOTH_FORMS
def test_initial_values_depend_on_seed_and_name_only(config):
    network, same_seed, other_seed = BEiT3(config), BEiT3(config), BEiT3(config)
    network.init_weights(3), same_seed.init_weights(3), other_seed.init_weights(4)
    for (name, parameter), same, different in zip(
        network.named_parameters(), same_seed.parameters(), other_seed.parameters(), strict=True
    ):
        assert torch.equal(parameter, same), name
        assert torch.equal(parameter, different) == (parameter.ndim == 1), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to encode"),
        ({"text": torch.zeros(1, 19, dtype=torch.int64)}, "text of 19 tokens is beyond the 18"),
        ({"image": torch.zeros(1, 3, 16, 20)}, "16 x 20 px is not a multiple of the 8 px patch"),
        (
            {
                "text": torch.zeros(1, 2, dtype=torch.int64),
                "text_padding": torch.zeros(1, 2),
                "cache": Cache(),
            },
            "padding cannot be combined with a cache",
        ),
    ],
)
def test_wrong_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BEiT3(RELEASE)(**arguments)


def test_states_of_an_absent_modality_are_refused():
    with pytest.raises(ValueError, match="no text in this input"):
        BEiT3(RELEASE)(torch.zeros(1, 3, 16, 16)).of("text")
