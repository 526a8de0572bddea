"""The catalog of released files agrees with the networks and with the recipes."""

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

RELEASED_TASK_NAMES = {"imagenet": "imageclassification", "vqa": "vqav2"}


def to_millions(count: int) -> float:
    return round(count / 1e6, 1)


def test_parameter_counts_of_fine_tuned_files_equal_the_recorded_ones():
    counts = json.loads((find_fixture("state_dict_shapes") / "param_counts.json").read_text())
    tuned = [
        file
        for file in RELEASED_FILES
        if file.task in RELEASED_TASK_NAMES or file.task in ("nlvr2", "captioning", "retrieval")
    ]
    assert len(tuned) == 25
    for file in tuned:
        # The contrastive files are retrieval models of 224 px, of which the original code has the
        # base one.
        task = RELEASED_TASK_NAMES.get(file.task, file.task)
        name = f"beit3_{file.size}_patch16_{file.image_size}_{task}"
        if name in counts:
            assert file.parameters == to_millions(counts[name]), file.name
        else:
            assert file.name == "beit3_large_itc_patch16_224.pth" and file.parameters == 674.8


def test_parameter_counts_of_other_files_equal_those_of_the_networks():
    for size, model in (("base", BASE), ("large", LARGE)):
        with torch.device("meta"):
            count = sum(
                parameter.numel()
                for parameter in Pretrain(PretrainConfig(model=model)).parameters()
            )
        listed_counts = {
            file.parameters
            for file in RELEASED_FILES
            if (file.task, file.size) == ("pretrain", size)
        }
        assert listed_counts == {to_millions(count)}
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
            assert file.parameters == to_millions(count)


def test_listed_files_agree_with_their_names_and_with_the_recipes():
    assert len({file.name for file in RELEASED_FILES}) == len(RELEASED_FILES) == 33
    for file in RELEASED_FILES:
        assert file.task in (*HEADS, "vqkd", "text")
        if file.name.startswith("beit3_"):
            assert f"beit3_{file.size}_" in file.name and f"_patch16_{file.image_size}" in file.name
        assert file.starts or file.score, "each file has recipes or a score"
        for start in file.starts:
            task, recipe = start.split(" ")
            assert recipe in load_task(task).recipes, start
            assert file.task == "vqkd" or file.size == recipe.split("_")[0]
            assert ("indomain" in recipe) <= ("indomain" in file.name)


def test_every_released_recipe_starts_from_a_listed_file():
    started = {start for file in RELEASED_FILES for start in file.starts}
    for task in ("vqa", "nlvr2", "captioning", "retrieval", "imagenet"):
        recipe_names = {
            f"{task} {recipe}"
            for recipe in load_task(task).recipes
            if recipe.startswith(("base_", "large_"))
        }
        assert recipe_names <= started, recipe_names - started


def test_the_table_lists_files_with_scores_and_recipes():
    lines = format_table()
    assert all(any(line.startswith(f"{file.name} ") for line in lines) for file in RELEASED_FILES)
    assert any(
        "vqa base_480" in line and line.startswith("beit3_base_patch16_224.pth") for line in lines
    )
    assert any("test-dev 82.97, test-std 83.03" in line and " 768 " in line for line in lines)
    assert max(map(len, lines)) <= 150 and "http" not in " ".join(lines)
    assert any("captioning base_480_nocaps" in line for line in lines), (
        "a recipe stays beside its task"
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
def test_the_error_for_a_missing_file_describes_the_released_one(tmp_path, name, message):
    with pytest.raises(ValueError) as caught:
        read_state_dict(tmp_path / name)
    error = str(caught.value)
    assert (
        error.startswith(f"no weights at {tmp_path / name}: ")
        and message in error
        and "\n" not in error
    )
    assert ("get it with beit3 download " in error) == ("release's" in error)
    assert ("release's" in error) == describe_file(name).startswith("that is")
