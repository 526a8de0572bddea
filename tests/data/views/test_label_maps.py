"""Label maps: formats, real files where they are available, and errors that name the file."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3 import images
from beit3.data.views.label_maps import open_label_map, open_labeled_image

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

VALUES = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [7, 7, 0, 255]], dtype=np.uint8)


def find_sample(name):
    if not (DATA / name).exists():
        pytest.skip(f"real sample is not available: {DATA / name}")
    return DATA / name


def write_image(path, values, mode=None):
    image = Image.fromarray(values)
    if mode == "P":
        palette = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8)
        image = Image.fromarray(values, "L").convert("P")
        image.putpalette(palette.tobytes())
    image.save(path)
    return path


def make_chunk(kind, content):
    """Returns a chunk of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def write_png_of_few_bits(path, values, bits):
    """Writes a gray PNG of 1, 2 or 4 bits, which Pillow reads but cannot write."""
    height, width = values.shape
    rows = b""
    for row in values:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        starts = range(0, len(digits), 8)
        rows += b"\0" + bytes(int(digits[start : start + 8], 2) for start in starts)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"".join(make_chunk(kind, content) for kind, content in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P"])
def test_gray_and_palette_files_give_their_values(tmp_path, mode):
    labels = open_label_map(write_image(tmp_path / "a.png", VALUES, mode), num_classes=8)
    assert labels.dtype == torch.uint8 and np.array_equal(labels, VALUES)


def test_sixteen_bits_give_int32(tmp_path):
    values = VALUES.astype(np.uint16) * 200
    path, ignore = write_image(tmp_path / "a.png", values), 255 * 200
    labels = open_label_map(path, num_classes=1401, ignore=ignore)
    assert labels.dtype == torch.int32 and np.array_equal(labels, values)
    with pytest.raises(ValueError, match=r"a\.png holds 1400, beyond its 1400 classes"):
        open_label_map(path, num_classes=1400, ignore=ignore)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_of_few_bits_are_not_scaled(tmp_path, bits):
    """Pillow would make the largest value white."""
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 7))
    path = write_png_of_few_bits(tmp_path / "a.png", values, bits)
    assert np.array_equal(open_label_map(path, num_classes=2**bits), values)


def test_label_maps_inside_a_tar_are_read(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(VALUES).save(buffer, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))
    labels = open_label_map(f"{tmp_path / 'a.tar'}@512+{info.size}", num_classes=8)
    assert np.array_equal(labels, VALUES)


def test_reduce_zero(tmp_path):
    path = write_image(tmp_path / "a.png", VALUES)
    expected = np.array([[255, 0, 1, 2], [2, 1, 0, 255], [6, 6, 255, 255]])
    assert np.array_equal(open_label_map(path, num_classes=7, reduce_zero=True), expected)
    with pytest.raises(ValueError, match=r"a\.png holds 7, beyond its 6 classes from 1 on"):
        open_label_map(path, num_classes=6, reduce_zero=True)


def test_unlabeled_values_are_ignored(tmp_path):
    path = write_image(tmp_path / "a.png", VALUES)
    expected = np.where(VALUES == 7, 255, VALUES)
    assert np.array_equal(open_label_map(path, num_classes=4, unlabeled=(7,)), expected)
    with pytest.raises(ValueError, match="holds 7, beyond its 4 classes"):
        open_label_map(path, num_classes=4)
    with pytest.raises(ValueError, match="255 for ignored pixels is one of the 300"):
        open_label_map(path, num_classes=300)


def test_files_that_are_no_label_maps_are_named(tmp_path):
    write_image(tmp_path / "colors.png", np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "text.png").write_text("no image")
    intact = write_image(tmp_path / "intact.png", np.tile(VALUES, (50, 50))).read_bytes()
    (tmp_path / "truncated.png").write_bytes(intact[: len(intact) // 2])
    messages = {
        "colors.png": "mode RGB",
        "text.png": "not an image of a known format",
        "truncated.png": "cannot",
        "absent.png": "No such",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as error:
            open_label_map(tmp_path / name, num_classes=8)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_too_large_are_named(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", VALUES)
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    with pytest.raises(ValueError, match=r"a\.png has more than 11 pixels"):
        open_label_map(path, num_classes=8)
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.png has \d+ bytes, more than 10"):
        open_label_map(path, num_classes=8)


def test_pairs_of_different_sizes_are_named(tmp_path):
    path = write_image(tmp_path / "labels.png", VALUES)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    image, labels = open_labeled_image(tmp_path / "a.png", path, num_classes=8)
    assert image.shape == (3, 3, 4) and labels.shape == (3, 4)
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"labels\.png is 4 x 3, its image .*a\.png 3 x 4"):
        open_labeled_image(tmp_path / "a.png", path, num_classes=8)


# Real datasets --------------------------------------------------------------------------------


def test_ade20k_label_maps():
    directory = find_sample("ade20k_sample")
    for path in sorted((directory / "annotations" / "validation").iterdir()):
        image = directory / "images" / "validation" / f"{path.stem}.jpg"
        _, labels = open_labeled_image(image, path, num_classes=150, reduce_zero=True)
        values = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(labels, np.where(values == 0, 255, values - 1))


def test_camvid_label_maps():
    directory = find_sample("camvid_mini")
    for path in sorted((directory / "valannot").iterdir())[:5]:
        image = directory / "val" / f"{path.stem}.jpg"
        _, labels = open_labeled_image(image, path, num_classes=11, unlabeled=(11,))
        values = np.asarray(Image.open(path))
        assert np.array_equal(labels, np.where(values == 11, 255, values))
        with pytest.raises(ValueError, match=f"{path.name} holds 11"):
            open_label_map(path, num_classes=11)
