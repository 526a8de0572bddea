"""One call loads any weights, another asks them: directories, runs, released files, and what each
refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY, TINY_RELEASE
from beit3.predict import Predictor, load
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.tasks.nlvr2 import NLVR2, NLVR2Config
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.golden import find_fixture

RELEASE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=1,
    ffn_dim=32,
    image_size=16,
    vocab_size=64,
    text_positions=66,
)
PAPER = replace(
    TINY,
    dim=32,
    depth=1,
    ffn_dim=32,
    image_size=16,
    vocab_size=64,
    text_positions=66,
    final_norm=False,
)
ANSWERS = ("yes", "no", "two")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many red cubes are left of the blue ball"], vocab_size=60)


@pytest.fixture
def text_model(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "text.spm")
    return tmp_path / "text.spm"


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def vqa(tokenizer: TextTokenizer | None = None, **changes) -> VQA:
    config = VQAConfig(
        model=PAPER, image=Preprocessing(16), answers=ANSWERS, num_answers=3, text_length=12
    )
    task = VQA(replace(config, **changes), tokenizer=tokenizer)
    task.init_weights(0)
    return task


@pytest.fixture
def released(tmp_path):
    """A released VQA file in half precision."""
    task = vqa(model=replace(RELEASE, final_norm=False))
    torch.save(
        {"model": {key: tensor.half() for key, tensor in to_released_state(task).items()}},
        tmp_path / "vqa.pth",
    )
    return tmp_path / "vqa.pth"


@pytest.fixture
def pretrained(tmp_path):
    task = Pretrain(PretrainConfig(model=RELEASE, image=Preprocessing(16), num_codes=9))
    task.init_weights(0)
    torch.save({"model": to_released_state(task)}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


@pytest.mark.parametrize("place", ["", "best", "last"])
def test_a_directory_or_a_run(tmp_path, tokenizer, picture, place):
    task = vqa(tokenizer)
    save_weights(task, tmp_path / "run" / place)
    predictor = load(tmp_path / "run")
    assert not predictor.task.training and not predictor.report.fresh
    prediction = predictor(picture, "how many cubes")
    task.eval()
    batch = task.collate(
        [task.example({"id": "0", "image": picture, "text": "how many cubes"}, False)]
    )
    assert prediction == task.predict(batch)[0]["candidates"]
    assert sorted(each["answer"] for each in prediction) == sorted(ANSWERS), (
        "as many as there are, up to five"
    )
    assert [each["score"] for each in prediction] == sorted(
        (each["score"] for each in prediction), reverse=True
    )
    json.dumps(prediction)


def test_best_comes_before_last(tmp_path, tokenizer):
    for place, answers in (("last", ("a", "b", "c")), ("best", ANSWERS)):
        save_weights(vqa(tokenizer, answers=answers), tmp_path / "run" / place)
    assert load(tmp_path / "run").task.config.answers == ANSWERS


def test_pictures_as_paths_strings_and_in_memory(tmp_path, tokenizer, picture):
    save_weights(vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    scores = {
        predictor(form, "how many")[0]["score"]
        for form in (picture, str(picture), Image.open(picture))
    }
    assert len(scores) == 1
    assert predictor(Image.new("LA", (8, 8)), "how many")[0]["score"] not in scores


def test_a_released_file(released, text_model, picture):
    predictor = load(released, text_model=text_model, answers=ANSWERS)
    assert isinstance(predictor.task, VQA) and not predictor.report.fresh
    assert predictor(picture, "how many")[0]["answer"] in ANSWERS


@pytest.mark.parametrize("form", ["lines", "released"])
def test_answers_from_a_file(tmp_path, released, form):
    lines = (
        ANSWERS
        if form == "lines"
        else [json.dumps({"answer": a, "label": i}) for i, a in enumerate(ANSWERS)]
    )
    (tmp_path / "answers.txt").write_text("\n".join(lines) + "\n")
    assert load(released, answers=tmp_path / "answers.txt").task.config.answers == ANSWERS
    assert load(released, answers=str(tmp_path / "answers.txt")).task.config.answers == ANSWERS


def test_answers_for_a_directory_that_names_none(tmp_path, tokenizer, picture):
    save_weights(vqa(tokenizer, answers=()), tmp_path / "w")
    with pytest.raises(ValueError, match="answers=FILE"):
        load(tmp_path / "w")(picture, "how many")
    assert load(tmp_path / "w", answers=ANSWERS)(picture, "how many")[0]["answer"] in ANSWERS
    with pytest.raises(ValueError, match="w: 2 answers given, the file's head has 3 outputs"):
        load(tmp_path / "w", answers=("a", "b"))


def test_tensors_need_neither_tokenizer_nor_answers(released, picture):
    predictor = load(released)
    batch = {"image": torch.zeros(2, 3, 16, 16), "text": torch.tensor([[0, 5, 2], [0, 6, 2]])}
    assert predictor.task.outputs(batch)["logits"].shape == (2, 3)
    with pytest.raises(ValueError, match="text_model="):
        predictor(picture, "how many")


def test_answer_names_without_a_list(released, text_model, picture):
    with pytest.raises(ValueError, match="answers=FILE"):
        load(released, text_model=text_model)(picture, "how many")


def test_an_untrained_head_does_not_answer(pretrained, text_model, picture):
    predictor = load(pretrained, task="vqa", text_model=text_model, answers=ANSWERS)
    with pytest.raises(
        ValueError, match=r"the head of vqa is untrained \(pooler.*use .task.outputs"
    ):
        predictor(picture, "how many")
    batch = {"image": torch.zeros(1, 3, 16, 16), "text": torch.tensor([[0, 5, 2]])}
    assert predictor.task.outputs(batch)["logits"].isfinite().all()


def test_features_of_a_pretrained_file(pretrained, text_model, picture):
    predictor = load(pretrained, task="backbone", text_model=text_model)
    assert isinstance(predictor.task, Backbone)
    (image,), (both,), (text,) = (
        predictor(picture),
        predictor(picture, "how many"),
        predictor(None, "how many"),
    )
    assert [sorted(features) for features in (image, both, text)] == [
        ["id", "image"],
        ["id", "image", "text"],
        ["id", "text"],
    ]
    assert len(image["image"]) == 64
    assert image["image"] != both["image"], "a pair is encoded as one sequence"


def test_a_file_of_the_image_side_alone_serves_images(tmp_path, text_model, picture):
    task = Backbone(TaskConfig(model=RELEASE))
    task.init_weights(0)
    state = {
        key: value
        for key, value in to_released_state(task).items()
        if ".B." not in key and "text_embed" not in key
    }
    torch.save(state, tmp_path / "image.pth")
    predictor = load(tmp_path / "image.pth", text_model=text_model)
    assert len(predictor(picture)[0]["image"]) == 64
    with pytest.raises(ValueError, match="holds the image side alone: give images without text"):
        predictor(picture, "how many")


def test_num_heads_reaches_the_network():
    file = find_fixture("vqa") / "model.safetensors"
    assert load(file, num_heads=4).task.config.model.num_heads == 4


def test_calls_that_do_not_fit(tmp_path, tokenizer, pretrained, picture):
    save_weights(vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    with pytest.raises(ValueError, match="vqa takes image, question: 1 inputs given"):
        predictor(picture)
    with pytest.raises(ValueError, match="absent.png"):
        predictor(tmp_path / "absent.png", "how many")
    with pytest.raises(ValueError, match="pretrain takes no raw inputs"):
        load(pretrained)(picture, "how many")


def test_paths_and_arguments_that_do_not_fit(tmp_path, tokenizer, released):
    save_weights(vqa(tokenizer), tmp_path / "w")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pth").write_bytes(released.read_bytes()[:3000])
    for path, arguments, message in (
        (
            tmp_path / "w",
            {"task": "vqkd"},
            "w holds weights of vqa, whose network cannot become vqkd",
        ),
        (
            tmp_path / "w",
            {"num_heads": 3},
            "num_heads 3 given, .*w holds weights of 4 heads: leave num_heads out",
        ),
        (
            tmp_path / "w",
            {"classes": ("a",)},
            "w: classes given, but vqa has none: leave classes out",
        ),
        (released, {"num_heads": 5}, "vqa.pth: dim 64 is not a multiple of num_heads 5"),
        (released, {"classes": tmp_path / "no.txt"}, "no class names at .*no.txt"),
        (
            released,
            {"task": "imagenet", "prompt": "a photo"},
            "vqa.pth: prompt 'a photo' has no {}",
        ),
        (tmp_path / "empty", {}, "empty holds neither weights nor a run's best or last"),
        (tmp_path / "absent", {}, "no weights at .*absent"),
        (tmp_path / "cut.pth", {}, "cut.pth is not a complete torch file"),
        (released, {"task": "vqaa"}, "unknown task 'vqaa'; did you mean vqa?"),
        (released, {"answers": ("a",)}, "vqa.pth: 1 answers given, the file's head has 3 outputs"),
        (released, {"text_model": tmp_path / "no.spm"}, "no text tokenizer at .*no.spm"),
        (released, {"answers": tmp_path / "no.txt"}, "no answer list at .*no.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, **arguments)


def test_answers_for_weights_without_any(tmp_path):
    task = Backbone(TaskConfig(model=PAPER))
    save_weights(task, tmp_path / "w")
    with pytest.raises(
        ValueError, match="w: answers given, but backbone has none: leave answers out"
    ):
        load(tmp_path / "w", answers=ANSWERS)


def test_a_predictor_takes_any_task(tokenizer, picture):
    predictor = Predictor(vqa(tokenizer), LoadReport("nowhere", (), {}, {}))
    assert predictor(picture, "how many")[0]["answer"] in ANSWERS


# As another task ----------------------------------------------------------------------------------


def retrieval(model=RELEASE, **given) -> Retrieval:
    task = Retrieval(
        RetrievalConfig(
            model=model, image=Preprocessing(16, interpolation="bilinear"), text_length=9
        ),
        **given,
    )
    task.init_weights(3)
    return task


@pytest.fixture(params=["directory", "file"])
def dual(request, tmp_path, tokenizer) -> dict:
    """Retrieval weights of both kinds, as arguments of `load`."""
    task = retrieval(tokenizer=tokenizer)
    if request.param == "directory":
        save_weights(task, tmp_path / "dual")
        return {"path": tmp_path / "dual"}
    torch.save({"model": to_released_state(task)}, tmp_path / "dual.pth")
    tokenizer.save(tmp_path / "text.spm")
    return {"path": tmp_path / "dual.pth", "text_model": tmp_path / "text.spm"}


CLASSES = ("red cube", "blue ball", "how many")


def test_retrieval_weights_classify_into_any_names(dual, tmp_path, picture):
    """Equal to the similarities of the features, and the same however the names are given."""
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (tmp_path / "data/imagenet/main").mkdir(parents=True)
    (tmp_path / "data/imagenet/main/classes.txt").write_text(
        "".join(f"{name}\n" for name in CLASSES)
    )
    features = load(**dual).embed([picture], [f"a {name}" for name in CLASSES])
    task = load(**dual).task
    expected = torch.softmax(
        float(task.logit_scale.exp()) * torch.tensor(features["image"] @ features["text"].T)[0], 0
    )
    for classes in (CLASSES, list(CLASSES), tmp_path / "names.txt", str(tmp_path / "data")):
        predictor = load(**dual, task="imagenet", classes=classes, prompt="a {}")
        assert not predictor.report.fresh
        found = {each["name"]: each["score"] for each in predictor(picture)}
        assert found == {
            name: pytest.approx(float(score), abs=1e-5)
            for name, score in zip(CLASSES, expected, strict=True)
        }
    assert (
        load(**dual, task="imagenet", classes=CLASSES)(picture)[0]["score"] not in found.values()
    ), "the prompt counts"


def test_names_come_later(dual, tmp_path, picture):
    (tmp_path / "data/imagenet/main").mkdir(parents=True)
    (tmp_path / "data/imagenet/main/classes.txt").write_text(
        "".join(f"{name}\n" for name in CLASSES)
    )
    predictor = load(**dual, task="imagenet")
    with pytest.raises(ValueError, match="needs the class names: give classes=FILE"):
        predictor(picture)
    names = tmp_path / "data/imagenet/main/classes.txt"
    predictor.match_class_names(names)
    assert predictor(picture) == load(**dual, task="imagenet", classes=CLASSES)(picture)
    names.write_text("".join(f"{name}\n" for name in reversed(CLASSES)))
    with pytest.raises(
        ValueError,
        match=f"class 0 is {CLASSES[0]!r} to the weights and {CLASSES[-1]!r} in .*classes.txt",
    ):
        predictor.match_class_names(names)
    predictor.match_class_names(tmp_path / "absent.txt")


def test_pictures_are_prepared_as_the_weights_know_them(tmp_path, tokenizer, picture):
    """Not as the other task would have them: only a directory tells it."""
    save_weights(retrieval(tokenizer=tokenizer), tmp_path / "w")
    assert load(
        tmp_path / "w", task="imagenet", classes=CLASSES
    ).task.config.image == Preprocessing(16, interpolation="bilinear")


def test_a_file_of_another_task_says_what_to_do(tmp_path, tokenizer, text_model, picture):
    task = NLVR2(NLVR2Config(model=RELEASE, image=Preprocessing(16)), tokenizer=tokenizer)
    task.init_weights(0)
    torch.save({"model": to_released_state(task)}, tmp_path / "nlvr2.pth")
    save_weights(task, tmp_path / "w")
    arguments = {"task": "vqa", "answers": ANSWERS}
    for predictor, source in (
        (load(tmp_path / "nlvr2.pth", text_model=text_model, **arguments), "a released nlvr2 file"),
        (load(tmp_path / "w", **arguments), f"{tmp_path / 'w'} (nlvr2)"),
    ):
        with pytest.raises(ValueError) as caught:
            predictor(picture, "how many")
        assert str(caught.value) == (
            f"the head of vqa is untrained (pooler.norm.weight), {source} has none: give weights "
            "of vqa, "
            "fine-tune (beit3 train vqa --init), or use .task.outputs(batch)"
        )
    assert load(tmp_path / "w")(picture, picture, "how many")[0]["answer"] in ("true", "false")


# Features -----------------------------------------------------------------------------------------


def test_features_of_retrieval(dual, picture):
    predictor, words = load(**dual), ["how many", "red", "blue ball left of the cube and the ball"]
    images = [picture, str(picture), Image.open(picture), Image.new("RGB", (9, 9), "red")]
    found = predictor.embed(images, words)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        "image": ((4, 64), np.float32),
        "text": ((3, 64), np.float32),
    }
    for array in found.values():
        np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(found["image"][0], found["image"][2])
    task = predictor.task
    (alone,) = task.predict(
        task.collate([task.example({"id": "0", "image": picture, "captions": words}, False)])
    )
    np.testing.assert_allclose(found["image"][0], alone["image"], atol=1e-6)
    np.testing.assert_allclose(found["text"], alone["texts"], atol=1e-6)
    json.dumps(predictor(picture, "how many"))
    small = predictor.embed(iter(images), (word for word in words[::-1]), batch_size=1)
    np.testing.assert_allclose(small["image"], found["image"], atol=1e-5)
    np.testing.assert_allclose(small["text"][::-1], found["text"], atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_packed_weights_give_the_same_features(dual, picture):
    packed, plain = load(**dual, packed=True), load(**dual)
    for _ in range(3):  # the third call uses what the second laid out
        for name, array in packed.embed([picture], ["how many"]).items():
            np.testing.assert_allclose(array, plain.embed([picture], ["how many"])[name], atol=1e-5)
    with pytest.raises(ValueError, match="leave packed out"):
        packed.to("meta")
    for switch in ("packed", "compiled"):
        with pytest.raises(ValueError, match=f"leave {switch} out"):
            load(**dual, int8=True, **{switch: True})


@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs a C++ compiler")
def test_compiled_blocks_give_the_same_features(dual, picture):
    compiled, plain = load(**dual, packed=True, compiled=True), load(**dual)
    for name, array in compiled.embed([picture] * 2, ["how many"]).items():
        np.testing.assert_allclose(array, plain.embed([picture] * 2, ["how many"])[name], atol=1e-5)


def test_one_side_needs_nothing_of_the_other(dual, picture):
    predictor = load(dual["path"])
    assert sorted(predictor.embed(images=[picture])) == ["image"]
    assert predictor.embed() == {}
    if "text_model" in dual:
        with pytest.raises(ValueError, match="text_model="):
            predictor.embed(texts=["how many"])
    assert sorted(load(**dual).embed(texts=["how many"])) == ["text"]


def test_features_of_a_backbone_are_its_states(pretrained, text_model, picture):
    predictor = load(pretrained, task="backbone", text_model=text_model)
    found = predictor.embed([picture], ["how many"])
    np.testing.assert_allclose(found["image"][0], predictor(picture)[0]["image"], atol=1e-6)
    np.testing.assert_allclose(found["text"][0], predictor(None, "how many")[0]["text"], atol=1e-6)
    assert abs(np.linalg.norm(found["image"]) - 1) > 0.1, "not normalised"


def test_features_that_are_not_there(tmp_path, tokenizer, pretrained, text_model, picture, dual):
    save_weights(vqa(tokenizer), tmp_path / "w")
    for predictor, given, message in (
        (
            load(tmp_path / "w"),
            {"images": [picture]},
            "vqa has no features of single inputs: give weights of retrieval, or load these",
        ),
        (load(pretrained), {"images": [picture]}, "pretrain has no features of single inputs"),
        (
            load(pretrained, task="retrieval"),
            {"images": [picture]},
            "the head of retrieval is untrained",
        ),
        (load(**dual), {"texts": ["red", ""]}, r"texts\[1\] is empty: leave it out"),
        (load(**dual), {"images": [picture, tmp_path / "absent.png"]}, "absent.png"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            predictor.embed(**given)
        assert "\n" not in str(caught.value)
    task = Backbone(TaskConfig(model=RELEASE))
    task.init_weights(0)
    state = {
        key: value
        for key, value in to_released_state(task).items()
        if ".B." not in key and "text_embed" not in key
    }
    torch.save(state, tmp_path / "image.pth")
    alone = load(tmp_path / "image.pth", text_model=text_model)
    assert alone.embed([picture])["image"].shape == (1, 64)
    with pytest.raises(ValueError, match="holds the image side alone"):
        alone.embed(texts=["how many"])
