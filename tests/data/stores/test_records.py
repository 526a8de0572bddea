"""Records: random access, laziness, faults by name; images of every kind against Pillow."""

import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from beit3.data.stores import records as module
from beit3.data.stores.records import Records, locate, write_records
from beit3.images import open_image

ROWS = [{"id": str(i), "text": "snow ☃ " * (i % 5), "image": f"a/{i}.png"} for i in range(50)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "vqa" / "main" / "train.jsonl"
    assert write_records(path, iter(ROWS)) == 50
    return path


def test_round_trip_and_access(path):
    records = Records(path)
    assert len(records) == 50 and list(records) == ROWS
    assert records[7] == ROWS[7] and records[-1] == ROWS[-1] and records[np.int64(3)] == ROWS[3]
    for index in (50, -51):
        with pytest.raises(IndexError):
            records[index]
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_workers_read_the_same(path):
    records = Records(path)
    records[0]
    assert list(pickle.loads(pickle.dumps(records))) == ROWS
    loader = DataLoader(records, batch_size=None, num_workers=2, shuffle=False)
    assert list(loader) == ROWS


def test_offsets_are_found_once_and_late(path, monkeypatch):
    records = Records(path)
    assert records._offsets is None
    records[3]
    offsets = records._offsets
    records[4], len(records)
    assert records._offsets is offsets


def test_blank_lines_crlf_and_no_final_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert list(Records(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"")
    assert len(Records(path)) == 0 and list(Records(path)) == []


@pytest.mark.parametrize("line", [b'{"a": ', b"[1, 2]", b"nonsense", b'{"a": "\xff"}'])
def test_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    records = Records(path)
    assert records[0] == {"a": 1} and records[2] == {"a": 2}
    with pytest.raises(ValueError, match="x.jsonl line 3 is not a JSON object") as error:
        records[1]
    assert "\n" not in str(error.value)


def test_failed_write_leaves_the_old_file(path):
    def broken():
        yield {"id": "new"}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert list(Records(path)) == ROWS and os.listdir(path.parent) == ["train.jsonl"]


def test_locate(path, tmp_path):
    assert locate(tmp_path, "vqa", "main", "train") == path
    with pytest.raises(ValueError) as error:
        locate(tmp_path, "vqa", "main", "val")
    assert f"beit3 prepare vqa --raw DIR --root {tmp_path}" in str(error.value)
    assert "vqa/main/val.jsonl" in str(error.value)
    with pytest.raises(ValueError, match="--source pairs"):
        locate(tmp_path, "pretrain", "pairs", "train")
    with pytest.raises(ValueError, match="no records at"):
        Records(tmp_path / "absent.jsonl")


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[0:20, 0:30]
    return np.stack([x * 8, y * 12, (x + y) * 5], axis=-1).astype(np.uint8)  # [20, 30, 3]


def pixels(tensor):
    assert tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(
    "name, tolerance", [("a.png", 0), ("a.jpg", 3), ("a.webp", 0), ("a.bmp", 0), ("a.tiff", 0)]
)
def test_formats(photo, tmp_path, name, tolerance):
    Image.fromarray(photo).save(
        tmp_path / name, **({"lossless": True} if name.endswith("webp") else {})
    )
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(open_image(tmp_path / name)) - expected).max() <= tolerance


MODES = "L.png L.jpg P.png P.gif 1.png LA.png RGBA.png RGBA.webp CMYK.jpg".split()


@pytest.mark.parametrize("mode, name", [(mode.partition(".")[0], mode) for mode in MODES])
def test_modes(photo, tmp_path, mode, name):
    Image.fromarray(photo).convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(open_image(tmp_path / name)) - expected).max() <= 2


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    grey = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (pixels(open_image(tmp_path / "a.png")) == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(photo, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    # EXIF 1 to 8: as is, mirrored, half turn, upside down, transposed, right turn, transverse, left turn.
    turns, transposed = (
        {1: 0, 2: 2, 3: 2, 4: 0, 5: 0, 6: -1, 7: 2, 8: 1}[orientation],
        orientation in (5, 7),
    )
    expected = np.rot90(photo, turns)
    if orientation in (2, 4):
        expected = np.flipud(expected)
    expected = expected.transpose(1, 0, 2) if transposed else expected
    found = pixels(open_image(path))
    assert found.shape == expected.shape and np.abs(found - expected.astype(int)).mean() < 4


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(open_image(tmp_path / "a.gif")) == [255, 0, 0]).all()


def test_relative_paths_may_leave_the_root(photo, tmp_path):
    (tmp_path / "root").mkdir()
    Image.fromarray(photo).save(tmp_path / "a.png")
    assert open_image(tmp_path / "root" / "../a.png").shape == (3, 20, 30)


def test_faults_name_the_file(photo, tmp_path, monkeypatch):
    Image.fromarray(photo).save(tmp_path / "whole.jpg")
    Image.fromarray(photo).save(tmp_path / "whole.png")
    whole = {name: (tmp_path / name).read_bytes() for name in ("whole.jpg", "whole.png")}
    bad = {"text.jpg": b"hello", "empty.png": b"", "record.jpg": json.dumps(ROWS).encode()}
    bad |= {"cut.jpg": whole["whole.jpg"][:-200], "cut.png": whole["whole.png"][:-60]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)
    for absent in ("absent.jpg", "."):
        with pytest.raises(ValueError, match="cannot read image"):
            open_image(tmp_path / absent)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="bytes, more than 10"):
        open_image(tmp_path / "whole.png")


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bomb.png has more than 178956970 pixels"):
            open_image(tmp_path / "bomb.png")
