"""One call loads any weights, another asks them: directories, runs, released files, and what each refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.transforms import Preprocessing
from beit3.model.config import TINY, TINY_RELEASE
from beit3.predict import Predictor, load
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.fill import Report
from beit3.weights.official import to_official
from beit3.weights.store import save
from tests.golden import golden

RELEASE = replace(
    TINY_RELEASE, dim=64, num_heads=1, depth=1, ffn_dim=32, image_size=16, vocab_size=64, text_positions=66
)
PAPER = replace(TINY, dim=32, depth=1, ffn_dim=32, image_size=16, vocab_size=64, text_positions=66, final_norm=False)
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
    config = VQAConfig(model=PAPER, image=Preprocessing(16), answers=ANSWERS, num_answers=3, text_length=12)
    task = VQA(replace(config, **changes), tokenizer=tokenizer)
    task.init_weights(0)
    return task


@pytest.fixture
def released(tmp_path):
    """A released VQA file in half precision."""
    task = vqa(model=replace(RELEASE, final_norm=False))
    torch.save({"model": {key: tensor.half() for key, tensor in to_official(task).items()}}, tmp_path / "vqa.pth")
    return tmp_path / "vqa.pth"


@pytest.fixture
def pretrained(tmp_path):
    task = Pretrain(PretrainConfig(model=RELEASE, num_codes=9))
    task.init_weights(0)
    torch.save({"model": to_official(task)}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


@pytest.mark.parametrize("place", ["", "best", "last"])
def test_a_directory_or_a_run(tmp_path, tokenizer, picture, place):
    task = vqa(tokenizer)
    save(task, tmp_path / "run" / place)
    predictor = load(tmp_path / "run")
    assert not predictor.task.training and not predictor.report.fresh
    prediction = predictor(picture, "how many cubes")
    task.eval()
    batch = task.collate([task.example({"id": "0", "image": picture, "text": "how many cubes"}, False)])
    assert prediction == task.predict(batch)[0]["candidates"]
    assert sorted(each["answer"] for each in prediction) == sorted(ANSWERS), "as many as there are, up to five"
    assert [each["score"] for each in prediction] == sorted((each["score"] for each in prediction), reverse=True)
    json.dumps(prediction)


def test_best_comes_before_last(tmp_path, tokenizer):
    for place, answers in (("last", ("a", "b", "c")), ("best", ANSWERS)):
        save(vqa(tokenizer, answers=answers), tmp_path / "run" / place)
    assert load(tmp_path / "run").task.config.answers == ANSWERS


def test_pictures_as_paths_strings_and_in_memory(tmp_path, tokenizer, picture):
    save(vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    scores = {predictor(form, "how many")[0]["score"] for form in (picture, str(picture), Image.open(picture))}
    assert len(scores) == 1
    assert predictor(Image.new("LA", (8, 8)), "how many")[0]["score"] not in scores


def test_a_released_file(released, text_model, picture):
    predictor = load(released, text_model=text_model, answers=ANSWERS)
    assert isinstance(predictor.task, VQA) and not predictor.report.fresh
    assert predictor(picture, "how many")[0]["answer"] in ANSWERS


@pytest.mark.parametrize("form", ["lines", "released"])
def test_answers_from_a_file(tmp_path, released, form):
    lines = ANSWERS if form == "lines" else [json.dumps({"answer": a, "label": i}) for i, a in enumerate(ANSWERS)]
    (tmp_path / "answers.txt").write_text("\n".join(lines) + "\n")
    assert load(released, answers=tmp_path / "answers.txt").task.config.answers == ANSWERS
    assert load(released, answers=str(tmp_path / "answers.txt")).task.config.answers == ANSWERS


def test_answers_for_a_directory_that_names_none(tmp_path, tokenizer, picture):
    save(vqa(tokenizer, answers=()), tmp_path / "w")
    with pytest.raises(ValueError, match="answers=FILE"):
        load(tmp_path / "w")(picture, "how many")
    assert load(tmp_path / "w", answers=ANSWERS)(picture, "how many")[0]["answer"] in ANSWERS
    with pytest.raises(ValueError, match="2 answer names for 3 outputs"):
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
    with pytest.raises(ValueError, match=r"the head of vqa is untrained \(pooler.*use .task.outputs"):
        predictor(picture, "how many")
    batch = {"image": torch.zeros(1, 3, 16, 16), "text": torch.tensor([[0, 5, 2]])}
    assert predictor.task.outputs(batch)["logits"].isfinite().all()


def test_features_of_a_pretrained_file(pretrained, text_model, picture):
    predictor = load(pretrained, task="backbone", text_model=text_model)
    assert isinstance(predictor.task, Backbone)
    (image,), (both,), (text,) = predictor(picture), predictor(picture, "how many"), predictor(None, "how many")
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
    state = {key: value for key, value in to_official(task).items() if ".B." not in key and "text_embed" not in key}
    torch.save(state, tmp_path / "image.pth")
    predictor = load(tmp_path / "image.pth", text_model=text_model)
    assert len(predictor(picture)[0]["image"]) == 64
    with pytest.raises(ValueError, match="holds the image side alone: give images without text"):
        predictor(picture, "how many")


def test_num_heads_reaches_the_network():
    file = golden("vqa") / "model.safetensors"
    assert load(file, num_heads=4).task.config.model.num_heads == 4


def test_calls_that_do_not_fit(tmp_path, tokenizer, pretrained, picture):
    save(vqa(tokenizer), tmp_path / "w")
    predictor = load(tmp_path / "w")
    with pytest.raises(ValueError, match="vqa takes image, question: 1 inputs given"):
        predictor(picture)
    with pytest.raises(ValueError, match="absent.png"):
        predictor(tmp_path / "absent.png", "how many")
    with pytest.raises(ValueError, match="pretrain takes no raw inputs"):
        load(pretrained)(picture, "how many")


def test_paths_and_arguments_that_do_not_fit(tmp_path, tokenizer, released):
    save(vqa(tokenizer), tmp_path / "w")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pth").write_bytes(released.read_bytes()[:3000])
    for path, arguments, message in (
        (tmp_path / "w", {"task": "pretrain"}, "w holds weights of vqa, not of pretrain"),
        (tmp_path / "empty", {}, "empty holds neither weights nor a run's best or last"),
        (tmp_path / "absent", {}, "no weights at .*absent"),
        (tmp_path / "cut.pth", {}, "cut.pth is not a whole torch file"),
        (released, {"task": "vqaa"}, "unknown task 'vqaa'; did you mean vqa?"),
        (released, {"answers": ("a",)}, "vqa.pth: 1 answers given, the file's head has 3 outputs"),
        (released, {"text_model": tmp_path / "no.spm"}, "no text tokenizer at .*no.spm"),
        (released, {"answers": tmp_path / "no.txt"}, "no answer list at .*no.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, **arguments)


def test_answers_for_weights_without_any(tmp_path):
    task = Backbone(TaskConfig(model=PAPER))
    save(task, tmp_path / "w")
    with pytest.raises(ValueError, match="answers given, but .*w holds weights of backbone"):
        load(tmp_path / "w", answers=ANSWERS)


def test_a_predictor_takes_any_task(tokenizer, picture):
    predictor = Predictor(vqa(tokenizer), Report("nowhere", (), {}, {}))
    assert predictor(picture, "how many")[0]["answer"] in ANSWERS
