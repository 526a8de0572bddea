"""Drawings: colours where things are, letters where there is room, and nothing written where
nothing can be drawn."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.cli import main
from beit3.data.stores.rle import encode_rle
from beit3.report.drawing import (
    COLORS,
    LEAST,
    LEGEND,
    _lacking,
    color,
    cut_short,
    draw_map,
    draw_objects,
    drawing,
    font,
    palette,
    percent,
    shares,
    true_objects,
    with_legend,
)
from beit3.tasks.ade20k import encode_label_map

GREY = np.full((LEAST, LEAST, 3), 128, np.uint8)


def near(pixel, paint, far: int = 2) -> bool:
    return bool((np.abs(np.asarray(pixel, int) - np.asarray(paint)) <= far).all())


def mask(top: int, bottom: int, left: int, right: int, side: int = LEAST) -> dict:
    pixels = torch.zeros(side, side, dtype=torch.uint8)
    pixels[top:bottom, left:right] = 1
    return encode_rle(pixels)


def cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB of 0 to 255 -> CIE 1976 L*a*b*, by its definition: another measure than the one that
    chose the colours."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.moveaxis(
        np.cbrt(linear @ to_xyz.T / (0.9505, 1.0, 1.089)), -1, 0
    )  # the branch near black is not needed here
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


# Colours ------------------------------------------------------------------------------------------


def test_colours_are_fixed_and_apart():
    colors = np.array(palette(), int)
    assert len(set(palette())) == COLORS and color(3) == color(3 + COLORS) == tuple(colors[3])
    apart = np.linalg.norm(
        cielab(colors[:16, None]) - cielab(colors[None, :16]), axis=-1
    ) + 999 * np.eye(16)
    assert apart[:8, :8].min() > 40 and apart.min() > 20, (
        "measured 45 and 22; 2.3 is just noticeable"
    )
    assert colors.max(1).min() > 90 and colors.min(1).max() < 235, "none is near black or white"


# Objects ------------------------------------------------------------------------------------------


def test_a_box_is_framed_between_dark_lines_and_its_inside_left_alone():
    drawn = np.array(draw_objects(GREY, [{"box": [100, 200, 80, 60], "label": 2}]))
    for row, column in ((200, 140), (259, 140), (230, 100), (230, 179)):
        assert near(drawn[row, column], color(2), 0), (row, column)
    assert near(drawn[230, 99], (16, 16, 16)) and near(drawn[230, 102], (16, 16, 16))
    np.testing.assert_array_equal(drawn[210:250, 110:170], GREY[210:250, 110:170])
    np.testing.assert_array_equal(drawn[270:], GREY[270:])


def test_a_mask_is_tinted_and_outlined_where_it_is():
    drawn = np.array(
        draw_objects(
            GREY, [{"box": [100, 200, 80, 60], "label": 1, "mask": mask(220, 240, 120, 160)}]
        )
    )
    assert near(drawn[230, 140], 0.6 * 128 + 0.4 * np.array(color(1))) and near(
        drawn[220, 140], color(1), 0
    )
    assert near(drawn[218, 140], (128, 128, 128), 0) and near(drawn[230, 165], (128, 128, 128), 0)


def test_small_pictures_are_enlarged_and_large_ones_keep_their_size():
    small = GREY[:32, :20]
    assert draw_objects(small, []).size == (20 * 13, 32 * 13)
    drawn = np.array(
        draw_objects(small, [{"box": [4, 16, 10, 8], "label": 0, "mask": mask(18, 22, 6, 10, 32)}])
    )
    assert near(drawn[16 * 13, 9 * 13], color(0), 0) and near(
        drawn[20 * 13, 8 * 13], 0.6 * 128 + 0.4 * np.array(color(0))
    )
    wide = np.zeros((300, 2000, 3), np.uint8)
    drawn = draw_objects(wide, [{"box": [100, 100, 900, 150], "label": 0}])
    assert drawn.size == (2000, 300) and near(np.array(drawn)[104, 500], color(0), 0), (
        "lines of 5 pixels"
    )
    assert draw_objects(wide, [], side=320).size == (320, 48)


def test_names_do_not_hide_each_other_and_the_best_has_the_first_place():
    """Three objects at one place: two names find corners that are free, boxes as narrow as these
    leave none to a tenth."""
    box = {"box": [150, 180, 120, 90], "label": 0, "name": "one", "score": 0.5}
    alone, two = (
        np.array(draw_objects(GREY, [box] + [box | {"label": 1, "name": "two"}] * more))
        for more in (0, 1)
    )
    above = (slice(150, 178), slice(150, 200))
    np.testing.assert_array_equal(two[above], alone[above])
    assert not (alone == color(1)).all(-1).any() and (two == color(1)).all(-1).sum() > 300
    many = [
        box | {"label": label, "name": "x" * 60, "box": [150, 180, 4, 4]} for label in range(10)
    ]
    drawn = np.array(draw_objects(GREY, many))
    written = [label for label in range(10) if (drawn == color(label)).all(-1).sum() > 1000]
    assert written[0] == 0 and 0 < len(written) < 10


def test_odd_objects_are_drawn():
    """At the edge, beyond it, without an area, without a pixel in the mask, with any letters in the
    name."""
    odd = [
        {"box": [-20, -5, 60, 40], "label": 0, "name": "собака 日本 😀"},
        {"box": [LEAST - 5, LEAST - 5, 50, 50], "label": 999},
        {"box": [30, 30, 0, 0], "label": 3, "mask": mask(0, 0, 0, 0)},
        {"box": [0, 0, LEAST, LEAST], "label": 4, "name": "two\nlines"},
    ]
    assert draw_objects(GREY, odd).size == (LEAST, LEAST)
    assert draw_objects(GREY[:1, :1], [{"box": [0, 0, 1, 1], "label": 0}]).size == (LEAST, LEAST)
    assert cut_short("a" * 41) == "a" * 39 + "…" and cut_short("a\n b") == "a b"


def test_letters_beyond_latin_are_there():
    assert not _lacking(font("собака ναι", 13), "собака ναι") and _lacking(
        font("a", 13), "\U0010ffff"
    )


def test_the_truth_is_drawn_largest_first_with_crowds_named():
    rows = [
        {
            "box": [0, 0, 2, 2],
            "label": 1,
            "area": 4.0,
            "crowd": True,
            "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]],
        },
        {"box": [0, 0, 4, 4], "label": 0, "area": 16.0, "crowd": False},
    ]
    found = true_objects({"width": 8, "height": 6, "objects": rows}, ["cat", "dog"])
    assert [each["name"] for each in found] == ["cat", "dog (crowd)"]
    assert "mask" not in found[0] and found[1]["mask"]["size"] == [6, 8]


# Maps ---------------------------------------------------------------------------------------------


def test_a_map_is_tinted_by_label_with_lines_between():
    labels = np.zeros((LEAST, LEAST), int)
    labels[:, 200:], labels[:100] = 7, 255
    drawn = np.array(draw_map(GREY, labels, ignore=255))
    assert near(drawn[300, 100], 0.35 * 128 + 0.65 * np.array(color(0))) and near(
        drawn[300, 300], 0.35 * 128 + 0.65 * np.array(color(7))
    )
    np.testing.assert_array_equal(drawn[:98], GREY[:98])
    assert drawn[300, 199].max() < 110 and not near(drawn[300, 195], drawn[300, 199])
    assert draw_map(GREY[:10, :20], labels[:10, :20]).size == (LEAST, LEAST // 2)


def test_shares_are_counted_and_named():
    labels = np.array([[0, 0, 0, 5], [1, 255, 0, 1]])
    found = shares(labels, ["sky", "sea"], ignore=255)
    assert [(row["name"], row["share"]) for row in found] == [
        ("sky", 0.5),
        ("sea", 0.25),
        ("class 5", 0.125),
    ]
    assert [percent(share) for share in (0.25, 0.001, 0.0004, 0.0)] == [
        "25.0%",
        "0.1%",
        "< 0.1%",
        "< 0.1%",
    ]


def test_a_legend_has_every_colour_up_to_its_length():
    rows = [
        {"label": label, "name": f"class {label}", "share": 0.01} for label in range(LEGEND + 6)
    ]
    picture = Image.fromarray(GREY)
    below = np.array(with_legend(picture, rows))[LEAST:]
    there = [bool((below == color(label)).all(-1).sum() > 50) for label in range(LEGEND + 6)]
    assert there == [True] * LEGEND + [False] * 6
    assert with_legend(Image.fromarray(GREY[:, :20]), rows[:2]).width > 20, (
        "a narrow picture gets room for its names"
    )


def test_predictions_in_short():
    found = [
        {"box": [1, 2, 3, 4], "label": 0, "score": score, "mask": mask(0, 4, 0, 4)}
        for score in (0.9, 0.3, 0.2)
    ]
    _, short = drawing(
        GREY, {"id": "0", "height": LEAST, "width": LEAST, "objects": found}, (), min_score=0.3
    )
    assert [each["score"] for each in short["objects"]] == [0.9, 0.3] and "mask" not in json.dumps(
        short
    )
    labels = torch.zeros(LEAST, LEAST, dtype=torch.int64)
    drawn, short = drawing(
        GREY, {"id": "0", "map": encode_label_map(labels)}, ("sky",), min_score=0.3
    )
    assert (
        short == {"id": "0", "classes": [{"label": 0, "name": "sky", "share": 1.0}]}
        and drawn.height > LEAST
    )
    with pytest.raises(ValueError, match="nothing to draw"):
        drawing(GREY, {"answer": "yes"}, (), min_score=0.3)


# The command --------------------------------------------------------------------------------------


def test_predict_draws(coco, ade20k, root, tmp_path, capsys):
    picture, out = str(root / "0.png"), tmp_path / "deep" / "drawn.png"
    assert main(["predict", str(coco), picture, "--out", str(out), "--min-score", "0"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (
        listed[0]["width"] == 16 and listed[0]["objects"] and "mask" not in listed[0]["objects"][0]
    )
    assert Image.open(out).size == (16 * 25, 16 * 25)
    assert main(["predict", str(coco), picture, "--out", str(out), "--min-score", "1.1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["objects"] == []
    np.testing.assert_array_equal(
        np.array(Image.open(out))[::25, ::25], np.array(Image.open(picture))
    )
    assert main(["predict", str(coco), picture]) == 0
    assert "mask" in json.loads(capsys.readouterr().out)[0]["objects"][0]
    assert main(["predict", str(ade20k), picture, "--out", str(out.with_suffix(".jpg"))]) == 0
    assert sum(
        row["share"] for row in json.loads(capsys.readouterr().out)[0]["classes"]
    ) == pytest.approx(1, abs=1e-3)
    assert Image.open(out.with_suffix(".jpg")).height > 16 * 25
    assert main(["predict", str(ade20k), picture]) == 0
    whole = json.loads(capsys.readouterr().out)[0]["map"]
    assert Image.open(io.BytesIO(base64.b64decode(whole))).size == (16, 16)


def test_what_cannot_be_drawn_leaves_files_alone(coco, vqa, root, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes((root / "0.png").read_bytes())
    before, picture = (tmp_path / "a.png").read_bytes(), str(tmp_path / "a.png")
    for arguments, message in (
        ([str(coco), picture, "--out", str(tmp_path / "b.gif")], "give one of .png, .jpg"),
        ([str(coco), picture, "--out", picture], "is the picture itself"),
        ([str(coco), picture, "--min-score", "0.5"], "give --out too"),
        ([str(vqa[0]), picture, "why ?", "--out", str(tmp_path / "b.png")], "nothing to draw"),
    ):
        assert main(["predict", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (
        tmp_path / "a.png"
    ).read_bytes() == before
