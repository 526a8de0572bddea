"""`convert`, `recipes --released`, and weights of another network to start from: what a person types and reads."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file

from beit3.cli import main
from beit3.model.config import TINY, TINY_RELEASE
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.weights.official import to_official
from beit3.weights.store import load, read_config, save
from tests.golden import golden
from tests.tokenizer.test_teacher import hugging_face_state, openai_state


def network(**changes) -> Backbone:
    task = Backbone(TaskConfig(model=replace(TINY, **changes)))
    task.init_weights(0)
    return task


def released() -> Backbone:
    task = Backbone(TaskConfig(model=TINY_RELEASE))
    task.init_weights(0)
    return task


def test_a_file_becomes_a_directory_and_a_file_again(tmp_path, say, root):
    state = {name: tensor.half() for name, tensor in to_official(released()).items()}
    torch.save({"model": state}, tmp_path / "given.pth")
    ours = tmp_path / "ours"
    said = say("convert", "official", tmp_path / "given.pth", "--out", ours, "--num-heads", 4, "--text-model", root / "text.model")
    assert said.startswith("139 tensors loaded from a released backbone file\n") and f"backbone at {ours}\n" in said
    assert load(ours).has_tokenizer and read_config(ours).config.model == TINY_RELEASE
    assert "171 tensors" in say("convert", "official", ours, "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_answers_task_tokenizers_and_teachers(tmp_path, say, refused):
    names = tmp_path / "answers.txt"
    names.write_text("".join(f"answer {number}\n" for number in range(37)))
    file = golden("vqa") / "model.safetensors"
    say("convert", "official", file, "--out", tmp_path / "vqa", "--num-heads", 4, "--answers", names)
    assert read_config(tmp_path / "vqa").config.answers[36] == "answer 36"
    said = say("convert", "official", file, "--out", tmp_path / "b", "--num-heads", 4, "--task", "backbone")
    assert "ignored (head of vqa: no part of backbone): " in said
    assert "37 outputs" in refused("convert", "official", file, "--out", tmp_path / "c", "--task", "vqa", "--answers", short(names))
    codes = golden("vqkd") / "model.safetensors"
    assert f"vqkd at {tmp_path / 'codes'}" in say("convert", "vqkd", codes, "--out", tmp_path / "codes", "--num-heads", 4)
    said = refused("convert", "official", codes, "--out", tmp_path / "d", "--num-heads", 4)
    assert "would be lost (only its training used it)" in said and "give --task vqkd" in said
    save_file(hugging_face_state(openai_state()), tmp_path / "clip.safetensors")
    assert "--task.teacher_weights" in say("convert", "clip", tmp_path / "clip.safetensors", "--out", tmp_path / "clip")
    assert not [name for name in "cd" if (tmp_path / name).exists()]


def short(names: Path) -> Path:
    (names.parent / "short.txt").write_text("yes\nno\n")
    return names.parent / "short.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip", "x.pth", "--num-heads", "3"], "--num-heads is not for clip files"),
        (["vqkd", "x.pth", "--text-model", "a.spm"], "--text-model is not for vqkd files"),
        (["official", ".", "--task", "vqa"], "--task is not for directories"),
        (["official", "."], ". holds neither weights nor a run's best or last"),
        (["official", "beit3_base_itc_patch16_224.pth"], "that is the release's base network for retrieval (224 px"),
        (["vqkd", "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"], "in its folder beit2"),
        (["clip", "ViT-B-16.pt"], "no teacher weights at ViT-B-16.pt"),
        (["dino", "x.pth"], "invalid choice: 'dino'"),
    ],
)
def test_conversions_that_mean_nothing(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("convert", *arguments, "--out", "out.pth")
    assert not list(tmp_path.iterdir())


def test_convert_explains_itself(capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", "--help"])
    assert left.value.code == 0 and "goes back into a file" in " ".join(capsys.readouterr().out.split())


def test_released_files_are_listed(say, refused):
    said = say("recipes", "--released")
    assert "beit3_large_indomain_patch16_768_vgqaaug_vqa.pth" in said and "vqkd_encoder_base_decoder_3x768x12_clip" in said
    only = say("recipes", "vqa", "--released")
    assert "beit3_base_patch16_480_vqa.pth" in only and "nlvr2" not in only
    assert "no file was released for vqkdd; did you mean vqkd?" in refused("recipes", "vqkdd", "--released")


# Weights of another network to start from ----------------------------------------------------------------------------


def write(kind: str, folder: Path) -> Path:
    """Weights that do not fit the demo's network, each in its own way."""
    place = folder / kind
    if kind == "resnet":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}, place)
    elif kind == "clip":
        torch.save(openai_state(), place)
    elif kind == "torchscript":
        with ZipFile(place, "w") as archive:
            archive.writestr("script/constants.pkl", b"")
    elif kind == "released":
        torch.save({"model": to_official(released())}, place)
    elif kind.startswith("beit3_"):
        pass
    else:
        save(network(**{"wider": {"dim": 256}, "deeper": {"depth": 5}, "heads": {"num_heads": 2}}[kind]), place)
    return place


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("resnet", "not BEiT-3 weights: the keys begin with conv1.weight, bn1.weight; give a released BEiT-3 file"),
        ("clip", "these are CLIP's tensors, not BEiT-3's: they can teach a vqkd (beit3 convert clip)"),
        ("torchscript", "is a TorchScript archive"),
        ("released", "(shared_attention is False, here True; shared_norms is False, here True; sub_ln is True, here False; "),
        ("wider", "another network (dim is 256, here 128): take a recipe of its size, or give --task.model.dim 256; "),
        ("deeper", "another network (depth is 5, here 4)"),
        ("heads", "another network (num_heads is 2, here 4): take a recipe of its size, or give --task.model.num_heads 2"),
        ("beit3_base_patch16_224.pth", "that is the release's base network for pretrain"),
    ],
)
def test_weights_of_another_network_leave_the_run_unwritten(kind, message, root, tmp_path, refused):
    given = write(kind, tmp_path)
    before = {path: sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*") if path.is_file()}
    said = refused("train", "vqa", "demo", "--out", tmp_path / "run", "--init", given, "--data.root", root, "--run.steps", 1)
    assert said.startswith(f"beit3: cannot start from {given}: ") and message in said
    assert not (tmp_path / "run").exists()
    assert {path: sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_remedy_of_another_network_works(root, tmp_path, refused, say):
    save(network(dim=64, num_heads=2, depth=1, ffn_dim=96), tmp_path / "w")
    call = ["train", "vqa", "demo", "--out", tmp_path / "run", "--init", tmp_path / "w", "--data.root", root]
    call += ["--run.steps", 1, "--data.batch.main", 8, "--run.eval_records", 4]
    flags = refused(*call).split("or give ")[1].split(";")[0].split()
    say(*call, *flags)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["task"]["model"]["dim"] == 64
