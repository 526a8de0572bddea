"""Images of every format equal Pillow's; members of tars; errors that name the file."""

import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3 import images
from beit3.files import format_tar_member
from beit3.images import find_header_fault, open_image, read_upright_size


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Returns a smooth image, uint8 [20, 30, 3]."""
    y, x = np.mgrid[0:20, 0:30]
    return np.stack([x * 8, y * 12, (x + y) * 5], axis=-1).astype(np.uint8)


def read_pixels(path: str | Path) -> np.ndarray:
    """Returns the pixels that `open_image` reads, int [H, W, 3]."""
    tensor = open_image(path)
    assert tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy().astype(int)


def read_with_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tolerance", [("a.png", 0), ("a.jpg", 3), ("a.webp", 0), ("a.bmp", 0), ("a.tiff", 0)]
)
def test_formats_equal_pillow(photo, tmp_path, name, tolerance):
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(photo).save(tmp_path / name, **options)
    difference = read_pixels(tmp_path / name) - read_with_pillow(tmp_path / name)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    "name",
    ["L.png", "L.jpg", "P.png", "P.gif", "1.png", "LA.png", "RGBA.png", "RGBA.webp", "CMYK.jpg"],
)
def test_modes_equal_pillow(photo, tmp_path, name):
    Image.fromarray(photo).convert(name.partition(".")[0]).save(tmp_path / name)
    difference = read_pixels(tmp_path / name) - read_with_pillow(tmp_path / name)
    assert np.abs(difference).max() <= 2


def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path):
    gray = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert (read_pixels(tmp_path / "a.png") == (gray >> 8)[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_upright(photo, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(photo).save(path, exif=exif, **options)
    # EXIF 1 to 8: as is, flipped, half turn, upside down, transposed, right turn, transverse,
    # left turn.
    quarter_turns = {1: 0, 2: 2, 3: 2, 4: 0, 5: 0, 6: -1, 7: 2, 8: 1}[orientation]
    expected = np.rot90(photo, quarter_turns)
    if orientation in (2, 4):
        expected = np.flipud(expected)
    if orientation in (5, 7):
        expected = expected.transpose(1, 0, 2)
    pixels = read_pixels(path)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(int)).mean() < 4
    with Image.open(path) as header:
        assert read_upright_size(header) == (pixels.shape[1], pixels.shape[0])


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_pixels(tmp_path / "a.gif") == [255, 0, 0]).all()


def test_relative_paths_may_leave_the_root(photo, tmp_path):
    (tmp_path / "root").mkdir()
    Image.fromarray(photo).save(tmp_path / "a.png")
    assert open_image(tmp_path / "root" / "../a.png").shape == (3, 20, 30)


# Members of tars ----------------------------------------------------------------------------------


def write_tar(path: Path, files: list[Path]) -> dict[str, str]:
    """Writes files to a tar; returns file name -> path of the member."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)
    with tarfile.open(path) as tar:
        return {
            member.name: format_tar_member(path, member.offset_data, member.size) for member in tar
        }


def test_members_of_tars_are_read_as_files_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    files = [tmp_path / name for name in ("0.png", "1.jpg", "2.gif")]
    for file in files:
        Image.fromarray(noise).save(file)
    members = write_tar(tmp_path / "x.tar", files)
    for file in files:
        assert torch.equal(open_image(members[file.name]), open_image(file))


def test_unreadable_members_of_tars_are_named(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "0.png")
    tar = tmp_path / "x.tar"
    write_tar(tar, [tmp_path / "0.png"])
    size = tar.stat().st_size
    messages = {
        format_tar_member(tar, 512, 1 << 40): "more than",
        format_tar_member(tar, size - 10, 100): "ends before byte",
        format_tar_member(tar, 10**17, 5): "ends before",
        format_tar_member(tar, 0, 512): "not an image",
        format_tar_member(tmp_path / "no.tar", 0, 9): "cannot read image",
    }
    for member, message in messages.items():
        with pytest.raises(ValueError, match=message) as error:
            open_image(member)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# Faults -------------------------------------------------------------------------------------------


def test_unreadable_files_are_named(photo, tmp_path, monkeypatch):
    intact = {}
    for name in ("intact.jpg", "intact.png"):
        Image.fromarray(photo).save(tmp_path / name)
        intact[name] = (tmp_path / name).read_bytes()
    contents = {
        "text.jpg": b"hello",
        "empty.png": b"",
        "record.jpg": b'[{"id": "0"}]',
        "truncated.jpg": intact["intact.jpg"][:-200],
        "truncated.png": intact["intact.png"][:-60],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)
    for absent in ("absent.jpg", "."):
        with pytest.raises(ValueError, match="cannot read image"):
            open_image(tmp_path / absent)
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="bytes, more than 10"):
        open_image(tmp_path / "intact.png")


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"bomb\.png has more than 178956970 pixels"):
            open_image(tmp_path / "bomb.png")


def test_malformed_headers_are_named_without_decoding(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    assert find_header_fault(path) == find_header_fault(path, (30, 20)) == ""
    assert find_header_fault(path, (20, 30)).startswith("has 30 x 20 pixels, its annotations are")
    (tmp_path / "text.png").write_text("hello")
    assert find_header_fault(str(tmp_path / "text.png")).startswith("cannot be read (")
