"""timm's image half of BEiT-3 converts to weights that compute what timm computes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, Preprocessing
from beit3.model.config import IMAGE_MODALITY
from beit3.predict import load
from beit3.tasks.imagenet import ImageNet, ImageNetConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.weights.convert import convert_timm
from beit3.weights.initialization import initialize_from
from beit3.weights.matching import get_weights
from beit3.weights.store import read_config, read_tensors
from beit3.weights.timm_format import is_timm
from tests.weights.states import BACKBONE, make_backbone

NUM_CLASSES = 7


def write_timm_state(task) -> dict[str, torch.Tensor]:
    """Returns our image parameters under timm's names: the rules of timm 1.0.31, one by one."""
    own = get_weights(task)
    image = "backbone.image_embedding."
    state = {
        "cls_token": own[f"{image}class_token"],
        "pos_embed": own[f"{image}positions"][None, 2:],
    }
    renamed = {
        "norm1.image": "norm1",
        "attention.qkv.image": "attn.qkv",
        "attention.norm.image": "attn.norm",
        "attention.out.image": "attn.proj",
        "norm2.image": "norm2",
        "ffn.image.fc1": "mlp.fc1",
        "ffn.image.norm": "mlp.norm",
        "ffn.image.fc2": "mlp.fc2",
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = own[f"{image}patch.{part}"]
        for layer in range(task.config.model.depth):
            for name, timm_name in renamed.items():
                tensor = own[f"backbone.blocks.{layer}.{name}.{part}"]
                state[f"blocks.{layer}.{timm_name}.{part}"] = tensor
        for name, timm_name in (
            ("fc_norm", "fc_norm"),
            ("head", "head"),
            ("backbone.norm.image", "norm"),
        ):
            if f"{name}.{part}" in own:
                state[f"{timm_name}.{part}"] = own[f"{name}.{part}"]
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@pytest.fixture
def classifier():
    model = replace(BACKBONE, final_norm=False)
    task = ImageNet(ImageNetConfig(model=model, image=Preprocessing(16), num_classes=NUM_CLASSES))
    task.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in task.parameters():  # no norm is the identity, no bias zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task.eval()


@pytest.fixture
def timm_file(classifier, tmp_path):
    save_file(write_timm_state(classifier), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_converted_classifier_computes_the_same(classifier, timm_file, tmp_path):
    lines = convert_timm(timm_file, tmp_path / "weights")
    assert lines[-1] == f"imagenet, image side alone, at {tmp_path / 'weights'}"
    predictor = load(tmp_path / "weights")
    config = predictor.task.config
    assert config.model.modalities == (IMAGE_MODALITY,)
    for field in ("dim", "depth", "num_heads", "ffn_dim", "image_size", "patch_size", "sub_ln"):
        assert getattr(config.model, field) == getattr(classifier.config.model, field)
    assert (config.image.mean, config.image.std) == IMAGENET_MEAN_STD
    assert config.image.resize == "crop" and config.num_classes == NUM_CLASSES
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    classifier.config = replace(classifier.config, image=config.image)
    with torch.inference_mode():
        expected = classifier.outputs({"image": images})["logits"]
        assert torch.equal(predictor.task.outputs({"image": images})["logits"], expected)
    assert len(predictor(np.zeros((20, 30, 3), np.uint8))) == 5


def test_weights_without_a_head_become_a_backbone(timm_file, tmp_path):
    state = write_timm_state(make_backbone()) | {
        "fc_norm.weight": torch.ones(64),
        "fc_norm.bias": torch.zeros(64),
    }
    save_file(state, tmp_path / "pt.safetensors")
    lines = convert_timm(tmp_path / "pt.safetensors", tmp_path / "weights")
    assert "2 ignored (the norm before a head, and there is no head): fc_norm." in lines[1]
    assert read_config(tmp_path / "weights").task == "backbone"
    features = load(tmp_path / "weights").embed(images=[np.zeros((20, 30, 3), np.uint8)])
    assert features["image"].shape == (1, 64)
    tensors = read_tensors(tmp_path / "weights")
    assert not tensors["backbone.image_embedding.mask_token"].any()


def test_converted_weights_start_a_training_and_take_class_names(timm_file, tmp_path):
    convert_timm(timm_file, tmp_path / "weights", classes=tuple("abcdefg"))
    assert load(tmp_path / "weights").task.class_names == tuple("abcdefg")
    task = VQA(VQAConfig(model=replace(BACKBONE, final_norm=False), image=Preprocessing(16)))
    report = initialize_from(task, tmp_path / "weights")
    loaded = get_weights(task)["backbone.blocks.1.ffn.image.fc1.weight"]
    stored = read_tensors(tmp_path / "weights")["backbone.blocks.1.ffn.image.fc1.weight"]
    assert torch.equal(loaded, stored)
    assert any(".text." in name for name in report.fresh)


def test_other_networks_are_refused(timm_file, tmp_path, classifier):
    state = write_timm_state(classifier)
    for change, reason in (
        ({"blocks.0.attn.norm.weight": None}, "blocks.0.attn.norm.weight missing"),
        ({"blocks.0.ls1.gamma": torch.ones(2)}, "blocks.0.ls1.gamma is none of timm's"),
        ({"reg_token": torch.ones(2)}, "reg_token is none of timm's"),
        ({"blocks.1.mlp.fc1.bias": None}, "1 tensors are missing"),
    ):
        changed = {name: t for name, t in (state | change).items() if t is not None}
        save_file(changed, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=reason) as caught:
            convert_timm(tmp_path / "other.safetensors", tmp_path / "other")
        assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="3 classes given, the file's head has 7"):
        convert_timm(timm_file, tmp_path / "other", classes=("a", "b", "c"))


def test_the_command_converts_a_folder_of_the_hub(timm_file, tmp_path, run_cli):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit3_base_patch16_224"}))
    printed = run_cli("convert", "timm", tmp_path, "--out", tmp_path / "weights")
    assert "41 tensors loaded from timm's file" in printed
    assert read_config(tmp_path / "weights").task == "imagenet"


def test_timm_itself_computes_the_same(classifier, timm_file, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "beit3_base_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=1,
        mlp_ratio=0.5,
        num_classes=NUM_CLASSES,
    ).eval()
    state = write_timm_state(classifier)
    assert model.state_dict().keys() == state.keys() and is_timm(state)
    model.load_state_dict(state)
    convert_timm(timm_file, tmp_path / "weights")
    task = load(tmp_path / "weights").task
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        normalized = task.normalize_images({"image": images})
        torch.testing.assert_close(
            task.outputs({"image": images})["logits"], model(normalized), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", ["beit3_base_patch16_224", "beit3_giant_patch14_336"])
def test_names_and_shapes_of_timms_own_networks_fit(name):
    timm = pytest.importorskip("timm")
    from beit3.weights.timm_format import build_task

    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
        task, tensors, ignored = build_task(state)
    own = {key: tensor.shape for key, tensor in get_weights(task).items()}
    assert {key: tensor.shape for key, tensor in tensors.items()} == own and not ignored
    assert task.config.model.num_heads == {768: 12, 1408: 16}[task.config.model.dim]
