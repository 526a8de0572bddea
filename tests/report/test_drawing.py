"""`beit3 predict --out` draws a prediction, and writes no file where there is nothing to draw."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.cli import main
from beit3.data.stores.rle import encode_rle
from beit3.report.drawing import draw_prediction
from beit3.segmentation.records import encode_label_map

SIDE = 400
GRAY = np.full((SIDE, SIDE, 3), 128, np.uint8)


def test_objects_are_filtered_by_score_and_returned_without_masks():
    mask = encode_rle(torch.ones(SIDE, SIDE, dtype=torch.uint8))
    objects = [
        {"box": [1, 2, 3, 4], "label": 0, "score": score, "mask": mask} for score in (0.9, 0.3, 0.2)
    ]
    prediction = {"id": "0", "height": SIDE, "width": SIDE, "objects": objects}
    _, summary = draw_prediction(GRAY, prediction, (), min_score=0.3)
    assert [item["score"] for item in summary["objects"]] == [0.9, 0.3]
    assert "mask" not in json.dumps(summary)


def test_label_maps_are_drawn_above_a_legend_and_returned_as_classes():
    prediction = {"id": "0", "map": encode_label_map(torch.zeros(SIDE, SIDE, dtype=torch.int64))}
    drawing, summary = draw_prediction(GRAY, prediction, ("sky",), min_score=0.3)
    assert summary == {"id": "0", "classes": [{"label": 0, "name": "sky", "share": 1.0}]}
    assert drawing.height > SIDE


def test_other_predictions_cannot_be_drawn():
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_prediction(GRAY, {"answer": "yes"}, (), min_score=0.3)


def test_predict_draws_objects(coco, root, tmp_path, capsys):
    image, out = str(root / "0.png"), tmp_path / "deep" / "drawing.png"
    assert main(["predict", str(coco), image, "--out", str(out), "--min-score", "0"]) == 0
    prediction = json.loads(capsys.readouterr().out)[0]
    assert prediction["width"] == 16
    assert prediction["objects"] and "mask" not in prediction["objects"][0]
    assert Image.open(out).size == (16 * 25, 16 * 25)
    assert main(["predict", str(coco), image, "--out", str(out), "--min-score", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["objects"] == []
    enlarged = np.array(Image.open(out))
    np.testing.assert_array_equal(enlarged[::25, ::25], np.array(Image.open(image)))
    assert main(["predict", str(coco), image]) == 0
    assert "mask" in json.loads(capsys.readouterr().out)[0]["objects"][0]


def test_predict_draws_label_maps(ade20k, root, tmp_path, capsys):
    image, out = str(root / "0.png"), tmp_path / "drawing.jpg"
    assert main(["predict", str(ade20k), image, "--out", str(out)]) == 0
    classes = json.loads(capsys.readouterr().out)[0]["classes"]
    assert sum(item["share"] for item in classes) == pytest.approx(1, abs=1e-3)
    assert Image.open(out).height > 16 * 25
    assert main(["predict", str(ade20k), image]) == 0
    label_map = json.loads(capsys.readouterr().out)[0]["map"]
    assert Image.open(io.BytesIO(base64.b64decode(label_map))).size == (16, 16)


def test_errors_write_no_file(coco, vqa, root, tmp_path, capsys):
    image = tmp_path / "a.png"
    original = (root / "0.png").read_bytes()
    image.write_bytes(original)
    cases = (
        ([coco, image, "--out", tmp_path / "b.gif"], "give one of .png, .jpg"),
        ([coco, image, "--out", image], "is the image itself"),
        ([coco, image, "--min-score", "0.5"], "give --out too"),
        ([vqa[0], image, "why ?", "--out", tmp_path / "b.png"], "nothing to draw"),
    )
    for arguments, message in cases:
        assert main(["predict", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [image] and image.read_bytes() == original
