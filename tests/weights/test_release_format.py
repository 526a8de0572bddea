"""Released files: reading them safely, knowing them by their keys, loading them, and writing them
back."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, VL_MEAN_STD
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.model.generation import Decoding
from beit3.recipe import TaskConfig
from beit3.task import Task, task_name
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.weights.loading import load_released
from beit3.weights.release_format import identify_checkpoint, infer_model_config, to_released_state
from beit3.weights.state_dicts import read_state_dict
from tests.golden import find_fixture, load_tensors

State = dict[str, Tensor]


def same(one: State, two: State) -> None:
    """Equal names, and tensors equal to the byte."""
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def small(**changes) -> Backbone:
    config = replace(
        TINY_RELEASE,
        dim=64,
        num_heads=1,
        depth=2,
        ffn_dim=32,
        image_size=16,
        vocab_size=30,
        text_positions=12,
    )
    task = Backbone(TaskConfig(model=replace(config, **changes)))
    task.init_weights(0)
    return task


@pytest.fixture(scope="module")
def bare() -> State:
    """A released backbone of our making, without a head."""
    return to_released_state(small())


def with_pretraining_heads(state: State, codes: int = 9) -> State:
    words, dim = state["beit3.text_embed.weight"].shape
    heads = {"mlm_head": words, "mim_head": codes}
    return state | {
        f"{name}.{part}": torch.randn((rows, dim) if part == "weight" else (rows,))
        for name, rows in heads.items()
        for part in ("weight", "bias")
    }


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", ["model", "module", "state_dict", None])
def test_nesting(tmp_path, bare, nest):
    torch.save({nest: bare, "epoch": 3} if nest else bare, tmp_path / "a.pth")
    same(read_state_dict(tmp_path / "a.pth"), bare)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_becomes_float32(tmp_path, bare, dtype):
    torch.save(
        {"model": {name: tensor.to(dtype) for name, tensor in bare.items()}}, tmp_path / "a.pth"
    )
    same(
        read_state_dict(tmp_path / "a.pth"),
        {name: tensor.to(dtype).float() for name, tensor in bare.items()},
    )


@pytest.mark.parametrize("name", ["a.zip", "a.pth", "a.bin", "a.safetensors", "no_ending"])
def test_the_content_decides_not_the_name(tmp_path, bare, name):
    torch.save({"model": bare}, tmp_path / name)
    same(read_state_dict(tmp_path / name), bare)
    torch.save(bare, tmp_path / name, _use_new_zipfile_serialization=False)
    same(read_state_dict(tmp_path / name), bare)
    save_file(bare, tmp_path / name)
    same(read_state_dict(tmp_path / name), bare)


def test_the_official_trainers_checkpoints_carry_their_command_line(tmp_path, bare):
    torch.save(
        {"model": bare, "args": argparse.Namespace(lr=1.0), "epoch": 1, "scaler": {}},
        tmp_path / "a.pth",
    )
    same(read_state_dict(tmp_path / "a.pth"), bare)


class Payload:
    """A pickle that would make a directory when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_never_run(tmp_path, bare):
    trap = tmp_path / "trap"
    for old_format in (False, True):
        torch.save(
            {"model": bare, "x": Payload(trap)},
            tmp_path / "a.pth",
            _use_new_zipfile_serialization=not old_format,
        )
        with pytest.raises(
            ValueError, match="a.pth is refused, it holds .*: ask for a file of tensors alone"
        ):
            read_state_dict(tmp_path / "a.pth")
        assert not trap.exists()


def test_files_that_are_no_weights(tmp_path, bare):
    torch.save({"model": bare}, tmp_path / "whole.pth")
    save_file(bare, tmp_path / "whole.safetensors")
    contents = {
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:5000],
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:5000],
        "page.pth": b"<!DOCTYPE html><title>404</title>",
        "empty.pth": b"",
        "zip.pth": b"PK\x03\x04 not a torch archive at all",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*: download it again$"):
            read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match="no weights at .*absent.pth"):
        read_state_dict(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no named tensors"),
        ({}, "holds no named tensors"),
        ({"model": {"a": 3}}, "'a' is of type int"),
        ({"epoch": 3}, "'epoch' is of type int"),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "a.pth")


# Recognising --------------------------------------------------------------------------------------

KINDS = {"vqav2": "vqa", "imageclassification": "imagenet"}


def wrappers() -> dict[str, dict[str, list[int]]]:
    return json.loads((find_fixture("state_dict_shapes") / "shapes.json").read_text())


def test_every_released_model_is_known_by_its_keys():
    for name, shapes in wrappers().items():
        kind = name.rsplit("_", 1)[-1]
        assert identify_checkpoint(shapes) == KINDS.get(kind, kind), name
    bare = [key.removeprefix("beit3.") for key in shapes if key.startswith("beit3.")]
    assert identify_checkpoint(bare) == "backbone"
    assert identify_checkpoint([*shapes, "mlm_head.weight", "mim_head.weight"]) == "pretrain"
    assert identify_checkpoint(load_tensors("vqkd", "model")) == "vqkd"
    with pytest.raises(ValueError, match="not BEiT-3 weights: the keys begin with conv1.weight"):
        identify_checkpoint(["conv1.weight"])
    with pytest.raises(ValueError, match="this package's own tensors: give the directory"):
        identify_checkpoint(["backbone.text_embedding.positions"])


def test_names_and_shapes_of_every_released_model():
    counts = json.loads((find_fixture("state_dict_shapes") / "param_counts.json").read_text())
    for name, shapes in wrappers().items():
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
            task, report = load_released(state)
        assert task_name(type(task)) == identify_checkpoint(shapes)
        assert {
            key: list(tensor.shape) for key, tensor in to_released_state(task).items()
        } == shapes, name
        assert not report.ignored and not report.fresh, name
        assert sum(parameter.numel() for parameter in task.parameters()) == counts[name], name
        pictures = task.config.image
        assert task.config.model.image_size == pictures.image_size == int(name.split("_")[3])
        crop = name.endswith("imageclassification")
        assert (pictures.mean, pictures.std) == (IMAGENET_MEAN_STD if crop else VL_MEAN_STD)
        assert (pictures.resize, pictures.interpolation, pictures.crop_pct) == (
            "crop" if crop else "squash",
            "bicubic",
            1.0,
        )
        lengths = {
            "captioning": 64,
            "imagenet": 32,
        }  # the release's evaluation; texts of ImageNet are names
        assert task.config.text_length == lengths.get(identify_checkpoint(shapes), 64)
        assert identify_checkpoint(shapes) != "captioning" or task.config.decoding == Decoding(
            "beam", 3, 0.6
        )


def test_number_of_tensors():
    """Reference counts: 40 a layer, 7 embeddings; the final norm 4."""
    for name, shapes in wrappers().items():
        backbone = [key for key in shapes if key.startswith("beit3.")]
        depth = 24 if "large" in name else 12
        norm = 0 if name.endswith(("vqav2", "imageclassification")) else 4
        with torch.device("meta"):
            assert (
                len(
                    to_released_state(
                        load_released({k: torch.empty(shapes[k]) for k in backbone})[0]
                    )
                )
                == 40 * depth + 7 + norm
            )


# Loading ------------------------------------------------------------------------------------------


def test_round_trips_are_equal_to_the_byte(bare):
    vqa = load_tensors("vqa", "model")
    layers = {
        f"beit3.{name}": tensor for name, tensor in load_tensors("backbone_layers", "model").items()
    }
    pretrain = with_pretraining_heads(bare)
    for state, kind in ((vqa, VQA), (layers, Backbone), (pretrain, Pretrain), (bare, Backbone)):
        task, report = load_released(state)
        assert type(task) is kind
        assert not report.ignored and not report.fresh
        same(to_released_state(task), state)


def test_the_round_trip_does_not_share_memory(bare):
    task, _ = load_released(bare)
    copy = to_released_state(task)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
    same(copy, bare)


def test_vqa_equals_the_official_model():
    given, expected = load_tensors("vqa", "inputs"), load_tensors("vqa", "outputs")
    task, _ = load_released(load_tensors("vqa", "model"), num_heads=4)
    assert isinstance(task, VQA) and task.config.num_answers == 37 and task.config.answers == ()
    padding = given["padding_mask"].bool()
    batch = {
        "image": given["image"],
        "text": given["question"],
        "text_padding": padding,
        "target": given["labels"],
    }
    task.eval()
    torch.testing.assert_close(task.outputs(batch)["logits"], expected["logits"], rtol=0, atol=1e-4)
    loss = task(batch)["losses"]["loss"] / task.targets(batch)["loss"]
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=1e-4)

    loss.backward()
    assert task.backbone.image_embedding.mask_token.grad is None
    gradients, _ = load_released(load_tensors("vqa", "model"), num_heads=4)
    with torch.no_grad():
        for value, parameter in zip(gradients.parameters(), task.parameters(), strict=True):
            value.copy_(torch.zeros_like(value) if parameter.grad is None else parameter.grad)
    found = to_released_state(gradients)
    for name, gradient in load_tensors("vqa", "grads").items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    norms = json.loads((find_fixture("vqa") / "grad_norms.json").read_text())
    assert norms.keys() == found.keys()
    for name, norm in norms.items():
        assert found[name].norm().item() == pytest.approx(norm or 0.0, rel=1e-4, abs=1e-4), name


def test_another_number_of_heads_is_another_network():
    """Shapes do not tell the heads, so a wrong number loads; this pins that the argument reaches
    the network."""
    state = load_tensors("vqa", "model")
    assert load_released(state, num_heads=4)[0].config.model.num_heads == 4
    assert load_released(state)[0].config.model.num_heads == 1


def test_sizes(bare):
    config = replace(
        TINY_RELEASE,
        dim=64,
        num_heads=1,
        depth=2,
        ffn_dim=32,
        image_size=16,
        vocab_size=30,
        text_positions=12,
    )
    assert infer_model_config(bare) == config
    assert infer_model_config(
        {key.removeprefix("beit3."): tensor for key, tensor in bare.items()}, 2
    ) == replace(config, num_heads=2)
    plain = to_released_state(small(sub_ln=False, final_norm=False))
    assert infer_model_config(plain) == replace(config, sub_ln=False, final_norm=False)
    same(to_released_state(load_released(plain)[0]), plain)


def test_a_pretrained_file_as_vqa(bare):
    state = with_pretraining_heads(bare)
    task, report = load_released(state, "vqa", answers=("yes", "no"))
    assert (
        isinstance(task, VQA)
        and task.config.answers == ("yes", "no")
        and task.config.num_answers == 2
    )
    assert task.backbone.norm is None
    assert set(report.ignored) == {
        key for key in state if "encoder.layer_norm." in key or key.startswith("m")
    }
    assert {reason for key, reason in report.ignored.items() if "head" in key} == {
        "head of pretrain: no part of vqa"
    }
    assert set(report.fresh) == {
        name for name in task.state_dict() if not name.startswith("backbone.")
    }
    twin, _ = load_released(state, VQA, answers=("yes", "no"))
    same(dict(task.state_dict()), dict(twin.state_dict()))
    assert 0 < task.head[0].weight.abs().max() <= 0.02, "fresh heads have BEiT's initial values"
    assert [line.split(" (")[0] for line in report.lines()] == [
        f"{len(report.loaded)} tensors loaded from a released pretrain file",
        "4 ignored",
        "4 ignored",
        "10 fresh",
    ]


def test_heads_of_other_versions_are_reported(bare):
    state = bare | {
        "vision_head.weight": torch.zeros(64, 64),
        "language_head.weight": torch.zeros(64, 64),
        "logit_scale": torch.zeros(()),
    }
    task, report = load_released(state, Backbone)
    assert isinstance(task, Backbone)
    assert len(report.ignored) == 3 and all(
        reason.startswith("head of retrieval: ") for reason in report.ignored.values()
    )


def test_a_file_of_the_image_side_alone(bare):
    state = {
        key: tensor for key, tensor in bare.items() if ".B." not in key and "text_embed" not in key
    }
    task, report = load_released(state)
    assert task.config.model.vocab_size == 64010
    assert set(report.fresh.values()) == {"the file holds the image side alone"}
    assert {name for name in task.state_dict() if ".text" in name} == set(report.fresh)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(
        task.eval().outputs({"image": image})["image"],
        small().eval().outputs({"image": image})["image"],
    )


def test_vqkd_files_become_the_visual_tokenizer():
    state, given, expected = (load_tensors("vqkd", file) for file in ("model", "inputs", "outputs"))
    task, report = load_released(
        state,
        num_heads=json.loads((find_fixture("vqkd") / "config.json").read_text()).get(
            "num_heads", 4
        ),
    )
    assert identify_checkpoint(state) == "vqkd" and not report.fresh
    assert set(report.ignored) == {
        key
        for key in state
        if key not in ("quantize.embedding.weight",) and key.startswith("quantize.")
    }
    codes = task.eval().outputs({"token_image": given["image_0_1"]})["codes"]
    assert torch.equal(codes.flatten(), expected["image_0_1.codebook_indices"].flatten())
    with pytest.raises(ValueError, match="a released vqkd file cannot become vqa"):
        load_released(state, "vqa")


# Another task's file ------------------------------------------------------------------------------


def dual(bare: State) -> State:
    """A released retrieval file."""
    task, _ = load_released(bare, "retrieval")
    return to_released_state(task)


def test_a_retrieval_file_classifies_by_names(bare):
    state = dual(bare)
    task, report = load_released(
        state, "imagenet", classes=("cat", "dog", "house"), prompt="a photo of a {}"
    )
    assert not report.fresh and not report.ignored
    assert (task.config.head, task.config.num_classes, task.config.prompt) == (
        "names",
        3,
        "a photo of a {}",
    )
    assert task.config.classes == ("cat", "dog", "house")
    assert task.config.image == replace(load_released(state)[0].config.image, image_size=16), (
        "pictures as retrieval knows them"
    )
    same(to_released_state(task), state)


def test_an_imagenet_file(bare):
    state = to_released_state(
        load_released(without_norm(bare), "imagenet", classes=("cat", "dog"))[0]
    )
    task, report = load_released(state, classes=("cat", "dog"))
    assert not report.fresh and (task.config.head, task.config.num_classes) == ("linear", 2)
    assert (task.config.image.mean, task.config.image.resize) == (IMAGENET_MEAN_STD[0], "crop")
    as_backbone, _ = load_released(state, "backbone")
    assert as_backbone.config.image == task.config.image, "the pictures that these weights know"
    with pytest.raises(
        ValueError, match="3 classes given, the file's head has 2 outputs: give its own list"
    ):
        load_released(state, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match="prompt 'a photo' has no {}"):
        load_released(dual(bare), "imagenet", classes=("a",), prompt="a photo")


def without_norm(bare: State) -> State:
    return {key: tensor for key, tensor in bare.items() if "encoder.layer_norm." not in key}


@pytest.mark.parametrize("kind", ["nlvr2", "captioning", "retrieval", "vqa", "imagenet"])
def test_a_pretrained_file_becomes_every_task(bare, kind):
    """What starts fresh is the head, but for captioning, which goes on with the pretrained one."""
    state = with_pretraining_heads(bare)
    task, report = load_released(state, kind)
    assert task_name(type(task)) == kind
    heads = {name for name in task.state_dict() if not name.startswith("backbone.")}
    assert set(report.fresh) == (set() if kind == "captioning" else heads)
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    assert kind != "nlvr2" or 0 < task.head.dense1.weight.abs().max() <= 0.02 * 1e-3


# Faults -------------------------------------------------------------------------------------------

LAYER = "beit3.encoder.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.ffn.A.fc1.weight": None}, rf"1 tensors are missing: {LAYER}.ffn.A.fc1.weight"),
        (
            {f"{LAYER}.self_attn.k_proj.B.bias": None},
            rf"1 tensor is missing: {LAYER}.self_attn.k_proj.B.bias",
        ),
        ({"beit3.text_embed.weight": None}, "1 tensors are missing: beit3.text_embed.weight"),
        (
            {f"{LAYER}.ffn.VL.fc1.weight": torch.zeros(1)},
            rf"1 unknown tensors: {LAYER}.ffn.VL.fc1.weight",
        ),
        ({"extra": torch.zeros(1)}, "1 unknown tensors: extra"),
        (
            {f"{LAYER}.ffn.B.fc2.bias": torch.zeros(63)},
            rf"{LAYER}.ffn.B.fc2.bias has shape \[63\], .* needs \[64\]",
        ),
        (
            {f"{LAYER}.self_attn.v_proj.A.bias": torch.zeros(3)},
            rf"{LAYER}.self_attn.v_proj.A.bias has shape \[3\], \[64\]",
        ),
        (
            {"beit3.encoder.embed_positions.A.weight": torch.zeros(8, 64)},
            "has 8 rows: not 3 and a square grid",
        ),
        (
            {"beit3.vision_embed.proj.weight": torch.zeros(65, 3, 8, 8)},
            "width 65 is not a multiple of 64.*give num_heads",
        ),
        (
            {"beit3.vision_embed.proj.weight": torch.zeros(64)},
            "no tensor of 4 dimensions called vision_embed.proj.weight",
        ),
    ],
)
def test_faults_are_named(bare, change, message):
    state = {key: tensor for key, tensor in (bare | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_released(state)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_shape_is_no_fresh_head(bare):
    state = to_released_state(load_released(bare, "vqa", answers=("yes", "no"))[0]) | {
        "pooler.dense.weight": torch.zeros(64, 63)
    }
    with pytest.raises(
        ValueError, match=r"pooler.dense.weight has shape \[64, 63\], this vqa needs \[64, 64\]"
    ):
        load_released(state)


def test_answers_that_do_not_fit():
    with pytest.raises(ValueError, match="2 answers given, the file's head has 37 outputs"):
        load_released(load_tensors("vqa", "model"), answers=("a", "b"))


def test_answers_for_a_task_without_any(bare):
    with pytest.raises(ValueError, match="answers given, but backbone has none: leave answers out"):
        load_released(bare, answers=("a", "b"))


def test_heads_that_do_not_divide_the_width(bare):
    with pytest.raises(ValueError, match="dim 64 is not a multiple of num_heads 5"):
        load_released(bare, num_heads=5)


def test_the_papers_form_has_no_released_names():
    task: Task = Backbone(TaskConfig(model=TINY))
    with pytest.raises(ValueError, match="norm1.weight has no counterpart in the released files"):
        to_released_state(task)


def test_every_parameter_of_the_released_form_has_its_own_names():
    task = small()
    assert isinstance(task.backbone, BEiT3)
    assert len(to_released_state(task)) == 40 * 2 + 7 + 4
    assert sum(tensor.numel() for tensor in to_released_state(task).values()) == sum(
        p.numel() for p in task.parameters()
    )
