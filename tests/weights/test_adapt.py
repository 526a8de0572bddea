"""Weights of one task as another: what the network fixes, what a person names, and what is said of
pictures."""

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
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.weights.adapt import adapt_config, add_names
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_weights_as
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights

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
PICTURES = Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash", "bilinear")


def filled(task, seed: int = 1):
    task.init_weights(seed)
    return task


def retrieval(model=PAPER) -> Retrieval:
    return filled(Retrieval(RetrievalConfig(model=model, image=PICTURES, text_length=12)))


def test_retrieval_classifies_by_names(tmp_path):
    given = retrieval()
    save_weights(given, tmp_path / "w")
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
    assert config.image == PICTURES and config.model == PAPER, (
        "network and pictures are the weights'"
    )
    assert config.text_length == 12, "texts as long as the weights know them"
    here, there = task.state_dict(), given.state_dict()
    assert here.keys() == there.keys() and all(
        torch.equal(here[name], there[name]) for name in here
    )


def test_and_names_retrieve(tmp_path):
    """The same weights the other way round."""
    by_names = ImageNetConfig(
        model=PAPER, image=PICTURES, head="names", classes=("a", "b"), num_classes=2, text_length=9
    )
    save_weights(filled(ImageNet(by_names)), tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "retrieval")
    assert isinstance(task, Retrieval) and not report.fresh and not report.ignored


def test_pretrained_words_go_on_as_captions(tmp_path):
    given = filled(Pretrain(PretrainConfig(model=PAPER, image=PICTURES, num_codes=9)))
    save_weights(given, tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "captioning")
    assert not report.fresh and set(report.ignored.values()) == {
        "a head that captioning does not have"
    }
    assert torch.equal(task.text_head.weight, given.text_head.weight)


def test_what_the_weights_lack_starts_fresh(tmp_path):
    save_weights(retrieval(), tmp_path / "w")
    task, report = load_weights_as(tmp_path / "w", "vqa", answers=("yes", "no"))
    assert task.config.num_answers == 2 and task.backbone.norm is None
    assert set(report.fresh) == {
        name for name in task.state_dict() if not name.startswith("backbone.")
    }
    assert set(report.ignored.values()) == {
        "a head that vqa does not have",
        "the final norm: vqa reads the states before it",
    }
    twin, _ = load_weights_as(tmp_path / "w", "vqa", answers=("yes", "no"))
    assert all(
        torch.equal(twin.state_dict()[name], value) for name, value in task.state_dict().items()
    )
    assert 0 < task.head[0].weight.abs().max() <= 0.02


def test_a_norm_that_the_weights_lack_is_fresh(tmp_path):
    save_weights(
        filled(VQA(VQAConfig(model=replace(PAPER, final_norm=False), num_answers=2))),
        tmp_path / "w",
    )
    _, report = load_weights_as(tmp_path / "w", "nlvr2")
    assert any(name.startswith("backbone.norm.") for name in report.fresh)
    _, report = load_weights_as(tmp_path / "w", "backbone")
    assert not report.fresh


def test_networks_of_another_kind(tmp_path):
    visual = VisualTokenizerConfig(
        image_size=16,
        patch_size=8,
        dim=16,
        depth=1,
        num_heads=2,
        ffn_dim=32,
        decoder_depth=1,
        code_dim=4,
        num_codes=9,
        teacher_dim=12,
    )
    save_weights(
        filled(VQKD(VQKDConfig(model=visual, image=replace(VQKDConfig().image, image_size=16)))),
        tmp_path / "codes",
    )
    save_weights(retrieval(), tmp_path / "w")
    for path, kind, message in (
        (
            "codes",
            "vqa",
            "codes holds weights of vqkd, whose network cannot become vqa: give other weights",
        ),
        ("w", "vqkd", "w holds weights of retrieval, whose network cannot become vqkd"),
        ("w", "vqaa", "unknown task 'vqaa'; did you mean vqa?"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights_as(tmp_path / path, kind)


def test_names_that_do_not_fit():
    vqa, imagenet = VQAConfig(num_answers=3), ImageNetConfig(num_classes=3)
    assert add_names(vqa, VQA, answers=("a", "b"), fixed={}).num_answers == 2
    assert add_names(
        imagenet, ImageNet, classes=["a", "b", "c"], fixed={"num_classes": 3}
    ).classes == ("a", "b", "c")
    for config, kind, given, message in (
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
            add_names(config, kind, fixed={"num_answers": 3, "num_classes": 3}, **given)


@pytest.mark.parametrize("kind", [VQA, NLVR2, Captioning, Retrieval, ImageNet])
def test_a_task_is_built_as_it_must_be(kind):
    for by_names in (False, True):
        for final_norm in (False, True):
            config = adapt_config(
                kind, replace(RELEASE, final_norm=final_norm), PICTURES, by_names=by_names
            )
            assert config.model.final_norm == (
                kind not in (VQA, ImageNet) or (by_names and kind is ImageNet)
            )
            assert config.image == PICTURES and config.text_length <= 18
            kind(config)


# Pictures -----------------------------------------------------------------------------------------

DIFFERENCE = "images are prepared differently than for these weights' training: "


@pytest.mark.parametrize("form", ["directory", "file"])
def test_other_pictures_are_said_when_training_starts(tmp_path, form):
    given = Retrieval(RetrievalConfig(model=RELEASE, image=Preprocessing(16)))
    filled(given)
    path = tmp_path / "w"
    if form == "directory":
        save_weights(given, path)
    else:
        torch.save({"model": to_released_state(given)}, path)
    crop = ImageNetConfig(
        model=replace(RELEASE, final_norm=False),
        image=Preprocessing(16, *IMAGENET_MEAN_STD, resize="crop"),
        num_classes=2,
    )
    lines = initialize_from(filled(ImageNet(crop)), path).lines()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    half = (0.5, 0.5, 0.5)
    assert (
        lines[-1]
        == f"{DIFFERENCE}mean is {half}, here {mean}; std is {half}, here {std}; resize is squash, here crop"
    )
    larger = replace(crop, image=Preprocessing(24), model=replace(crop.model, image_size=24))
    for config in (replace(crop, image=Preprocessing(16)), larger):
        lines = initialize_from(filled(ImageNet(config)), path).lines()
        assert not any(DIFFERENCE in line for line in lines), "sizes are resampled"


def test_pictures_of_a_bare_network_are_anyones(tmp_path):
    state = {
        name: value
        for name, value in to_released_state(retrieval(RELEASE)).items()
        if name.startswith("beit3.")
    }
    torch.save(state, tmp_path / "bare.pth")
    task = filled(NLVR2(NLVR2Config(model=RELEASE, image=PICTURES)))
    assert not initialize_from(task, tmp_path / "bare.pth").notes


def test_a_head_of_another_number_starts_fresh(tmp_path):
    """Fine-tuning into other classes: the head is fresh, with both shapes; the rest is taken."""
    model = replace(RELEASE, final_norm=False)
    given = filled(ImageNet(ImageNetConfig(model=model, image=Preprocessing(16), num_classes=3)))
    save_weights(given, tmp_path / "w")
    torch.save({"model": to_released_state(given)}, tmp_path / "a.pth")
    for path in (tmp_path / "w", tmp_path / "a.pth"):
        task = filled(
            ImageNet(ImageNetConfig(model=model, image=Preprocessing(16), num_classes=5)), 2
        )
        report = initialize_from(task, path)
        assert report.fresh == {
            "head.weight": "shape [3, 64] in the file, [5, 64] here",
            "head.bias": "shape [3] in the file, [5] here",
        }
        assert torch.equal(task.fc_norm.weight, given.fc_norm.weight)
