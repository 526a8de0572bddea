"""The release's names over our network: against everything recorded from the official code, as
users of the release call it."""

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
"""Upstream's names of tasks that are called otherwise here."""


def arguments(name: str) -> EncoderConfig:
    """The fixture's own config, in upstream's words."""
    given = load_config(name)
    known = {
        key: value
        for key, value in given.items()
        if key in EncoderConfig.__dataclass_fields__ and key != "activation_fn"
    }
    return EncoderConfig(**known)


def built(name: str) -> BEiT3Wrapper:
    outputs = load_config(name).get("num_classes")
    outputs = {"vqa": 37, "imageclassification": 11}.get(name, outputs)
    model = CLASSES[name](arguments(name), **({"num_classes": outputs} if outputs else {}))
    assert not any(model.load_state_dict(load_tensors(name, "model"), strict=True))
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """The recorded inputs as upstream's trainer names them."""
    given = load_tensors(name, "inputs")
    keys = {"image", "image_a", "image_b", "text_description", "question", "padding_mask"}
    if name == "captioning":
        named = {
            "text_ids": given["masked_tokens"],
            "language_masked_pos": given["language_masked_pos"],
            "image_id": torch.zeros(4),
        }
        return named | {key: given[key] for key in ("image", "padding_mask")}
    return {key: tensor for key, tensor in given.items() if key in keys}


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "imageclassification"])
def test_logits(name):
    with torch.inference_mode():
        close(built(name)(**inputs(name)), load_tensors(name, "outputs")["logits"])


def test_retrieval():
    model, given, expected = (
        built("retrieval"),
        inputs("retrieval"),
        load_tensors("retrieval", "outputs"),
    )
    with torch.inference_mode():
        loss, image, text = model(**given)
        close(loss, expected["loss"])
        close(image, expected["vision_cls"], 1e-5)
        close(text, expected["language_cls"], 1e-5)
        alone, nothing = model(image=given["image"], only_infer=True)
        assert nothing is None and torch.equal(alone, image)
        nothing, alone = model(
            text_description=given["text_description"],
            padding_mask=given["padding_mask"],
            only_infer=True,
        )
        assert nothing is None and torch.equal(alone, text)
    with pytest.raises(ValueError, match="a loss needs image and text_description"):
        model(image=given["image"])


@pytest.mark.parametrize("name", CLASSES)
def test_states_of_every_kind_of_input(name):
    given, expected = load_tensors(name, "inputs"), load_tensors(name, "outputs")
    image = given.get("image", given.get("image_a"))
    text = next(
        given[key]
        for key in ("question", "text_description", "backbone.text_ids", "masked_tokens")
        if key in given
    )
    text = given.get("language_tokens", text)
    padding = given.get("padding_mask", given.get("backbone.padding_mask"))
    masked = given["backbone.vision_masked_position"]
    network = built(name).beit3
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
        for kind, call in calls.items():
            found = network(**call)
            close(found["encoder_out"], expected[f"backbone.{kind}"], 5e-4)
            assert found["multiway_split_position"] == splits[kind.split("_")[0]]
            hidden = found["encoder_padding_mask"]
            assert hidden.shape == found["encoder_out"].shape[:2]
            assert int(hidden.sum()) == (
                int(padding.sum()) if "text_padding_position" in call else 0
            )


def test_the_bare_network():
    """torchscale's own class: names without a prefix."""
    network = BEiT3(arguments("backbone_layers"))
    state, given = (
        load_tensors("backbone_layers", "model"),
        load_tensors("backbone_layers", "inputs"),
    )
    network.load_state_dict(state)
    assert network.state_dict().keys() == state.keys()
    with torch.inference_mode():
        found = network.eval()(given["text_ids"], given["image"], given["padding_mask"])[
            "encoder_out"
        ]
    close(found, load_tensors("backbone_layers", "outputs")["fused.encoder_out"])


# Captions -----------------------------------------------------------------------------------------


def test_captioning_in_training():
    model, given, expected = (
        built("captioning"),
        inputs("captioning"),
        load_tensors("captioning", "outputs"),
    )
    with torch.inference_mode():
        logits, state = model(**given)
        close(logits, expected["logits_masked"])
        assert state is None
        everything, _ = model(**given | {"language_masked_pos": None})
    close(everything, expected["logits_all_positions"])


def test_captions_step_by_step():
    """As the release's evaluation does: after every step the caller reorders the state and drops
    the slot's keys and values."""
    model, given, expected = (
        built("captioning"),
        load_tensors("captioning", "inputs"),
        load_tensors("captioning", "outputs"),
    )
    slot = torch.full((4, 1), 511)
    text, image, state = (
        torch.cat((torch.zeros(4, 1, dtype=torch.int64), slot), 1),
        given["image"],
        {},
    )
    steps, rows, order = [], torch.arange(4), torch.tensor([1, 3, 0, 2])
    with torch.inference_mode():
        for length, words in enumerate([*given["decode.forced_tokens"].T, None], start=2):
            logits, state = model(
                image=image,
                text_ids=text,
                language_masked_pos=None,
                padding_mask=torch.zeros_like(text),
                text_len=length,
                incremental_state=state,
            )
            steps.append(logits[rows.argsort()])
            rows = rows[order]
            for layer in state:
                for key in state[layer]:
                    state[layer][key] = state[layer][key].index_select(0, order)[:, :, :-1, :]
            image, text = None, None if words is None else torch.cat((words[rows, None], slot), 1)
    assert sorted(state) == [0, 1, 2, 3] and state[0]["prev_key"].shape == (
        4,
        4,
        17 + len(steps),
        16,
    )
    close(torch.stack(steps), expected["decode.forced_step_logits"])


@pytest.mark.parametrize("beams", ["beam1_lp0.6", "beam3_lp0.6"])
def test_recorded_captions_score_what_was_recorded(beams):
    """Their words, one after the other."""
    model, image = built("captioning"), load_tensors("captioning", "inputs")["image"]
    expected = json.loads((find_fixture("captioning") / "beam_search.json").read_text())[beams]
    for index, (score, ids) in enumerate(expected["finished"]):
        words, total, state, picture = ids[1:-1], 0.0, {}, image[index : index + 1]
        text, ended = torch.tensor([[0, 511]]), len(ids) < expected["max_len"] - 1
        with torch.inference_mode():
            for length, word in enumerate([*words, 2] if ended else words, start=2):
                logits, state = model(
                    picture, text, None, None, text_len=length, incremental_state=state
                )
                scores = logits[0, 1].log_softmax(-1)
                total += float(scores[word])
                for layer in state.values():
                    layer.update({key: value[:, :, :-1] for key, value in layer.items()})
                picture, text = None, torch.tensor([[word, 511]])
            if (
                not ended
            ):  # at the length limit the word that would follow counts without being written
                logits, _ = model(
                    None, text, None, None, text_len=length + 1, incremental_state=state
                )
                total += float(logits[0, 1].log_softmax(-1).max())
        assert total / len(ids) ** expected["length_penalty"] == pytest.approx(score, abs=1e-4)


# State dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_are_upstreams_to_the_byte(name):
    state, found = load_tensors(name, "model"), built(name).state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].shape == value.shape and torch.equal(found[key], value), key


def test_state_dicts_are_views_and_survive_copies_and_files(tmp_path):
    model = built("vqa")
    key = "beit3.encoder.layers.0.self_attn.k_proj.B.weight"
    model.state_dict()[key].zero_()  # as a moving average of weights writes
    assert not model.state_dict()[key].any()
    twin = copy.deepcopy(model)
    twin.load_state_dict(load_tensors("vqa", "model"))
    assert not model.state_dict()[key].any() and twin.state_dict()[key].any()
    save_file(twin.state_dict(), tmp_path / "a.safetensors")
    torch.save(
        {"model": {name: value.half() for name, value in twin.state_dict().items()}},
        tmp_path / "a.pth",
    )
    half = torch.load(tmp_path / "a.pth")["model"]
    model.load_state_dict(half)
    assert torch.equal(model.state_dict()[key], half[key].float())
    holder = nn.ModuleDict({"extractor": twin})
    assert all(name.startswith("extractor.") for name in holder.state_dict())
    holder.load_state_dict({f"extractor.{name}": value for name, value in half.items()})
    assert torch.equal(twin.state_dict()[key], half[key].float())


def test_what_does_not_fit_is_named_as_upstream_names_it():
    model, state = built("vqa"), load_tensors("vqa", "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    key = "beit3.encoder.layers.1.self_attn.q_proj.A.weight"
    part = {
        name: value + 1 for name, value in state.items() if name not in (key, "pooler.dense.bias")
    }
    more = {
        name: torch.zeros(64) for name in ("beit3.encoder.layer_norm.A.weight", "mlm_head.bias")
    }
    missing, unexpected = model.load_state_dict(part | more, strict=False)
    assert sorted(missing) == [key, "pooler.dense.bias"]
    assert sorted(unexpected) == ["beit3.encoder.layer_norm.A.weight", "mlm_head.bias"]
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value if name in missing else value + 1), name
    with pytest.raises(RuntimeError, match=key):
        model.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"fc2.bias has shape \[3\], this network needs \[64\]"):
        model.load_state_dict(state | {"beit3.encoder.layers.0.ffn.A.fc2.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="beit3.blocks.0.norm1.image.weight"):
        model.load_state_dict(state | {"beit3.blocks.0.norm1.image.weight": torch.zeros(64)})


def test_the_attributes_of_the_guide():
    """The table of docs/migrating.md."""
    network = BEiT3(arguments("backbone_layers"))
    state = load_tensors("backbone_layers", "model")
    network.load_state_dict(state)
    block, picture, text = network.blocks[1], network.image_embedding, network.text_embedding
    for key, tensor in {
        "text_embed.weight": text.tokens.weight,
        "vision_embed.proj.weight": picture.patch.weight,
        "vision_embed.cls_token": picture.class_token,
        "vision_embed.mask_token": picture.mask_token,
        "encoder.embed_positions.A.weight": picture.positions,
        "encoder.embed_positions.B.weight": text.positions,
        "encoder.layers.1.self_attn.k_proj.A.weight": block.attention.qkv.image.weight.chunk(3)[1],
        "encoder.layers.1.ffn.B.fc1.weight": block.ffn.text.fc1.weight,
        "encoder.layer_norm.B.bias": network.norm.text.bias,
    }.items():
        assert torch.equal(tensor, state[key]), key
    assert 1 + network.config.num_patches == 17


def test_names_shapes_and_numbers_of_every_registered_model():
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


# As users call it ---------------------------------------------------------------------------------


def small(**changes) -> EncoderConfig:
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
    """A head of one's own on a wrapper, its options passed along as upstream's classes do."""

    def __init__(self, args, **kwargs):
        super().__init__(args=args, **kwargs)
        self.projection = nn.Linear(args.encoder_embed_dim, 3)
        self.projection.apply(self._init_weights)

    def forward(self, images, ids, attention):
        found = self.beit3(
            visual_tokens=images, textual_tokens=ids, text_padding_position=~attention
        )
        return self.projection(found["encoder_out"][:, :1, ...])


def test_a_head_of_ones_own_trains():
    model = Extractor(small(drop_path_rate=0.1), hidden=3)
    ids, attention = (
        torch.tensor([[0, 5, 2, 1], [0, 5, 6, 2]]),
        torch.tensor([[True, True, True, False], [True] * 4]),
    )
    found = model(torch.rand(2, 3, 32, 32), ids, attention)
    assert found.shape == (2, 1, 3)
    found.sum().backward()
    assert model.beit3.blocks[0].attention.qkv.image.weight.grad.any()


def test_initial_values():
    """Words and heads: a normal of .02 cut at one deviation, whose own deviation is then .0108;
    nothing is left unset."""
    model = Extractor(small(vocab_size=5000))
    words = model.beit3.text_embedding.tokens.weight
    assert (
        words.abs().max() <= 0.02 + 1e-8
        and float(words.std()) == pytest.approx(0.0108, rel=0.01)
        and abs(words.mean()) < 1e-4
    )
    assert model.projection.weight.abs().max() <= 0.02 + 1e-8 and not model.projection.bias.any()
    untouched = ("bias", "class_token", "mask_token")
    assert all(
        value.any() for name, value in model.named_parameters() if not name.endswith(untouched)
    )
    other = Extractor(small(vocab_size=5000))
    assert torch.equal(
        model.beit3.blocks[1].ffn.image.fc2.weight, other.beit3.blocks[1].ffn.image.fc2.weight
    )


def test_two_threads_share_a_model():
    model, given = built("retrieval"), inputs("retrieval")
    text = {
        "text_description": given["text_description"],
        "padding_mask": given["padding_mask"],
        "only_infer": True,
    }

    def ask(turn: int) -> Tensor:
        with torch.inference_mode():
            return model(image=given["image"], only_infer=True)[0] if turn % 2 else model(**text)[1]

    expected = [ask(0), ask(1)]
    with ThreadPoolExecutor(2) as threads:
        for turn, found in enumerate(threads.map(ask, range(40))):
            assert torch.equal(found, expected[turn % 2])


def test_recomputed_activations_change_no_gradient():
    model = built("vqa")
    again = compat.BEiT3ForVisualQuestionAnswering(
        EncoderConfig(**vars(arguments("vqa")) | {"checkpoint_activations": True}), 37
    )
    again.load_state_dict(model.state_dict())
    for each in (model, again):
        each(**inputs("vqa")).sum().backward()
    for (name, one), (_, two) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("pixels", [64, 96])
def test_a_file_into_a_model_of_another_size(tmp_path, pixels):
    torch.save({"model": load_tensors("vqa", "model")}, tmp_path / "vqa.pth")
    args = arguments("vqa")
    args.img_size = pixels
    same = compat.BEiT3ForVisualQuestionAnswering(args, num_classes=37)
    assert (
        compat.load_model_and_may_interpolate(str(tmp_path / "vqa.pth"), same, "model|module", "")
        == []
    )
    other = compat.BEiT3ForVisualQuestionAnswering(args, num_classes=5)
    with pytest.warns(
        UserWarning,
        match="2 tensors are not in .*vqa.pth in this shape and stay untrained: head.3.weight, head.3.bias",
    ):
        assert compat.load_model_and_may_interpolate(tmp_path / "vqa.pth", other) == [
            "untrained: head.3.weight",
            "untrained: head.3.bias",
        ]
    expected = load_tensors("vqa", "model")["beit3.encoder.embed_positions.A.weight"]
    found = same.state_dict()["beit3.encoder.embed_positions.A.weight"]
    assert torch.equal(found[:3], expected[:3]) and len(found) == 3 + (pixels // 16) ** 2
    assert pixels != 64 or torch.equal(found, expected)
    with pytest.raises(ValueError, match="model_prefix 'beit3.'"):
        compat.load_model_and_may_interpolate(tmp_path / "vqa.pth", same, "model", "beit3.")


def test_configurations():
    for make, dim, depth, heads in (
        (_get_base_config, 768, 12, 12),
        (_get_large_config, 1024, 24, 16),
    ):
        args = make(img_size=384, drop_path_rate=0.2, mlp_ratio=2, nothing_of_ours=1)
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
            lambda: BEiT3(small(dropout=0.1)),
            "dropout=0.1 cannot be honored: BEiT-3 has dropout=0.0",
        ),
        (lambda: BEiT3(small(multiway=False)), "multiway=False cannot be honored"),
        (lambda: BEiT3(small(moe_freq=2, moe_expert_count=4)), "moe_freq=2 cannot be honored"),
        (
            lambda: BEiT3(small(encoder_attention_heads=5)),
            "dim 64 is not a multiple of num_heads 5",
        ),
    ],
)
def test_arguments_that_cannot_be_honored(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_arguments_of_trainers_pass():
    """Upstream's trainer, timm's `create_model`, and torchscale's configuration, whose other fields
    are ignored there too."""
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


def test_parts_for_heads_of_ones_own():
    """Upstream's `Pooler` and `TwoLayerMLP`: the recorded heads, and the same by hand."""
    model = built("nlvr2")
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
    found = torch.tanh(
        nn.functional.layer_norm(states[:, 0], (64,)) @ pooler.dense.weight.T + pooler.dense.bias
    )
    torch.testing.assert_close(pooler(states), found)


class Count(nn.Module):
    """How many pairs there are, in place of a loss."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, None, None]:
        return torch.tensor(len(image)), None, None


def test_a_criterion_of_ones_own():
    """`criterion` gives upstream's three results, and another takes its place."""
    model, given, expected = (
        built("retrieval"),
        inputs("retrieval"),
        load_tensors("retrieval", "outputs"),
    )
    with torch.inference_mode():
        image, text = expected["vision_cls"], expected["language_cls"]
        loss, to_text, to_image = model.criterion(image, text, model.logit_scale.exp())
        close(loss, expected["loss"])
        close(to_text, model.logit_scale.exp() * image @ text.T)
        close(to_image, to_text.T)
        assert not any(name.startswith("criterion") for name in model.state_dict())
        model.criterion = Count()
        assert model(**given)[0] == len(image)


@pytest.mark.parametrize("name", CLASSES)
def test_layers_of_parameters_are_upstreams(name):
    """Its rule reads the released names."""

    def upstream(key: str) -> int:
        if "embed" in key:
            return 0
        return (
            int(key.split("layers.")[1].split(".")[0]) + 1
            if "layers." in key
            else model.get_num_layers() + 1
        )

    model = built(name)
    for ours, _ in model.named_parameters():
        keys = find_released_keys(ours.replace("beit3.", "backbone.", 1), {}) or (ours,)
        assert {upstream(key) for key in keys} == {model.get_num_layer(ours)}, ours


def test_calls_that_cannot_be_honored():
    network = BEiT3(small()).eval()
    text, image = torch.tensor([[0, 5, 2]]), torch.zeros(1, 3, 32, 32)
    rows = torch.arange(2, 5)[None]
    plain, first, later = (
        network(text, positions=at)["encoder_out"] for at in (None, rows, rows + 1)
    )
    assert torch.equal(plain, first) and not torch.equal(plain, later)
    for call, message in (
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
            network(text, **call)
    captioning = compat.BEiT3ForCaptioning(small())
    with pytest.raises(ValueError, match="the first step needs the image"):
        captioning(None, text, None, None, incremental_state={})
    with pytest.raises(ValueError, match="text_len 5 with 3 text_ids"):
        captioning(image, text, None, None, text_len=5)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="beit3_giant_patch14_224_nlvr2"):
        compat.beit3_giant_patch14_224_nlvr2  # noqa: B018
