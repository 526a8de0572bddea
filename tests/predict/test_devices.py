"""The predictor on accelerators gives what it gives on the CPU."""

import numpy as np
import pytest
import torch

from beit3.predict import Predictor, load
from beit3.weights.store import save_weights
from tests.predict.networks import assert_same, make_pixels, make_predictor, make_task
from tests.predict.test_threads import make_calls, run_in_threads

TEXTS = ["red", "how many red circles are left of the blue square", "what"]
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "mps",
        marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="this is no Mac"),
    ),
]


@pytest.fixture
def images() -> list:
    return [make_pixels(0), make_pixels(1, 40, 25), make_pixels(2, 33, 64)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "auto"])
def test_features_and_predictions_follow_the_device(device, precision, root, images):
    exact = make_predictor("retrieval", root)
    moved = make_predictor("retrieval", root, precision=precision).to(device)
    assert moved.device.type == device and moved.fingerprint == exact.fingerprint
    tolerance = 2e-3 if precision == "float32" else 0.03  # matrix products may use TF32
    for name, array in moved.embed(images, TEXTS, workers=2, batch_size=2).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, exact.embed(images, TEXTS)[name], atol=tolerance)
    actual, expected = (
        predictor.inspect(images[0], TEXTS[1], layers=(0, 1), attention=True)
        for predictor in (moved, exact)
    )
    np.testing.assert_allclose(actual.attention[1], expected.attention[1], atol=tolerance)
    calls = make_calls(moved, 8, 3)
    assert_same(run_in_threads(calls), [call() for call in calls], tolerance)
    answers, expected_answers = (
        predictor(images, TEXTS)
        for predictor in (make_predictor("vqa", root).to(device), make_predictor("vqa", root))
    )
    assert_same(answers, expected_answers, 0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_load_onto_a_device(device, root, tmp_path, images):
    save_weights(make_task("retrieval", root), tmp_path / "w")
    predictor = load(tmp_path / "w", device=device, precision="auto")
    assert predictor.device.type == device and predictor.precision in ("bfloat16", "float16")
    on_device = torch.from_numpy(images[0]).permute(2, 0, 1).to(device)
    np.testing.assert_allclose(
        predictor.embed(on_device)["image"], predictor.embed(images[0])["image"], atol=1e-3
    )


def test_auto_decides_again_on_an_accelerator(root, monkeypatch):
    """Float32 on a CPU becomes half precision where that is fast; what is half stays so."""
    monkeypatch.setattr("beit3.precision.measure_gain", lambda task, packed=False: 1.0)
    predictor = make_predictor("retrieval", root, precision="auto")
    assert predictor.precision == "float32"
    predictor.to("cpu")
    assert predictor.precision == "float32"
    fingerprint = predictor.fingerprint
    predictor.to("meta")
    assert predictor.precision in ("bfloat16", "float16")
    assert predictor.fingerprint == fingerprint
    fixed: Predictor = make_predictor("retrieval", root)
    assert fixed.to("meta").precision == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device gpu cannot be used: "),
        ({"precision": "half"}, "no precision 'half'"),
        ({"precision": "bfloat16", "packed": True}, "leave packed out, or take float32"),
        ({"precision": "bfloat16", "int8": True}, "int8 and precision bfloat16 exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(root, tmp_path, options, message):
    save_weights(make_task("retrieval", root), tmp_path / "w")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "w", **options)
    assert "\n" not in str(error.value)
