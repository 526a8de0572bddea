"""A fingerprint changes with all that changes features, and with nothing else."""

import json
from dataclasses import replace

import pytest
import torch

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY_RELEASE
from beit3.predict import Predictor, load
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights

MODEL = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=2,
    ffn_dim=32,
    image_size=16,
    vocab_size=64,
    text_positions=66,
)
CONFIG = RetrievalConfig(model=MODEL, image=Preprocessing(16), text_length=64)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many red cubes are left of the blue ball"], vocab_size=60)


def make_task(tokenizer: TextTokenizer | None, config: RetrievalConfig = CONFIG) -> Retrieval:
    task = Retrieval(config, tokenizer=tokenizer)
    task.init_weights(3)
    return task


def fingerprint(task: Retrieval, **options) -> dict[str, str]:
    return Predictor(task, LoadReport("nowhere", (), {}, {}), **options).fingerprint


def test_every_weight_changes_the_fingerprint(tokenizer):
    original = fingerprint(make_task(tokenizer))
    assert list(original) == ["task", "weights", "image", "text"]
    assert original["task"] == "retrieval" and len(original["weights"]) == 64
    task, seen = make_task(tokenizer), {original["weights"]}
    for _, parameter in task.named_parameters():
        with torch.no_grad():
            value = parameter.view(-1)[-1]
            parameter.view(-1)[-1] = torch.nextafter(value, value + 1)  # the smallest step
        changed = fingerprint(task)
        assert changed["weights"] not in seen
        assert {**changed, "weights": ""} == {**original, "weights": ""}
        seen.add(changed["weights"])


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("image", {"image": Preprocessing(16, interpolation="bilinear")}),
        ("image", {"image": Preprocessing(16, mean=(0.1, 0.5, 0.5))}),
        ("text", {"text_length": 9}),
        ("weights", {"model": replace(MODEL, num_heads=2)}),
        ("weights", {"model": replace(MODEL, norm_eps=1e-6)}),
    ],
)
def test_what_else_changes_features(tokenizer, part, changes):
    original = fingerprint(make_task(tokenizer))
    changed = fingerprint(make_task(tokenizer, replace(CONFIG, **changes)))
    assert [name for name in original if original[name] != changed[name]] == [part]


def test_another_tokenizer_changes_the_text_part(tokenizer):
    other = TextTokenizer.train(["a small green pyramid behind two cones"], vocab_size=60)
    original = fingerprint(make_task(tokenizer))
    assert fingerprint(make_task(other))["text"] not in (original["text"], "")
    assert fingerprint(make_task(None)) == {**original, "text": ""}


@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"precision": "float16"}, {"packed": True}]
)
def test_precision_and_layout_do_not_change_it(tokenizer, options):
    if options.get("packed") and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    changed = Predictor(make_task(tokenizer), LoadReport("nowhere", (), {}, {}), **options)
    assert changed.fingerprint == fingerprint(make_task(tokenizer))
    changed.embed(texts=["red", "how many"])
    assert changed.fingerprint == fingerprint(make_task(tokenizer))


def test_the_file_does_not_change_it(tmp_path, tokenizer):
    task = make_task(tokenizer)
    tokenizer.save(tmp_path / "text.spm")
    torch.save({"model": to_released_state(task)}, tmp_path / "dual.pth")
    released = load(tmp_path / "dual.pth", text_model=tmp_path / "text.spm")
    save_weights(released.task, tmp_path / "run" / "best")
    save_weights(released.task, tmp_path / "copy")
    for path in ("run", "copy"):
        assert load(tmp_path / path).fingerprint == released.fingerprint
    json.loads(released.fingerprint["image"])
    half = {name: tensor.half() for name, tensor in to_released_state(task).items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    rounded = load(tmp_path / "half.pth", text_model=tmp_path / "text.spm")
    assert rounded.fingerprint != released.fingerprint, "rounded weights are others"
    save_weights(rounded.task, tmp_path / "half")
    assert load(tmp_path / "half").fingerprint == rounded.fingerprint


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_the_device_does_not_change_it(tokenizer, precision):
    predictor = Predictor(
        make_task(tokenizer), LoadReport("nowhere", (), {}, {}), precision=precision
    )
    assert predictor.to("cuda").fingerprint == fingerprint(make_task(tokenizer))
