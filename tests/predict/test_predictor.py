"""Loading weights of any kind and predicting: directories, runs, released files, and errors."""

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
def image_path(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def make_vqa(tokenizer: TextTokenizer | None = None, **changes) -> VQA:
    config = VQAConfig(
        model=PAPER, image=Preprocessing(16), answers=ANSWERS, num_answers=3, text_length=12
    )
    task = VQA(replace(config, **changes), tokenizer=tokenizer)
    task.init_weights(0)
    return task


@pytest.fixture
def released_file(tmp_path):
    """A released VQA file in half precision."""
    task = make_vqa(model=replace(RELEASE, final_norm=False))
    torch.save(
        {"model": {key: tensor.half() for key, tensor in to_released_state(task).items()}},
        tmp_path / "vqa.pth",
    )
    return tmp_path / "vqa.pth"


@pytest.fixture
def pretrained_file(tmp_path):
    task = Pretrain(PretrainConfig(model=RELEASE, image=Preprocessing(16), num_codes=9))
    task.init_weights(0)
    torch.save({"model": to_released_state(task)}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


@pytest.mark.parametrize("directory", ["", "best", "last"])
def test_weights_and_run_directories_load(tmp_path, tokenizer, image_path, directory):
    task = make_vqa(tokenizer)
    save_weights(task, tmp_path / "run" / directory)
    predictor = load(tmp_path / "run")
    assert not predictor.task.training and not predictor.report.fresh
    prediction = predictor(image_path, "how many cubes")
    task.eval()
    batch = task.collate(
        [task.example({"id": "0", "image": image_path, "text": "how many cubes"}, False)]
    )
    assert prediction == task.predict(batch)[0]["candidates"]
    assert sorted(candidate["answer"] for candidate in prediction) == sorted(ANSWERS), (
        "all candidates, up to five"
    )
    assert [candidate["score"] for candidate in prediction] == sorted(
        (candidate["score"] for candidate in prediction), reverse=True
    )
    json.dumps(prediction)


def test_best_comes_before_last(tmp_path, tokenizer):
    for directory, answers in (("last", ("a", "b", "c")), ("best", ANSWERS)):
        save_weights(make_vqa(tokenizer, answers=answers), tmp_path / "run" / directory)
    assert load(tmp_path / "run").task.config.answers == ANSWERS


def test_images_may_be_paths_strings_or_pil_images(tmp_path, tokenizer, image_path):
    save_weights(make_vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    scores = {
        predictor(image, "how many")[0]["score"]
        for image in (image_path, str(image_path), Image.open(image_path))
    }
    assert len(scores) == 1
    assert predictor(Image.new("LA", (8, 8)), "how many")[0]["score"] not in scores


def test_a_released_file_loads_with_its_tokenizer_and_answers(
    released_file, text_model, image_path
):
    predictor = load(released_file, text_model=text_model, answers=ANSWERS)
    assert isinstance(predictor.task, VQA) and not predictor.report.fresh
    assert predictor(image_path, "how many")[0]["answer"] in ANSWERS


@pytest.mark.parametrize("file_format", ["lines", "released"])
def test_answers_are_read_from_a_file(tmp_path, released_file, file_format):
    lines = (
        ANSWERS
        if file_format == "lines"
        else [
            json.dumps({"answer": answer, "label": label}) for label, answer in enumerate(ANSWERS)
        ]
    )
    (tmp_path / "answers.txt").write_text("\n".join(lines) + "\n")
    assert load(released_file, answers=tmp_path / "answers.txt").task.config.answers == ANSWERS
    assert load(released_file, answers=str(tmp_path / "answers.txt")).task.config.answers == ANSWERS


def test_answers_are_given_for_a_directory_without_names(tmp_path, tokenizer, image_path):
    save_weights(make_vqa(tokenizer, answers=()), tmp_path / "w")
    with pytest.raises(ValueError, match="answers=FILE"):
        load(tmp_path / "w")(image_path, "how many")
    assert load(tmp_path / "w", answers=ANSWERS)(image_path, "how many")[0]["answer"] in ANSWERS
    with pytest.raises(ValueError, match="w: 2 answers given, the file's head has 3 outputs"):
        load(tmp_path / "w", answers=("a", "b"))


def test_tensors_need_neither_tokenizer_nor_answers(released_file, image_path):
    predictor = load(released_file)
    batch = {"image": torch.zeros(2, 3, 16, 16), "text": torch.tensor([[0, 5, 2], [0, 6, 2]])}
    assert predictor.task.outputs(batch)["logits"].shape == (2, 3)
    with pytest.raises(ValueError, match="text_model="):
        predictor(image_path, "how many")


def test_a_released_file_needs_answer_names(released_file, text_model, image_path):
    with pytest.raises(ValueError, match="answers=FILE"):
        load(released_file, text_model=text_model)(image_path, "how many")


def test_an_untrained_head_is_refused(pretrained_file, text_model, image_path):
    predictor = load(pretrained_file, task="vqa", text_model=text_model, answers=ANSWERS)
    with pytest.raises(
        ValueError, match=r"the head of vqa is untrained \(pooler.*use .task.outputs"
    ):
        predictor(image_path, "how many")
    batch = {"image": torch.zeros(1, 3, 16, 16), "text": torch.tensor([[0, 5, 2]])}
    assert predictor.task.outputs(batch)["logits"].isfinite().all()


def test_features_of_a_pretrained_file(pretrained_file, text_model, image_path):
    predictor = load(pretrained_file, task="backbone", text_model=text_model)
    assert isinstance(predictor.task, Backbone)
    (image,), (pair,), (text,) = (
        predictor(image_path),
        predictor(image_path, "how many"),
        predictor(None, "how many"),
    )
    assert [sorted(features) for features in (image, pair, text)] == [
        ["id", "image"],
        ["id", "image", "text"],
        ["id", "text"],
    ]
    assert len(image["image"]) == 64
    assert image["image"] != pair["image"], "a pair is encoded as one sequence"


def test_a_file_of_the_image_side_alone_serves_images(tmp_path, text_model, image_path):
    task = Backbone(TaskConfig(model=RELEASE))
    task.init_weights(0)
    state = {
        key: value
        for key, value in to_released_state(task).items()
        if ".B." not in key and "text_embed" not in key
    }
    torch.save(state, tmp_path / "image.pth")
    predictor = load(tmp_path / "image.pth", text_model=text_model)
    assert len(predictor(image_path)[0]["image"]) == 64
    with pytest.raises(ValueError, match="holds the image side alone: give images without text"):
        predictor(image_path, "how many")


def test_num_heads_reaches_the_network():
    file = find_fixture("vqa") / "model.safetensors"
    assert load(file, num_heads=4).task.config.model.num_heads == 4


def test_unsuitable_inputs_are_refused(tmp_path, tokenizer, pretrained_file, image_path):
    save_weights(make_vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    with pytest.raises(ValueError, match="vqa takes image, question: 1 inputs given"):
        predictor(image_path)
    with pytest.raises(ValueError, match="absent.png"):
        predictor(tmp_path / "absent.png", "how many")
    with pytest.raises(ValueError, match="pretrain takes no raw inputs"):
        load(pretrained_file)(image_path, "how many")


def test_unsuitable_paths_and_arguments_are_refused(tmp_path, tokenizer, released_file):
    save_weights(make_vqa(tokenizer), tmp_path / "w")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pth").write_bytes(released_file.read_bytes()[:3000])
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
        (released_file, {"num_heads": 5}, "vqa.pth: dim 64 is not a multiple of num_heads 5"),
        (released_file, {"classes": tmp_path / "no.txt"}, "no class names at .*no.txt"),
        (
            released_file,
            {"task": "imagenet", "prompt": "a photo"},
            "vqa.pth: prompt 'a photo' has no {}",
        ),
        (tmp_path / "empty", {}, "empty holds neither weights nor a run's best or last"),
        (tmp_path / "absent", {}, "no weights at .*absent"),
        (tmp_path / "cut.pth", {}, "cut.pth is not a complete torch file"),
        (released_file, {"task": "vqaa"}, "unknown task 'vqaa'; did you mean vqa?"),
        (
            released_file,
            {"answers": ("a",)},
            "vqa.pth: 1 answers given, the file's head has 3 outputs",
        ),
        (released_file, {"text_model": tmp_path / "no.spm"}, "no text tokenizer at .*no.spm"),
        (released_file, {"answers": tmp_path / "no.txt"}, "no answer list at .*no.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, **arguments)


def test_answers_are_refused_for_a_task_without_them(tmp_path):
    task = Backbone(TaskConfig(model=PAPER))
    save_weights(task, tmp_path / "w")
    with pytest.raises(
        ValueError, match="w: answers given, but backbone has none: leave answers out"
    ):
        load(tmp_path / "w", answers=ANSWERS)


def test_a_predictor_takes_any_task(tokenizer, image_path):
    predictor = Predictor(make_vqa(tokenizer), LoadReport("nowhere", (), {}, {}))
    assert predictor(image_path, "how many")[0]["answer"] in ANSWERS


# As another task ----------------------------------------------------------------------------------


def make_retrieval(model=RELEASE, **arguments) -> Retrieval:
    task = Retrieval(
        RetrievalConfig(
            model=model, image=Preprocessing(16, interpolation="bilinear"), text_length=9
        ),
        **arguments,
    )
    task.init_weights(3)
    return task


@pytest.fixture(params=["directory", "file"])
def retrieval_weights(request, tmp_path, tokenizer) -> dict:
    """Retrieval weights of both kinds, as arguments of `load`."""
    task = make_retrieval(tokenizer=tokenizer)
    if request.param == "directory":
        save_weights(task, tmp_path / "dual")
        return {"path": tmp_path / "dual"}
    torch.save({"model": to_released_state(task)}, tmp_path / "dual.pth")
    tokenizer.save(tmp_path / "text.spm")
    return {"path": tmp_path / "dual.pth", "text_model": tmp_path / "text.spm"}


CLASSES = ("red cube", "blue ball", "how many")


def test_retrieval_weights_classify_into_any_names(retrieval_weights, tmp_path, image_path):
    """Scores are similarities of features, and do not depend on how the names are given."""
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (tmp_path / "data/imagenet/main").mkdir(parents=True)
    (tmp_path / "data/imagenet/main/classes.txt").write_text(
        "".join(f"{name}\n" for name in CLASSES)
    )
    features = load(**retrieval_weights).embed([image_path], [f"a {name}" for name in CLASSES])
    task = load(**retrieval_weights).task
    expected = torch.softmax(
        float(task.logit_scale.exp()) * torch.tensor(features["image"] @ features["text"].T)[0], 0
    )
    for classes in (CLASSES, list(CLASSES), tmp_path / "names.txt", str(tmp_path / "data")):
        predictor = load(**retrieval_weights, task="imagenet", classes=classes, prompt="a {}")
        assert not predictor.report.fresh
        scores = {candidate["name"]: candidate["score"] for candidate in predictor(image_path)}
        assert scores == {
            name: pytest.approx(float(score), abs=1e-5)
            for name, score in zip(CLASSES, expected, strict=True)
        }
    assert (
        load(**retrieval_weights, task="imagenet", classes=CLASSES)(image_path)[0]["score"]
        not in scores.values()
    ), "the prompt changes the scores"


def test_class_names_are_taken_from_the_records(retrieval_weights, tmp_path, image_path):
    (tmp_path / "data/imagenet/main").mkdir(parents=True)
    (tmp_path / "data/imagenet/main/classes.txt").write_text(
        "".join(f"{name}\n" for name in CLASSES)
    )
    predictor = load(**retrieval_weights, task="imagenet")
    with pytest.raises(ValueError, match="needs the class names: give classes=FILE"):
        predictor(image_path)
    names = tmp_path / "data/imagenet/main/classes.txt"
    predictor.match_class_names(names)
    assert predictor(image_path) == load(**retrieval_weights, task="imagenet", classes=CLASSES)(
        image_path
    )
    names.write_text("".join(f"{name}\n" for name in reversed(CLASSES)))
    with pytest.raises(
        ValueError,
        match=f"class 0 is {CLASSES[0]!r} to the weights and {CLASSES[-1]!r} in .*classes.txt",
    ):
        predictor.match_class_names(names)
    predictor.match_class_names(tmp_path / "absent.txt")


def test_the_preprocessing_of_the_weights_is_kept(tmp_path, tokenizer, image_path):
    """It differs from the other task's default; only a directory stores it."""
    save_weights(make_retrieval(tokenizer=tokenizer), tmp_path / "w")
    assert load(
        tmp_path / "w", task="imagenet", classes=CLASSES
    ).task.config.image == Preprocessing(16, interpolation="bilinear")


def test_an_untrained_head_names_the_source_of_the_weights(
    tmp_path, tokenizer, text_model, image_path
):
    task = NLVR2(NLVR2Config(model=RELEASE, image=Preprocessing(16)), tokenizer=tokenizer)
    task.init_weights(0)
    torch.save({"model": to_released_state(task)}, tmp_path / "nlvr2.pth")
    save_weights(task, tmp_path / "w")
    arguments = {"task": "vqa", "answers": ANSWERS}
    for predictor, source in (
        (load(tmp_path / "nlvr2.pth", text_model=text_model, **arguments), "a released nlvr2 file"),
        (load(tmp_path / "w", **arguments), f"{tmp_path / 'w'} (nlvr2)"),
    ):
        with pytest.raises(ValueError) as error:
            predictor(image_path, "how many")
        assert str(error.value) == (
            f"the head of vqa is untrained (pooler.norm.weight), {source} has none: give weights "
            "of vqa, "
            "fine-tune (beit3 train vqa --init), or use .task.outputs(batch)"
        )
    assert load(tmp_path / "w")(image_path, image_path, "how many")[0]["answer"] in (
        "true",
        "false",
    )


# Features -----------------------------------------------------------------------------------------


def test_features_of_retrieval_equal_those_of_the_task(retrieval_weights, image_path):
    predictor, texts = (
        load(**retrieval_weights),
        ["how many", "red", "blue ball left of the cube and the ball"],
    )
    images = [image_path, str(image_path), Image.open(image_path), Image.new("RGB", (9, 9), "red")]
    features = predictor.embed(images, texts)
    assert {name: (array.shape, array.dtype) for name, array in features.items()} == {
        "image": ((4, 64), np.float32),
        "text": ((3, 64), np.float32),
    }
    for array in features.values():
        np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(features["image"][0], features["image"][2])
    task = predictor.task
    (prediction,) = task.predict(
        task.collate([task.example({"id": "0", "image": image_path, "captions": texts}, False)])
    )
    np.testing.assert_allclose(features["image"][0], prediction["image"], atol=1e-6)
    np.testing.assert_allclose(features["text"], prediction["texts"], atol=1e-6)
    json.dumps(predictor(image_path, "how many"))
    one_by_one = predictor.embed(iter(images), (text for text in texts[::-1]), batch_size=1)
    np.testing.assert_allclose(one_by_one["image"], features["image"], atol=1e-5)
    np.testing.assert_allclose(one_by_one["text"][::-1], features["text"], atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_packed_weights_give_the_same_features(retrieval_weights, image_path):
    packed, plain = load(**retrieval_weights, packed=True), load(**retrieval_weights)
    for _ in range(3):  # the third call uses what the second laid out
        for name, array in packed.embed([image_path], ["how many"]).items():
            np.testing.assert_allclose(
                array, plain.embed([image_path], ["how many"])[name], atol=1e-5
            )
    with pytest.raises(ValueError, match="leave packed out"):
        packed.to("meta")
    for switch in ("packed", "compiled"):
        with pytest.raises(ValueError, match=f"leave {switch} out"):
            load(**retrieval_weights, int8=True, **{switch: True})


@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs a C++ compiler")
@pytest.mark.parametrize("retrieval_weights", ["directory"], indirect=True)  # it takes seconds
def test_compiled_blocks_give_the_same_features(retrieval_weights, image_path):
    compiled, plain = (
        load(**retrieval_weights, packed=True, compiled=True),
        load(**retrieval_weights),
    )
    for name, array in compiled.embed([image_path] * 2, ["how many"]).items():
        np.testing.assert_allclose(
            array, plain.embed([image_path] * 2, ["how many"])[name], atol=1e-5
        )


def test_images_need_no_tokenizer(retrieval_weights, image_path):
    predictor = load(retrieval_weights["path"])
    assert sorted(predictor.embed(images=[image_path])) == ["image"]
    assert predictor.embed() == {} == predictor.embed(images=None)
    with Image.open(image_path) as image:
        for one_image in (str(image_path), image_path, image):
            assert len(predictor.embed(images=one_image)["image"]) == 1
    if "text_model" in retrieval_weights:
        with pytest.raises(ValueError, match="text_model="):
            predictor.embed(texts=["how many"])
    texts = load(**retrieval_weights).embed(texts=["how many"])
    assert sorted(texts) == ["text"]
    one_text = load(**retrieval_weights).embed(texts="how many")["text"]
    assert np.array_equal(one_text, texts["text"]), "a text is no list of letters"


def test_features_of_a_backbone_are_its_states(pretrained_file, text_model, image_path):
    predictor = load(pretrained_file, task="backbone", text_model=text_model)
    features = predictor.embed([image_path], ["how many"])
    np.testing.assert_allclose(features["image"][0], predictor(image_path)[0]["image"], atol=1e-6)
    np.testing.assert_allclose(
        features["text"][0], predictor(None, "how many")[0]["text"], atol=1e-6
    )
    assert abs(np.linalg.norm(features["image"]) - 1) > 0.1, "they are not normalized"


def test_unavailable_features_are_refused(
    tmp_path, tokenizer, pretrained_file, text_model, image_path, retrieval_weights
):
    save_weights(make_vqa(tokenizer), tmp_path / "w")
    for predictor, inputs, message in (
        (
            load(tmp_path / "w"),
            {"images": [image_path]},
            "vqa has no features of single inputs: give weights of retrieval, or load these",
        ),
        (
            load(pretrained_file),
            {"images": [image_path]},
            "pretrain has no features of single inputs",
        ),
        (
            load(pretrained_file, task="retrieval"),
            {"images": [image_path]},
            "the head of retrieval is untrained",
        ),
        (
            load(**retrieval_weights),
            {"texts": ["red", ""]},
            r"texts\[1\]: the text is empty: leave it out",
        ),
        (
            load(**retrieval_weights),
            {"images": [image_path, tmp_path / "absent.png"]},
            "absent.png",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            predictor.embed(**inputs)
        assert "\n" not in str(error.value)
    task = Backbone(TaskConfig(model=RELEASE))
    task.init_weights(0)
    state = {
        key: value
        for key, value in to_released_state(task).items()
        if ".B." not in key and "text_embed" not in key
    }
    torch.save(state, tmp_path / "image.pth")
    predictor = load(tmp_path / "image.pth", text_model=text_model)
    assert predictor.embed([image_path])["image"].shape == (1, 64)
    with pytest.raises(ValueError, match="holds the image side alone"):
        predictor.embed(texts=["how many"])
