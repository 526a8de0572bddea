"""Images of every format equal Pillow's; members of tars; errors that name the file."""

import io
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3 import images
from beit3.files import format_tar_member
from beit3.images import find_header_fault, open_image, read_upright_size
from benchmarks.fuzz import IMAGE_KINDS, fuzz


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


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """Writes uint8 or uint16 [H, W, C] as a PNG of that depth; Pillow writes no 16-bit colors."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, color_type, 0, 0, 0)
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = zlib.crc32(name + data)
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_give_what_eight_give(tmp_path, channels):
    eight = np.random.default_rng(0).integers(0, 256, (9, 14, channels), dtype=np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, eight.shape, dtype=np.uint16)
    sixteen = eight.astype(np.uint16) * 256 + noise
    expected = read_pixels(write_png(tmp_path / "8.png", eight))
    assert np.array_equal(read_pixels(write_png(tmp_path / "16.png", sixteen)), expected)
    colors = eight[:, :, :1] if channels < 3 else eight[:, :, :3]
    assert np.array_equal(expected, np.broadcast_to(colors, expected.shape))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_of_sixteen_bits_of_gray_the_upper_eight_are_kept(tmp_path, suffix):
    gray = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    options = {"irreversible": False} if suffix == "jp2" else {}
    Image.fromarray(gray).save(tmp_path / f"a.{suffix}", **options)
    assert (read_pixels(tmp_path / f"a.{suffix}") == (gray >> 8)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    image = Image.fromarray(np.full((4, 5), 0.5).astype(dtype))
    image.save(tmp_path / "a.tiff")
    for source in (tmp_path / "a.tiff", image):
        with pytest.raises(ValueError, match="range is not known: save it with 8 bits"):
            open_image(source)
    assert "range is not known" in find_header_fault(str(tmp_path / "a.tiff"))


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


# Inputs other than files ----------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_pixels(photo, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo).save(path)
    expected = open_image(path)
    rgba = np.concatenate([photo, photo[:, :, :1]], axis=2)
    inputs = [str(path), path.read_bytes(), Image.fromarray(photo), photo, rgba, expected.clone()]
    with path.open("rb") as file:
        inputs.append(io.BytesIO(file.read()))
    for image in inputs:
        assert torch.equal(open_image(image), expected), type(image)
    gray = photo[:, :, 0]
    for image in (gray, gray[:, :, None], torch.from_numpy(gray)[None], Image.fromarray(gray)):
        assert torch.equal(open_image(image), torch.from_numpy(gray).expand(3, -1, -1))


def test_arrays_and_tensors_are_copied(photo):
    array, tensor = photo.copy(), torch.from_numpy(photo.copy()).permute(2, 0, 1)
    opened = open_image(array), open_image(tensor)
    array[:], tensor[:] = 0, 0
    assert all((image.permute(1, 2, 0).numpy() == photo).all() for image in opened)


def test_inputs_that_are_no_images_are_refused(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-30])
    faults = {
        "cannot be a NoneType": None,
        "cannot be a float64 array": np.zeros((4, 4, 3)),
        r"uint8 array \[4, 4, 5\]": np.zeros((4, 4, 5), np.uint8),
        r"array \[0, 4, 3\] is empty": np.zeros((0, 4, 3), np.uint8),
        "cannot be a torch.float32 tensor": torch.zeros(3, 4, 4),
        r"tensor \[4, 4, 3\]": torch.zeros(4, 4, 3, dtype=torch.uint8),
        r"tensor \[3, 0, 4\] is empty": torch.zeros(3, 0, 4, dtype=torch.uint8),
        "Pillow image of mode RGB is empty": Image.new("RGB", (0, 0)),
        r"Pillow image .*cut\.jpg cannot be read": Image.open(tmp_path / "cut.jpg"),
        "image of 5 bytes is not an image": b"hello",
    }
    for message, image in faults.items():
        with pytest.raises(ValueError, match=message):
            open_image(image)


# Members of tars ------------------------------------------------------------------------------


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
        format_tar_member(tar, 0, 512): "not an image of a known format",
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"cannot read image .*a\.jpg: it is not a file"):
        open_image(tmp_path / "a.jpg")
    assert find_header_fault(str(tmp_path / "a.jpg")).endswith("it is not a file")


def test_formats_that_run_programs_are_refused(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"a\.eps is a document: export its pages"):
        open_image(tmp_path / "a.eps")


def test_damaged_exif_data_leave_an_image_as_it_is(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    assert open_image(tmp_path / "a.jpg").shape == (3, 20, 30)
    assert find_header_fault(str(tmp_path / "a.jpg"), (30, 20)) == ""


def test_no_damage_crashes_the_process():
    """300 damaged files of each format, read by another process; benchmarks/fuzz.py has more."""
    outcomes = fuzz(list(IMAGE_KINDS), 300)
    assert not [fault for found in outcomes.values() for fault in found.faults]
    for name, found in outcomes.items():
        assert found.counts.total() == 300, name
        assert found.counts["refused"] > 50, name  # the damage reaches the decoders


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
    assert find_header_fault(str(tmp_path / "text.png")).startswith("is not an image of a known")
