"""Label files of every kind, real ones where they are at hand; training views against loops, their bounds and seeds."""

import colorsys
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.views.label_maps import (
    SceneView,
    distorted,
    evaluation_size,
    fitted,
    nearest,
    open_label_map,
    open_scene,
    pad,
    resized,
    saturated,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PLAIN = SceneView(
    crop=1000, short=60, long=240, scale=(1.0, 1.0), largest_share=1.0, flip=0.0, distort=False
)


def sample(name):
    if not (DATA / name).exists():
        pytest.skip(f"real sample not at hand: {DATA / name}")
    return DATA / name


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(height=60, width=80, seed=0):
    """A picture whose red says which label a pixel has: blocks of ten pixels, 20 times the label."""
    blocks = torch.from_numpy(rng(seed).integers(0, 5, (-(-height // 10), -(-width // 10))))
    labels = (
        blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)[:height, :width].to(torch.uint8)
    )
    noise = torch.from_numpy(rng(seed).integers(0, 256, (2, height, width))).to(torch.uint8)
    return torch.cat((20 * labels[None], noise)), labels


def view(**settings):
    return SceneView(**{**vars(PLAIN), **settings})


# Files ---------------------------------------------------------------------------------------------------------------


VALUES = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [7, 7, 0, 255]], dtype=np.uint8)


def written(path, values, mode=None):
    picture = Image.fromarray(values)
    if mode == "P":
        picture = Image.fromarray(values, "L").convert("P")
        picture.putpalette(rng().integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)
    return path


def few_bits(path, values, bits):
    """A grey PNG of 1, 2 or 4 bits, which Pillow reads but does not write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("mode", ["L", "P"])
def test_grey_and_palette_files_give_their_numbers(tmp_path, mode):
    labels = open_label_map(written(tmp_path / "a.png", VALUES, mode), num_classes=8)
    assert labels.dtype == torch.uint8 and np.array_equal(labels, VALUES)


def test_sixteen_bits(tmp_path):
    values = VALUES.astype(np.uint16) * 200
    labels = open_label_map(written(tmp_path / "a.png", values), num_classes=1401, ignore=255 * 200)
    assert labels.dtype == torch.int32 and np.array_equal(labels, values)
    with pytest.raises(ValueError, match=r"a\.png holds 1400, beyond its 1400 classes"):
        open_label_map(tmp_path / "a.png", num_classes=1400, ignore=255 * 200)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_not_spread(tmp_path, bits):
    """Pillow makes the largest value white."""
    values = rng().integers(0, 2**bits, (5, 7))
    assert np.array_equal(
        open_label_map(few_bits(tmp_path / "a.png", values, bits), num_classes=2**bits), values
    )


def test_inside_a_tar(tmp_path):
    import tarfile

    picture = io.BytesIO()
    Image.fromarray(VALUES).save(picture, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture.getvalue())
        tar.addfile(info, io.BytesIO(picture.getvalue()))
    labels = open_label_map(f"{tmp_path / 'a.tar'}@512+{info.size}", num_classes=8)
    assert np.array_equal(labels, VALUES)


def test_reduce_zero(tmp_path):
    path = written(tmp_path / "a.png", VALUES)
    expected = np.array([[255, 0, 1, 2], [2, 1, 0, 255], [6, 6, 255, 255]])
    assert np.array_equal(open_label_map(path, num_classes=7, reduce_zero=True), expected)
    with pytest.raises(ValueError, match=r"a\.png holds 7, beyond its 6 classes from 1 on"):
        open_label_map(path, num_classes=6, reduce_zero=True)


def test_values_that_mean_unlabelled(tmp_path):
    path = written(tmp_path / "a.png", VALUES)
    expected = np.where(VALUES == 7, 255, VALUES)
    assert np.array_equal(open_label_map(path, num_classes=4, unlabelled=(7,)), expected)
    with pytest.raises(ValueError, match="holds 7, beyond its 4 classes"):
        open_label_map(path, num_classes=4)
    with pytest.raises(ValueError, match="255 for ignored pixels is one of the 300"):
        open_label_map(path, num_classes=300)


def test_what_is_no_label_file_is_refused_by_name(tmp_path):
    colours = written(tmp_path / "colours.png", np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    whole = written(tmp_path / "whole.png", np.tile(VALUES, (50, 50))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, said in {
        colours.name: "mode RGB",
        "text.png": "cannot",
        "cut.png": "cannot",
        "none.png": "No such",
    }.items():
        with pytest.raises(ValueError, match=said) as fault:
            open_label_map(tmp_path / name, num_classes=8)
        assert name in str(fault.value) and "\n" not in str(fault.value)


def test_limits(tmp_path, monkeypatch):
    path = written(tmp_path / "a.png", VALUES)
    monkeypatch.setattr("beit3.data.views.label_maps.MAX_PIXELS", 11)
    with pytest.raises(ValueError, match=r"a\.png has more than 11 pixels"):
        open_label_map(path, num_classes=8)
    monkeypatch.setattr("beit3.data.views.label_maps.MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.png cannot be read: it has more than 10 bytes"):
        open_label_map(path, num_classes=8)


def test_pairs_of_two_sizes_are_refused_by_name(tmp_path):
    written(tmp_path / "labels.png", VALUES)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    image, labels = open_scene(tmp_path / "a.png", tmp_path / "labels.png", num_classes=8)
    assert image.shape == (3, 3, 4) and labels.shape == (3, 4)
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"labels\.png is 4 x 3, its image .*a\.png 3 x 4"):
        open_scene(tmp_path / "a.png", tmp_path / "labels.png", num_classes=8)


def test_ade20k():
    folder = sample("ade20k_sample")
    for path in sorted((folder / "annotations" / "validation").iterdir()):
        picture = folder / "images" / "validation" / f"{path.stem}.jpg"
        _, labels = open_scene(picture, path, num_classes=150, reduce_zero=True)
        raw = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(labels, np.where(raw == 0, 255, raw - 1))


def test_camvid():
    folder = sample("camvid_mini")
    for path in sorted((folder / "valannot").iterdir())[:5]:
        _, labels = open_scene(
            folder / "val" / f"{path.stem}.jpg", path, num_classes=11, unlabelled=(11,)
        )
        raw = np.asarray(Image.open(path))
        assert np.array_equal(labels, np.where(raw == 11, 255, raw))
        with pytest.raises(ValueError, match=f"{path.name} holds 11"):
            open_label_map(path, num_classes=11)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, expected",
    [
        ((512, 683), (896, 1195)),
        ((683, 512), (1195, 896)),
        ((100, 1000), (358, 3584)),
        ((896, 896), (896, 896)),
    ],
)
def test_the_shorter_side_fits_unless_the_longer_is_too_long(size, expected):
    assert fitted(*size, short=896, long=3584) == expected
    tall, wide = evaluation_size(*size, short=896, long=3584, multiple=32)
    assert (
        tall % 32 == wide % 32 == 0
        and 0 <= tall - expected[0] < 32
        and 0 <= wide - expected[1] < 32
    )


@pytest.mark.parametrize("size", [(60, 80), (30, 200), (121, 97), (1, 1)])
def test_nearest_takes_the_middle(size):
    _, labels = scene()
    found = nearest(labels, *size)
    for row in range(0, size[0], 7):
        for column in range(0, size[1], 7):
            assert (
                found[row, column]
                == labels[int((row + 0.5) * 60 / size[0]), int((column + 0.5) * 80 / size[1])]
            )


# Views ---------------------------------------------------------------------------------------------------------------


def test_nothing_asked_nothing_done():
    image, labels = scene()
    found = PLAIN(image, labels, rng())
    assert torch.equal(found[0], image) and torch.equal(found[1], labels)


@pytest.mark.parametrize("seed", range(6))
def test_pixels_and_labels_stay_together(seed):
    """Scaled, cropped and mirrored, red still says the label, but at the blocks' rims, where it is blended."""
    image, labels = scene(seed=seed)
    found, theirs = view(scale=(0.8, 2.0), crop=40, flip=0.5)(image, labels, rng(seed))
    assert found.shape[1:] == theirs.shape and max(theirs.shape) <= 40
    agree = ((found[0].float() - 20.0 * theirs).abs() < 3).float().mean()
    assert agree > 0.7


def test_every_crop_and_both_sides_come():
    image = torch.arange(12, dtype=torch.uint8).expand(3, 12, 12).contiguous()
    labels = image[0]
    firsts = set()
    chance = rng()
    for _ in range(200):
        found, _ = view(short=12, long=48, crop=10, flip=0.5)(image, labels, chance)
        firsts.add(tuple(found[0, 0].tolist()))
    ahead = {tuple(range(start, start + 10)) for start in range(3)}
    assert firsts == ahead | {each[::-1] for each in ahead}


def test_scales_fill_their_range():
    image, labels = scene()
    chance = rng()
    heights = [view(scale=(0.5, 2.0))(image, labels, chance)[1].shape[0] for _ in range(100)]
    assert min(heights) >= 30 and max(heights) <= 120 and min(heights) < 36 and max(heights) > 112


def test_crops_of_one_class_are_drawn_anew():
    """Class 1 fills all but the last ten columns; one crop in four shows both, one in eight with enough of class 2."""
    labels = torch.ones(20, 60, dtype=torch.uint8)
    labels[:, 50:] = 2
    image = labels.expand(3, -1, -1).contiguous()
    shares = []
    for share in (0.75, 1.0):
        chance = rng()
        crops = [
            view(short=20, long=80, crop=20, largest_share=share)(image, labels, chance)[1]
            for _ in range(100)
        ]
        shares.append(sum(1 for crop in crops if (crop == 2).any()))
    assert shares[0] > 70 and shares[1] < 40


def test_ignored_pixels_have_no_share():
    """Of 20 columns 12 are ignored, 4 and 4 labelled: no class has three quarters of what is labelled."""
    labels = torch.full((20, 40), 255, dtype=torch.uint8)
    labels[:, 8:12], labels[:, 12:16] = 1, 2
    corner = view(crop=20, largest_share=0.75)
    lefts = {corner.corner(labels, rng(seed), 255)[1] for seed in range(30)}
    # Both classes, and neither above three quarters, are seen from every left up to 10.
    assert lefts <= set(range(11)) and len(lefts) > 6
    nothing = torch.full((20, 40), 255, dtype=torch.uint8)
    assert corner.corner(nothing, rng(), 255)[0] == 0


def test_the_same_seed_gives_the_same_view():
    image, labels = scene()
    before = image.clone(), labels.clone()
    make = view(scale=(0.5, 2.0), crop=32, flip=0.5, distort=True, largest_share=0.75)
    torch.manual_seed(1)
    one = make(image, labels, rng(4))
    torch.manual_seed(2)
    two = make(image, labels, rng(4))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(
        one[0], make(image, labels, rng(5))[0][..., : one[0].shape[1], : one[0].shape[2]]
    )
    assert torch.equal(image, before[0]) and torch.equal(labels, before[1]), (
        "inputs stay as they are"
    )


def test_pad():
    pixels, labels = torch.randn(3, 5, 8), torch.ones(5, 8, dtype=torch.uint8)
    found, theirs = pad(pixels, labels, 9)
    assert found.shape == (3, 9, 9) and theirs.shape == (9, 9) and theirs.dtype == torch.uint8
    assert (
        torch.equal(found[:, :5, :8], pixels)
        and not found[:, 5:].any()
        and not found[..., 8:].any()
    )
    assert (
        (theirs[:5, :8] == 1).all() and (theirs[5:] == 255).all() and (theirs[:, 8:] == 255).all()
    )
    assert (pad(pixels, labels.int(), 9, ignore=65535)[1][5:] == 65535).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 40.0])
def test_saturation_keeps_hue_and_value(factor):
    pixels = torch.from_numpy(rng().integers(0, 256, (3, 4, 5))).float()
    pixels[:, 0, 0] = torch.tensor([9.0, 9.0, 9.0])
    pixels[:, 0, 1] = 0.0
    found = saturated(pixels, factor)
    for row in range(4):
        for column in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, row, column] / 255).tolist())
            expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            torch.testing.assert_close(
                found[:, row, column] / 255, torch.tensor(expected), atol=1e-5, rtol=0
            )


def test_distortion_changes_colours_and_no_shape():
    image = resized(scene()[0], 30, 40)
    seen = [distorted(image, rng(seed)) for seed in range(24)]
    assert all(each.dtype == torch.uint8 and each.shape == image.shape for each in seen)
    assert len({each.numpy().tobytes() for each in seen}) > 18
    assert any(
        torch.equal(each, image) for each in (distorted(image, rng(seed)) for seed in range(200))
    ), "all four are left out at times"


def test_distortion_of_grey_is_brightness_and_contrast():
    """Grey has no saturation and no hue; every value v becomes (v + b) * c or v * c + ... within their bounds."""
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [int(distorted(grey, rng(seed))[0, 0, 0]) for seed in range(300)]
    assert min(values) >= 0.5 * 68 - 1 and max(values) <= 1.5 * 132 + 1
    assert min(values) < 45 and max(values) > 170
