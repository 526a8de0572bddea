"""Images of every accepted format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit3.images import find_header_fault, open_image
from benchmarks.fuzzing.damage import combine, damage_bytes, damage_png
from benchmarks.fuzzing.kinds import Kind


def write_image(format: str, mode: str, **options: object) -> Callable[[Path], Path]:
    """Returns a writer of a small image, smooth with some noise."""

    def write(folder: Path) -> Path:
        y, x = np.mgrid[0:40, 0:56]
        noise = np.random.default_rng(0).integers(0, 20, (40, 56, 3))
        pixels = np.stack([x * 4, y * 5, (x + y) * 2], axis=-1) + noise
        image = Image.fromarray(pixels.astype(np.uint8))
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256)
        elif mode != "RGB":
            image = image.convert(mode)
        path = folder / "intact"
        exif = Image.Exif()
        exif[0x0112] = 6
        settings = dict(options) if format in ("GIF", "BMP", "PPM") else {"exif": exif, **options}
        image.save(path, format, **settings)
        return path

    return write


def read_image(path: Path) -> str:
    """Opens an image by its header and whole."""
    fault = find_header_fault(str(path))
    assert "\n" not in fault, fault
    try:
        pixels = open_image(path)
    except ValueError as error:
        assert "\n" not in str(error) and path.name in str(error), error
        return "refused"
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3, pixels.shape
    assert not fault, f"open_image reads what prepare refuses: {fault}"
    return "read"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jpeg": write_image("JPEG", "RGB"),
    "jpeg progressive": write_image("JPEG", "RGB", progressive=True),
    "jpeg gray": write_image("JPEG", "L"),
    "jpeg cmyk": write_image("JPEG", "CMYK"),
    "png": write_image("PNG", "RGB"),
    "png palette": write_image("PNG", "P"),
    "png 16 bits": write_image("PNG", "I;16"),
    "png alpha": write_image("PNG", "RGBA"),
    "webp": write_image("WEBP", "RGB"),
    "webp lossless": write_image("WEBP", "RGBA", lossless=True),
    "gif": write_image("GIF", "P"),
    "bmp": write_image("BMP", "RGB"),
    "tiff": write_image("TIFF", "RGB"),
    "tiff lzw": write_image("TIFF", "RGB", compression="tiff_lzw"),
    "tiff jpeg": write_image("TIFF", "RGB", compression="jpeg"),
    "ppm": write_image("PPM", "RGB"),
    "jpeg 2000": write_image("JPEG2000", "RGB"),
    "avif": write_image("AVIF", "RGB"),
}

IMAGE_KINDS: dict[str, Kind] = {
    name: Kind(
        write,
        read_image,
        combine(damage_bytes, damage_png) if name.startswith("png") else damage_bytes,
    )
    for name, write in WRITERS.items()
}
