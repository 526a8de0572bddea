"""The list of released files: its numbers are those of the networks, and what it says may be
typed."""

import json
from dataclasses import replace

import pytest
import torch

from beit3.model.config import BASE, LARGE
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqkd import VQKDConfig
from beit3.tokenizer.visual import VisualTokenizer
from beit3.weights.catalog import RELEASED_FILES, describe_file, format_table
from beit3.weights.release_format import HEADS
from beit3.weights.state_dicts import read_state_dict
from tests.golden import find_fixture

OFFICIAL = {"imagenet": "imageclassification", "vqa": "vqav2"}


def millions(count: int) -> float:
    return round(count / 1e6, 1)


def test_parameters_of_fine_tuned_files_are_those_of_the_official_models():
    counts = json.loads((find_fixture("state_dict_shapes") / "param_counts.json").read_text())
    tuned = [
        file
        for file in RELEASED_FILES
        if file.task in OFFICIAL or file.task in ("nlvr2", "captioning", "retrieval")
    ]
    assert len(tuned) == 25
    for file in tuned:
        # The contrastive files are retrieval models of 224 px, of which the official code has the
        # base one.
        name = f"beit3_{file.size}_patch16_{file.image_size}_{OFFICIAL.get(file.task, file.task)}"
        if name in counts:
            assert file.parameters == millions(counts[name]), file.name
        else:
            assert file.name == "beit3_large_itc_patch16_224.pth" and file.parameters == 674.8


def test_parameters_of_pretrained_files_and_tokenizers_are_ours():
    for size, model in (("base", BASE), ("large", LARGE)):
        with torch.device("meta"):
            count = sum(
                parameter.numel()
                for parameter in Pretrain(PretrainConfig(model=model)).parameters()
            )
        found = {
            file.parameters
            for file in RELEASED_FILES
            if (file.task, file.size) == ("pretrain", size)
        }
        assert found == {millions(count)}
    for file in RELEASED_FILES:
        if file.task == "vqkd":
            depth, dim = int(file.name.split("decoder_")[1][0]), 512 if "clip" in file.name else 768
            with torch.device("meta"):
                network = VisualTokenizer(
                    replace(VQKDConfig().model, decoder_depth=depth, teacher_dim=dim)
                )
            count = (
                sum(parameter.numel() for parameter in network.parameters())
                + network.quantizer.codebook.numel()
            )
            assert file.parameters == millions(count)


def test_rows_agree_with_their_names_and_with_this_version():
    assert len({file.name for file in RELEASED_FILES}) == len(RELEASED_FILES) == 33
    for file in RELEASED_FILES:
        assert file.task in (*HEADS, "vqkd", "text")
        if file.name.startswith("beit3_"):
            assert f"beit3_{file.size}_" in file.name and f"_patch16_{file.image_size}" in file.name
        assert file.starts or file.score, "each row says what the file is good for"
        for start in file.starts:
            task, recipe = start.split(" ")
            assert recipe in load_task(task).recipes, start
            assert file.task == "vqkd" or file.size == recipe.split("_")[0]
            assert ("indomain" in recipe) <= ("indomain" in file.name)


def test_every_recipe_of_the_release_starts_from_some_file():
    started = {start for file in RELEASED_FILES for start in file.starts}
    for task in ("vqa", "nlvr2", "captioning", "retrieval", "imagenet"):
        ours = {
            f"{task} {recipe}"
            for recipe in load_task(task).recipes
            if recipe.startswith(("base_", "large_"))
        }
        assert ours <= started, ours - started


def test_the_table():
    lines = format_table()
    assert all(any(line.startswith(f"{file.name} ") for line in lines) for file in RELEASED_FILES)
    assert any(
        "vqa base_480" in line and line.startswith("beit3_base_patch16_224.pth") for line in lines
    )
    assert any("test-dev 82.97, test-std 83.03" in line and " 768 " in line for line in lines)
    assert max(map(len, lines)) <= 150 and "http" not in " ".join(lines)
    assert any("captioning base_480_nocaps" in line for line in lines), (
        "a recipe is not torn from its task"
    )
    assert len(format_table("vqa")) - len(format_table("vqkd")) == 2
    with pytest.raises(ValueError, match="no file was released for vqaa; did you mean vqa?"):
        format_table("vqaa")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "beit3_base_patch16_224.pth",
            "the release's base network for pretrain (224 px, 276.5 million parameters)",
        ),
        (
            "beit3_large_patch16_480_vqa.zip",
            "the release's fine-tuned large network for vqa (480 px, 683.0 million parameters)",
        ),
        ("beit3_base_patch16_224_in1k", "fine-tuned base network for imagenet"),
        (
            "vqkd_encoder_base_decoder_3x768x12_clip.pth",
            "visual tokenizer (224 px, 109.1 million parameters)",
        ),
        ("beit3.spm", "the release's text tokenizer"),
        ("beit3_base_patch16_224_vqav2.pth", "did you mean beit3_base_patch16_"),
        ("resnet50.pth", "give a released .pth file or a directory of weights"),
    ],
)
def test_a_name_that_is_no_file_says_what_it_would_be(tmp_path, name, message):
    with pytest.raises(ValueError) as caught:
        read_state_dict(tmp_path / name)
    said = str(caught.value)
    assert (
        said.startswith(f"no weights at {tmp_path / name}: ")
        and message in said
        and "\n" not in said
    )
    assert ("download it yourself, the README of github.com/microsoft/unilm lists it" in said) == (
        "release's" in said
    )
    assert ("release's" in said) == describe_file(name).startswith("that is")
