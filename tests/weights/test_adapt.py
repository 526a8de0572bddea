"""Weights of one task are loaded as another: the config, class names, and preprocessing."""

from dataclasses import replace

import pytest
import torch

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, Preprocessing
from beit3.model.config import TINY, TINY_RELEASE
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet, ImageNetConfig
from beit3.tasks.nlvr2 import NLVR2, NLVR2Config
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.weights.adapt import adapt_config, add_names
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_weights_as
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.weights.tasks import VISUAL

PAPER = replace(TINY, dim=32, depth=2, ffn_dim=48, image_size=16, vocab_size=64, text_positions=20)
RELEASE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=1,
    ffn_dim=48,
    image_size=16,
    vocab_size=64,
    text_positions=20,
)
PREPROCESSING = Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash", "bilinear")


def initialize(task, seed: int = 1):
    task.init_weights(seed)
    return task


def make_retrieval(model=PAPER) -> Retrieval:
    return initialize(Retrieval(RetrievalConfig(model=model, image=PREPROCESSING, text_length=12)))


def test_retrieval_weights_classify_by_names(tmp_path):
    source = make_retrieval()
    save_weights(source, tmp_path / "w")
    task, report = load_weights_as(
        tmp_path / "w", "imagenet", classes=("cat", "dog", "house"), prompt="a {}"
    )
    assert isinstance(task, ImageNet) and not report.fresh and not report.ignored
    config = task.config
    assert (config.head, config.classes, config.num_classes, config.prompt) == (
        "names",
        ("cat", "dog", "house"),
        3,
        "a {}",
    )
    assert config.image == PREPROCESSING and config.model == PAPER, (
        "network and preprocessing are those of the weights"
    )
    assert config.text_length == 12, "texts are as long as in training"
    state, expected = task.state_dict(), source.state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )


def test_weights_that_classify_by_names_retrieve(tmp_path):
    by_names = ImageNetConfig(
        model=PAPER,
        image=PREPROCESSING,
        head="names",
        classes=("a", "b"),
        num_classes=2,
        text_length=9,
    )
    save_weights(initialize(ImageNet(by_names)), tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "retrieval")
    assert isinstance(task, Retrieval) and not report.fresh and not report.ignored


def test_captioning_takes_the_pretrained_text_head(tmp_path):
    source = initialize(Pretrain(PretrainConfig(model=PAPER, image=PREPROCESSING, num_codes=9)))
    save_weights(source, tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "captioning")
    assert not report.fresh and set(report.ignored.values()) == {
        "a head that captioning does not have"
    }
    assert torch.equal(task.text_head.weight, source.text_head.weight)


def test_a_missing_head_is_fresh(tmp_path):
    save_weights(make_retrieval(), tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "vqa", answers=("yes", "no"))
    assert task.config.num_answers == 2 and task.backbone.norm is None
    assert set(report.fresh) == {
        name for name in task.state_dict() if not name.startswith("backbone.")
    }
    assert set(report.ignored.values()) == {
        "a head that vqa does not have",
        "the final norm: vqa reads the states before it",
    }
    second_task, _ = load_weights_as(tmp_path / "w", "vqa", answers=("yes", "no"))
    assert all(
        torch.equal(second_task.state_dict()[name], value)
        for name, value in task.state_dict().items()
    )
    assert 0 < task.head[0].weight.abs().max() <= 0.02


def test_a_missing_final_norm_is_fresh(tmp_path):
    save_weights(
        initialize(VQA(VQAConfig(model=replace(PAPER, final_norm=False), num_answers=2))),
        tmp_path / "w",
    )
    _, report = load_weights_as(tmp_path / "w", "nlvr2")
    assert any(name.startswith("backbone.norm.") for name in report.fresh)
    _, report = load_weights_as(tmp_path / "w", "backbone")
    assert not report.fresh


def test_weights_of_another_kind_of_network_are_refused(tmp_path):
    save_weights(
        initialize(
            VQKD(VQKDConfig(model=VISUAL, image=replace(VQKDConfig().image, image_size=16)))
        ),
        tmp_path / "codes",
    )
    save_weights(make_retrieval(), tmp_path / "w")
    for path, task_name, message in (
        (
            "codes",
            "vqa",
            "codes holds weights of vqkd, whose network cannot become vqa: give other weights",
        ),
        ("w", "vqkd", "w holds weights of retrieval, whose network cannot become vqkd"),
        ("w", "vqaa", "unknown task 'vqaa'; did you mean vqa?"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights_as(tmp_path / path, task_name)


def test_names_that_do_not_fit_the_task_are_refused():
    vqa, imagenet = VQAConfig(num_answers=3), ImageNetConfig(num_classes=3)
    assert add_names(vqa, VQA, answers=("a", "b"), fixed={}).num_answers == 2
    assert add_names(
        imagenet, ImageNet, classes=["a", "b", "c"], fixed={"num_classes": 3}
    ).classes == ("a", "b", "c")
    for config, task_class, arguments, message in (
        (vqa, VQA, {"classes": ("a",)}, "classes given, but vqa has none: leave classes out"),
        (imagenet, ImageNet, {"answers": ("a",)}, "answers given, but imagenet has none"),
        (vqa, VQA, {"prompt": "a {}"}, "prompt given, but vqa has none"),
        (
            vqa,
            VQA,
            {"answers": ("a", "b")},
            "2 answers given, the file's head has 3 outputs: give its own list",
        ),
        (imagenet, ImageNet, {"classes": ("a",)}, "1 classes given, the file's head has 3 outputs"),
        (imagenet, ImageNet, {"prompt": "a photo"}, "prompt 'a photo' has no {}"),
    ):
        with pytest.raises(ValueError, match=message):
            add_names(config, task_class, fixed={"num_answers": 3, "num_classes": 3}, **arguments)


@pytest.mark.parametrize("task_class", [VQA, NLVR2, Captioning, Retrieval, ImageNet])
def test_adapted_configs_fit_the_task(task_class):
    for by_names in (False, True):
        for final_norm in (False, True):
            config = adapt_config(
                task_class,
                replace(RELEASE, final_norm=final_norm),
                PREPROCESSING,
                by_names=by_names,
            )
            assert config.model.final_norm == (
                task_class not in (VQA, ImageNet) or (by_names and task_class is ImageNet)
            )
            assert config.image == PREPROCESSING and config.text_length <= 18
            task_class(config)


# Preprocessing ------------------------------------------------------------------------------------

DIFFERENCE = "images are prepared differently than for these weights' training: "


@pytest.mark.parametrize("form", ["directory", "file"])
def test_different_preprocessing_is_noted(tmp_path, form):
    source = Retrieval(RetrievalConfig(model=RELEASE, image=Preprocessing(16)))
    initialize(source)
    path = tmp_path / "w"
    if form == "directory":
        save_weights(source, path)
    else:
        torch.save({"model": to_released_state(source)}, path)
    crop = ImageNetConfig(
        model=replace(RELEASE, final_norm=False),
        image=Preprocessing(16, *IMAGENET_MEAN_STD, resize="crop"),
        num_classes=2,
    )
    lines = initialize_from(initialize(ImageNet(crop)), path).lines()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    half = (0.5, 0.5, 0.5)
    assert (
        lines[-1] == f"{DIFFERENCE}mean is {half}, here {mean}; std is {half}, here {std}; "
        "resize is squash, here crop"
    )
    larger = replace(crop, image=Preprocessing(24), model=replace(crop.model, image_size=24))
    for config in (replace(crop, image=Preprocessing(16)), larger):
        lines = initialize_from(initialize(ImageNet(config)), path).lines()
        assert not any(DIFFERENCE in line for line in lines), "sizes are resampled"


def test_a_file_without_a_head_has_no_preprocessing_to_compare(tmp_path):
    state = {
        name: value
        for name, value in to_released_state(make_retrieval(RELEASE)).items()
        if name.startswith("beit3.")
    }
    torch.save(state, tmp_path / "bare.pth")
    task = initialize(NLVR2(NLVR2Config(model=RELEASE, image=PREPROCESSING)))
    assert not initialize_from(task, tmp_path / "bare.pth").notes


def test_a_head_with_another_number_of_outputs_is_fresh(tmp_path):
    """The report names both shapes; the rest of the weights is loaded."""
    model = replace(RELEASE, final_norm=False)
    source = initialize(
        ImageNet(ImageNetConfig(model=model, image=Preprocessing(16), num_classes=3))
    )
    save_weights(source, tmp_path / "w")
    torch.save({"model": to_released_state(source)}, tmp_path / "a.pth")
    for path in (tmp_path / "w", tmp_path / "a.pth"):
        task = initialize(
            ImageNet(ImageNetConfig(model=model, image=Preprocessing(16), num_classes=5)), 2
        )
        report = initialize_from(task, path)
        assert report.fresh == {
            "head.weight": "shape [3, 64] in the file, [5, 64] here",
            "head.bias": "shape [3] in the file, [5] here",
        }
        assert torch.equal(task.fc_norm.weight, source.fc_norm.weight)
