"""beit3.compat, called as users of upstream call it, equals outputs recorded from upstream."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3 import compat
from beit3.compat import (
    BEiT3,
    BEiT3Wrapper,
    EncoderConfig,
    _get_base_config,
    _get_large_config,
    create_model,
)
from beit3.compat import beit3_base_patch16_480_vqav2 as vqav2
from beit3.task import task_name
from beit3.weights.loading import load_released
from beit3.weights.release_format import RELEASED_ROWS, find_released_keys
from tests.golden import find_fixture, load_config, load_tensors

CLASSES = {
    "vqa": compat.BEiT3ForVisualQuestionAnswering,
    "nlvr2": compat.BEiT3ForVisualReasoning,
    "captioning": compat.BEiT3ForCaptioning,
    "retrieval": compat.BEiT3ForRetrieval,
    "imageclassification": compat.BEiT3ForImageClassification,
}


TASKS = {"vqav2": "vqa", "imageclassification": "imagenet"}
"""Upstream's name of a task -> ours, where they differ."""


def make_args(name: str) -> EncoderConfig:
    """Returns the config of a fixture as upstream's."""
    config = load_config(name)
    fields = {
        key: value
        for key, value in config.items()
        if key in EncoderConfig.__dataclass_fields__ and key != "activation_fn"
    }
    return EncoderConfig(**fields)


def load_model(name: str) -> BEiT3Wrapper:
    outputs = load_config(name).get("num_classes")
    outputs = {"vqa": 37, "imageclassification": 11}.get(name, outputs)
    model = CLASSES[name](make_args(name), **({"num_classes": outputs} if outputs else {}))
    assert not any(model.load_state_dict(load_tensors(name, "model"), strict=True))
    return model.eval()


def load_inputs(name: str) -> dict[str, Tensor]:
    """Returns the recorded inputs under the argument names of upstream's models."""
    recorded = load_tensors(name, "inputs")
    keys = {"image", "image_a", "image_b", "text_description", "question", "padding_mask"}
    if name == "captioning":
        captioning_inputs = {
            "text_ids": recorded["masked_tokens"],
            "language_masked_pos": recorded["language_masked_pos"],
            "image_id": torch.zeros(4),
        }
        return captioning_inputs | {key: recorded[key] for key in ("image", "padding_mask")}
    return {key: tensor for key, tensor in recorded.items() if key in keys}


def assert_close(tensor: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(tensor, expected, rtol=0, atol=atol)


# Outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "imageclassification"])
def test_logits_equal_the_recorded_ones(name):
    with torch.inference_mode():
        assert_close(load_model(name)(**load_inputs(name)), load_tensors(name, "outputs")["logits"])


def test_retrieval_features_and_loss_equal_the_recorded_ones():
    model, arguments, expected = (
        load_model("retrieval"),
        load_inputs("retrieval"),
        load_tensors("retrieval", "outputs"),
    )
    with torch.inference_mode():
        loss, image, text = model(**arguments)
        assert_close(loss, expected["loss"])
        assert_close(image, expected["vision_cls"], 1e-5)
        assert_close(text, expected["language_cls"], 1e-5)
        feature, nothing = model(image=arguments["image"], only_infer=True)
        assert nothing is None and torch.equal(feature, image)
        nothing, feature = model(
            text_description=arguments["text_description"],
            padding_mask=arguments["padding_mask"],
            only_infer=True,
        )
        assert nothing is None and torch.equal(feature, text)
    with pytest.raises(ValueError, match="a loss needs image and text_description"):
        model(image=arguments["image"])


@pytest.mark.parametrize("name", CLASSES)
def test_states_of_all_kinds_of_input_equal_the_recorded_ones(name):
    recorded, expected = load_tensors(name, "inputs"), load_tensors(name, "outputs")
    image = recorded.get("image", recorded.get("image_a"))
    text = next(
        recorded[key]
        for key in ("question", "text_description", "backbone.text_ids", "masked_tokens")
        if key in recorded
    )
    text = recorded.get("language_tokens", text)
    padding = recorded.get("padding_mask", recorded.get("backbone.padding_mask"))
    masked = recorded["backbone.vision_masked_position"]
    network = load_model(name).beit3
    calls = {
        "fused": {"visual_tokens": image, "textual_tokens": text, "text_padding_position": padding},
        "fused_no_padding_mask": {"visual_tokens": image, "textual_tokens": text},
        "image_only": {"visual_tokens": image},
        "image_only_masked": {"visual_tokens": image, "vision_masked_position": masked},
        "fused_masked": {
            "visual_tokens": image,
            "textual_tokens": text,
            "text_padding_position": padding.bool(),
            "vision_masked_position": masked,
        },
        "text_only": {"textual_tokens": text, "text_padding_position": padding},
        "text_only_no_padding_mask": {"textual_tokens": text},
    }
    splits = {"image": -1, "text": 0, "fused": 17}
    with torch.inference_mode():
        for case, arguments in calls.items():
            encoded = network(**arguments)
            assert_close(encoded["encoder_out"], expected[f"backbone.{case}"], 5e-4)
            assert encoded["multiway_split_position"] == splits[case.split("_")[0]]
            padding_mask = encoded["encoder_padding_mask"]
            assert padding_mask.shape == encoded["encoder_out"].shape[:2]
            assert int(padding_mask.sum()) == (
                int(padding.sum()) if "text_padding_position" in arguments else 0
            )


def test_the_network_loads_names_without_a_prefix():
    network = BEiT3(make_args("backbone_layers"))
    state, recorded = (
        load_tensors("backbone_layers", "model"),
        load_tensors("backbone_layers", "inputs"),
    )
    network.load_state_dict(state)
    assert network.state_dict().keys() == state.keys()
    with torch.inference_mode():
        states = network.eval()(recorded["text_ids"], recorded["image"], recorded["padding_mask"])[
            "encoder_out"
        ]
    assert_close(states, load_tensors("backbone_layers", "outputs")["fused.encoder_out"])


# Captions -----------------------------------------------------------------------------------------


def test_captioning_logits_equal_the_recorded_ones():
    model, arguments, expected = (
        load_model("captioning"),
        load_inputs("captioning"),
        load_tensors("captioning", "outputs"),
    )
    with torch.inference_mode():
        logits, state = model(**arguments)
        assert_close(logits, expected["logits_masked"])
        assert state is None
        all_logits, _ = model(**arguments | {"language_masked_pos": None})
    assert_close(all_logits, expected["logits_all_positions"])


def test_logits_of_captions_decoded_step_by_step_equal_the_recorded_ones():
    """After every step the caller reorders the state and drops the mask token, as upstream does."""
    model, recorded, expected = (
        load_model("captioning"),
        load_tensors("captioning", "inputs"),
        load_tensors("captioning", "outputs"),
    )
    mask = torch.full((4, 1), 511)
    text, image, state = (
        torch.cat((torch.zeros(4, 1, dtype=torch.int64), mask), 1),
        recorded["image"],
        {},
    )
    step_logits, beams, order = [], torch.arange(4), torch.tensor([1, 3, 0, 2])
    with torch.inference_mode():
        for length, tokens in enumerate([*recorded["decode.forced_tokens"].T, None], start=2):
            logits, state = model(
                image=image,
                text_ids=text,
                language_masked_pos=None,
                padding_mask=torch.zeros_like(text),
                text_len=length,
                incremental_state=state,
            )
            step_logits.append(logits[beams.argsort()])
            beams = beams[order]
            for layer in state:
                for key in state[layer]:
                    state[layer][key] = state[layer][key].index_select(0, order)[:, :, :-1, :]
            image, text = (
                None,
                None if tokens is None else torch.cat((tokens[beams, None], mask), 1),
            )
    assert sorted(state) == [0, 1, 2, 3] and state[0]["prev_key"].shape == (
        4,
        4,
        17 + len(step_logits),
        16,
    )
    assert_close(torch.stack(step_logits), expected["decode.forced_step_logits"])


@pytest.mark.parametrize("beams", ["beam1_lp0.6", "beam3_lp0.6"])
def test_recorded_captions_have_the_recorded_scores(beams):
    """Scores are summed over the tokens, decoded one by one."""
    model, image = load_model("captioning"), load_tensors("captioning", "inputs")["image"]
    expected = json.loads((find_fixture("captioning") / "beam_search.json").read_text())[beams]
    for index, (score, ids) in enumerate(expected["finished"]):
        tokens, total, state, image_or_none = ids[1:-1], 0.0, {}, image[index : index + 1]
        text, ended = torch.tensor([[0, 511]]), len(ids) < expected["max_len"] - 1
        with torch.inference_mode():
            for length, token in enumerate([*tokens, 2] if ended else tokens, start=2):
                logits, state = model(
                    image_or_none, text, None, None, text_len=length, incremental_state=state
                )
                scores = logits[0, 1].log_softmax(-1)
                total += float(scores[token])
                for layer in state.values():
                    layer.update({key: value[:, :, :-1] for key, value in layer.items()})
                image_or_none, text = None, torch.tensor([[token, 511]])
            if not ended:  # at the length limit the score counts one more token
                logits, _ = model(
                    None, text, None, None, text_len=length + 1, incremental_state=state
                )
                total += float(logits[0, 1].log_softmax(-1).max())
        assert total / len(ids) ** expected["length_penalty"] == pytest.approx(score, abs=1e-4)


# State dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_equal_those_of_upstream(name):
    state, exported = load_tensors(name, "model"), load_model(name).state_dict()
    assert exported.keys() == state.keys()
    for key, value in state.items():
        assert exported[key].shape == value.shape and torch.equal(exported[key], value), key


def test_state_dicts_are_views_and_survive_copies_and_files(tmp_path):
    model = load_model("vqa")
    key = "beit3.encoder.layers.0.self_attn.k_proj.B.weight"
    model.state_dict()[key].zero_()  # as a moving average of weights writes
    assert not model.state_dict()[key].any()
    copied = copy.deepcopy(model)
    copied.load_state_dict(load_tensors("vqa", "model"))
    assert not model.state_dict()[key].any() and copied.state_dict()[key].any()
    save_file(copied.state_dict(), tmp_path / "a.safetensors")
    torch.save(
        {"model": {name: value.half() for name, value in copied.state_dict().items()}},
        tmp_path / "a.pth",
    )
    half = torch.load(tmp_path / "a.pth")["model"]
    model.load_state_dict(half)
    assert torch.equal(model.state_dict()[key], half[key].float())
    holder = nn.ModuleDict({"extractor": copied})
    assert all(name.startswith("extractor.") for name in holder.state_dict())
    holder.load_state_dict({f"extractor.{name}": value for name, value in half.items()})
    assert torch.equal(copied.state_dict()[key], half[key].float())


def test_missing_unknown_and_misshapen_tensors_have_released_names():
    model, state = load_model("vqa"), load_tensors("vqa", "model")
    initial_state = {name: value.clone() for name, value in model.state_dict().items()}
    key = "beit3.encoder.layers.1.self_attn.q_proj.A.weight"
    incomplete_state = {
        name: value + 1 for name, value in state.items() if name not in (key, "pooler.dense.bias")
    }
    unknown_tensors = {
        name: torch.zeros(64) for name in ("beit3.encoder.layer_norm.A.weight", "mlm_head.bias")
    }
    missing, unexpected = model.load_state_dict(incomplete_state | unknown_tensors, strict=False)
    assert sorted(missing) == [key, "pooler.dense.bias"]
    assert sorted(unexpected) == ["beit3.encoder.layer_norm.A.weight", "mlm_head.bias"]
    loaded_state = model.state_dict()
    for name, value in initial_state.items():
        assert torch.equal(loaded_state[name], value if name in missing else value + 1), name
    with pytest.raises(RuntimeError, match=key):
        model.load_state_dict(incomplete_state)
    with pytest.raises(RuntimeError, match=r"fc2.bias has shape \[3\], this network needs \[64\]"):
        model.load_state_dict(state | {"beit3.encoder.layers.0.ffn.A.fc2.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="beit3.blocks.0.norm1.image.weight"):
        model.load_state_dict(state | {"beit3.blocks.0.norm1.image.weight": torch.zeros(64)})


def test_attributes_are_those_of_the_migration_guide():
    """These are the rows of the table in docs/migrating.md."""
    network = BEiT3(make_args("backbone_layers"))
    state = load_tensors("backbone_layers", "model")
    network.load_state_dict(state)
    block, image, text = network.blocks[1], network.image_embedding, network.text_embedding
    for key, tensor in {
        "text_embed.weight": text.tokens.weight,
        "vision_embed.proj.weight": image.patch.weight,
        "vision_embed.cls_token": image.class_token,
        "vision_embed.mask_token": image.mask_token,
        "encoder.embed_positions.A.weight": image.positions,
        "encoder.embed_positions.B.weight": text.positions,
        "encoder.layers.1.self_attn.k_proj.A.weight": block.attention.qkv.image.weight.chunk(3)[1],
        "encoder.layers.1.ffn.B.fc1.weight": block.ffn.text.fc1.weight,
        "encoder.layer_norm.B.bias": network.norm.text.bias,
    }.items():
        assert torch.equal(tensor, state[key]), key
    assert 1 + network.config.num_patches == 17


def test_registered_models_have_upstreams_names_shapes_and_sizes():
    shapes = json.loads((find_fixture("state_dict_shapes") / "shapes.json").read_text())
    counts = json.loads((find_fixture("state_dict_shapes") / "param_counts.json").read_text())
    assert compat.MODELS.keys() == counts.keys()
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(name)
            state = model.state_dict()
            task, report = load_released(state)
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name
        assert (
            getattr(compat, name) is compat.MODELS[name]
            and compat.MODELS[name].__name__ == name
            and name in compat.__all__
        )
        assert (
            not report.fresh
            and not report.ignored
            and task.config.image.image_size == model.args.img_size
        )
        assert task_name(type(task)) == TASKS.get(name.rpartition("_")[2], name.rpartition("_")[2])
        if name in shapes:
            assert {key: list(value.shape) for key, value in state.items()} == shapes[name]
        assert model.get_num_layers() == (24 if "large" in name else 12)
        assert model.no_weight_decay() - {"logit_scale"} <= {
            key for key, _ in model.named_parameters()
        }


# Models that users define -------------------------------------------------------------------------


def make_small_args(**changes) -> EncoderConfig:
    return EncoderConfig(
        **{
            "encoder_embed_dim": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_embed_dim": 96,
            "img_size": 32,
            "vocab_size": 90,
            "max_source_positions": 40,
        }
        | changes
    )


class Extractor(BEiT3Wrapper):
    """A model that a user defines, which passes its options on as upstream's classes do."""

    def __init__(self, args, **kwargs):
        super().__init__(args=args, **kwargs)
        self.projection = nn.Linear(args.encoder_embed_dim, 3)
        self.projection.apply(self._init_weights)

    def forward(self, images, ids, attention):
        found = self.beit3(
            visual_tokens=images, textual_tokens=ids, text_padding_position=~attention
        )
        return self.projection(found["encoder_out"][:, :1, ...])


def test_a_head_that_a_user_defines_trains():
    model = Extractor(make_small_args(drop_path_rate=0.1), hidden=3)
    ids, attention = (
        torch.tensor([[0, 5, 2, 1], [0, 5, 6, 2]]),
        torch.tensor([[True, True, True, False], [True] * 4]),
    )
    outputs = model(torch.rand(2, 3, 32, 32), ids, attention)
    assert outputs.shape == (2, 1, 3)
    outputs.sum().backward()
    assert model.beit3.blocks[0].attention.qkv.image.weight.grad.any()


def test_initial_values_are_truncated_normals():
    """Embeddings and heads are normal .02 cut at one deviation; their deviation is then .0108."""
    model = Extractor(make_small_args(vocab_size=5000))
    token_embedding = model.beit3.text_embedding.tokens.weight
    assert (
        token_embedding.abs().max() <= 0.02 + 1e-8
        and float(token_embedding.detach().std()) == pytest.approx(0.0108, rel=0.01)
        and abs(token_embedding.mean()) < 1e-4
    )
    assert model.projection.weight.abs().max() <= 0.02 + 1e-8 and not model.projection.bias.any()
    zero_parameters = ("bias", "class_token", "mask_token")
    assert all(
        value.any()
        for name, value in model.named_parameters()
        if not name.endswith(zero_parameters)
    )
    second_model = Extractor(make_small_args(vocab_size=5000))
    assert torch.equal(
        model.beit3.blocks[1].ffn.image.fc2.weight,
        second_model.beit3.blocks[1].ffn.image.fc2.weight,
    )


def test_two_threads_share_a_model():
    model, arguments = load_model("retrieval"), load_inputs("retrieval")
    text = {
        "text_description": arguments["text_description"],
        "padding_mask": arguments["padding_mask"],
        "only_infer": True,
    }

    def encode(turn: int) -> Tensor:
        with torch.inference_mode():
            return (
                model(image=arguments["image"], only_infer=True)[0]
                if turn % 2
                else model(**text)[1]
            )

    expected = [encode(0), encode(1)]
    with ThreadPoolExecutor(2) as threads:
        for turn, features in enumerate(threads.map(encode, range(40))):
            assert torch.equal(features, expected[turn % 2])


def test_recomputed_activations_change_no_gradient():
    model = load_model("vqa")
    recomputing = compat.BEiT3ForVisualQuestionAnswering(
        EncoderConfig(**vars(make_args("vqa")) | {"checkpoint_activations": True}), 37
    )
    recomputing.load_state_dict(model.state_dict())
    for network in (model, recomputing):
        network(**load_inputs("vqa")).sum().backward()
    for (name, parameter), (_, recomputed) in zip(
        model.named_parameters(), recomputing.named_parameters(), strict=True
    ):
        assert (parameter.grad is None) == (recomputed.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, recomputed.grad)


@pytest.mark.parametrize("pixels", [64, 96])
def test_files_are_loaded_into_models_of_other_sizes(tmp_path, pixels):
    torch.save({"model": load_tensors("vqa", "model")}, tmp_path / "vqa.pth")
    args = make_args("vqa")
    args.img_size = pixels
    model = compat.BEiT3ForVisualQuestionAnswering(args, num_classes=37)
    assert (
        compat.load_model_and_may_interpolate(str(tmp_path / "vqa.pth"), model, "model|module", "")
        == []
    )
    other_head = compat.BEiT3ForVisualQuestionAnswering(args, num_classes=5)
    with pytest.warns(
        UserWarning,
        match="2 tensors are not in .*vqa.pth in this shape and stay untrained: "
        "head.3.weight, head.3.bias",
    ):
        assert compat.load_model_and_may_interpolate(tmp_path / "vqa.pth", other_head) == [
            "untrained: head.3.weight",
            "untrained: head.3.bias",
        ]
    file_positions = load_tensors("vqa", "model")["beit3.encoder.embed_positions.A.weight"]
    positions = model.state_dict()["beit3.encoder.embed_positions.A.weight"]
    assert (
        torch.equal(positions[:3], file_positions[:3]) and len(positions) == 3 + (pixels // 16) ** 2
    )
    assert pixels != 64 or torch.equal(positions, file_positions)
    with pytest.raises(ValueError, match="model_prefix 'beit3.'"):
        compat.load_model_and_may_interpolate(tmp_path / "vqa.pth", model, "model", "beit3.")


def test_configs_pass_their_arguments_on():
    for get_config, dim, depth, heads in (
        (_get_base_config, 768, 12, 12),
        (_get_large_config, 1024, 24, 16),
    ):
        args = get_config(img_size=384, drop_path_rate=0.2, mlp_ratio=2, nothing_of_ours=1)
        assert (args.encoder_embed_dim, args.encoder_layers, args.encoder_attention_heads) == (
            dim,
            depth,
            heads,
        )
        assert (args.img_size, args.drop_path_rate, args.encoder_ffn_embed_dim) == (
            384,
            0.2,
            2 * dim,
        )
        assert args.vocab_size == RELEASED_ROWS and args.normalize_output
    with torch.device("meta"):
        model = vqav2(drop_path_rate=0.3, vocab_size=100, checkpoint_activations=None)
    assert (
        model.args.img_size == 480
        and model.beit3.config.drop_path_rate == 0.3
        and model.beit3.norm is None
    )
    assert (
        model.state_dict()["beit3.text_embed.weight"].shape == (100, 768)
        and model.head[3].out_features == 3129
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_model("beit3_base_patch16_480_vqa"),
            "no model .*_480_vqa; did you mean beit3_base_patch16_480_vqav2",
        ),
        (
            lambda: create_model("beit3_base_patch16_224_nlvr2", pretrained=True),
            "pretrained=True: nothing is downloaded",
        ),
        (
            lambda: create_model("beit3_base_patch16_224_nlvr2", drop_path=0.1),
            "drop_path=0.1 means nothing to nlvr2",
        ),
        (
            lambda: create_model("beit3_base_patch16_224_nlvr2", drop_rate=0.1),
            "drop_rate=0.1 means nothing .*did you mean drop_path_rate",
        ),
        (
            lambda: BEiT3(make_small_args(dropout=0.1)),
            "dropout=0.1 cannot be honored: BEiT-3 has dropout=0.0",
        ),
        (lambda: BEiT3(make_small_args(multiway=False)), "multiway=False cannot be honored"),
        (
            lambda: BEiT3(make_small_args(moe_freq=2, moe_expert_count=4)),
            "moe_freq=2 cannot be honored",
        ),
        (
            lambda: BEiT3(make_small_args(encoder_attention_heads=5)),
            "dim 64 is not a multiple of num_heads 5",
        ),
    ],
)
def test_arguments_that_cannot_be_honored_are_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_arguments_of_known_trainers_are_accepted():
    """These are of upstream's trainer, timm's `create_model` and torchscale's config."""
    with torch.device("meta"):
        model = create_model(
            "beit3_base_patch16_224_retrieval",
            pretrained=False,
            num_classes=3,
            drop_rate=0.0,
            drop_path_rate=0.1,
            drop_block_rate=None,
            vocab_size=90,
            checkpoint_activations=None,
            scriptable=None,
            pretrained_cfg=None,
            cache_dir=None,
        )
        assert model.args.vocab_size == 90 and model.args.drop_path_rate == 0.1
        factory = compat.beit3_base_patch16_224_nlvr2(
            pretrained_cfg=None, pretrained_cfg_overlay=None, norm_layer=nn.LayerNorm
        )
    assert factory.head.dense2.out_features == 2
    args = EncoderConfig(
        encoder_embed_dim=64, flash_attention=False, ddp_rank=0, use_xmoe=False, bert_init=True
    )
    assert (
        args.encoder_embed_dim == 64 and args.encoder_layers == 12 and not hasattr(args, "ddp_rank")
    )


def test_parts_of_heads_equal_the_recorded_ones():
    """`TwoLayerMLP` equals the recorded head, `Pooler` the formula."""
    model = load_model("nlvr2")
    head = compat.TwoLayerMLP(
        in_features=256, hidden_features=128, out_features=2, norm_layer=nn.LayerNorm
    )
    head.load_state_dict(model.head.state_dict())
    states = torch.rand(3, 256)
    assert torch.equal(head(states), model.head(states))
    bare = compat.TwoLayerMLP(256, 128, 2, nn.LayerNorm, norm_input=False)
    assert isinstance(bare.norm1, nn.Identity) and "norm1.weight" not in bare.state_dict()
    bare.load_state_dict(
        {name: value for name, value in head.state_dict().items() if not name.startswith("norm1")}
    )
    torch.testing.assert_close(bare(head.norm1(states)), head(states))
    pooler = compat.Pooler(input_features=64, output_features=5, norm_layer=nn.LayerNorm)
    states = torch.rand(2, 7, 64)
    expected = torch.tanh(
        nn.functional.layer_norm(states[:, 0], (64,)) @ pooler.dense.weight.T + pooler.dense.bias
    )
    torch.testing.assert_close(pooler(states), expected)


class CountPairs(nn.Module):
    """Returns the number of pairs in place of a loss."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, None, None]:
        return torch.tensor(len(image)), None, None


def test_the_criterion_can_be_replaced():
    """The default criterion returns upstream's three results."""
    model, arguments, expected = (
        load_model("retrieval"),
        load_inputs("retrieval"),
        load_tensors("retrieval", "outputs"),
    )
    with torch.inference_mode():
        image, text = expected["vision_cls"], expected["language_cls"]
        loss, to_text, to_image = model.criterion(image, text, model.logit_scale.exp())
        assert_close(loss, expected["loss"])
        assert_close(to_text, model.logit_scale.exp() * image @ text.T)
        assert_close(to_image, to_text.T)
        assert not any(name.startswith("criterion") for name in model.state_dict())
        model.criterion = CountPairs()
        assert model(**arguments)[0] == len(image)


@pytest.mark.parametrize("task", CLASSES)
def test_layers_of_parameters_follow_upstreams_rule(task):
    """The rule reads the layer from the released name."""

    def upstream(key: str) -> int:
        if "embed" in key:
            return 0
        return (
            int(key.split("layers.")[1].split(".")[0]) + 1
            if "layers." in key
            else model.get_num_layers() + 1
        )

    model = load_model(task)
    for name, _ in model.named_parameters():
        keys = find_released_keys(name.replace("beit3.", "backbone.", 1), {}) or (name,)
        assert {upstream(key) for key in keys} == {model.get_num_layer(name)}, name


def test_calls_that_cannot_be_honored_are_refused():
    network = BEiT3(make_small_args()).eval()
    text, image = torch.tensor([[0, 5, 2]]), torch.zeros(1, 3, 32, 32)
    rows = torch.arange(2, 5)[None]
    plain, first, later = (
        network(text, positions=at)["encoder_out"] for at in (None, rows, rows + 1)
    )
    assert torch.equal(plain, first) and not torch.equal(plain, later)
    for arguments, message in (
        (
            {"positions": torch.tensor([[4, 6, 8]])},
            r"positions \[4, 6, 8\]: give consecutive rows of the text position table",
        ),
        (
            {"positions": torch.tensor([[2, 3, 4]]), "visual_tokens": image},
            "positions beside visual_tokens",
        ),
        (
            {"incremental_state": {}, "text_padding_position": torch.tensor([[0, 0, 1]])},
            "decode texts without padding",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            network(text, **arguments)
    captioning = compat.BEiT3ForCaptioning(make_small_args())
    with pytest.raises(ValueError, match="the first step needs the image"):
        captioning(None, text, None, None, incremental_state={})
    with pytest.raises(ValueError, match="text_len 5 with 3 text_ids"):
        captioning(image, text, None, None, text_len=5)


def test_unknown_models_are_attribute_errors():
    with pytest.raises(AttributeError, match="beit3_giant_patch14_224_nlvr2"):
        compat.beit3_giant_patch14_224_nlvr2  # noqa: B018
