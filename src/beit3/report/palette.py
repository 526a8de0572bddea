"""Colors of labels in drawings. A label has the same color everywhere."""

from functools import cache

import numpy as np

Color = tuple[int, int, int]
"""Red, green and blue, each 0 to 255."""

NUM_COLORS = 256
"""Colors in the palette; label 256 has the color of label 0 again."""

FIRST_COLOR = (240, 90, 30)
"""The palette starts with the candidate that is nearest to this orange."""

EDGE_COLOR = (16, 16, 16)
"""Surrounds colored lines, so that they stand out on images of any brightness."""

BACKGROUND_COLOR, TEXT_COLOR = (255, 255, 255), (24, 24, 24)
"""Background and text of a legend."""

MAX_LIGHT_BACKGROUND = 0.62
"""OKLab lightness of a color above which dark text is easier to read on it than white text."""

LINEAR_TO_COLOR_BLIND = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ]
)
"""Linear RGB as seen without the receptors of green (Machado et al., 2009, table 1)."""

LINEAR_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
CONES_TO_LAB = np.array(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)
"""The two matrices of OKLab (Ottosson, 2020)."""


def get_color(label: int) -> Color:
    """Returns the color of a label, which is far from the colors of all smaller labels."""
    return build_palette()[label % NUM_COLORS]


def choose_text_color(background: Color) -> Color:
    """Returns black or white, whichever differs more in lightness from the background color."""
    lightness = _convert_to_oklab(np.array([background], float))[0, 0]
    return EDGE_COLOR if lightness > MAX_LIGHT_BACKGROUND else BACKGROUND_COLOR


@cache
def build_palette() -> tuple[Color, ...]:
    """Returns `NUM_COLORS` colors, each the candidate that is farthest from those before it.

    Distances are measured in OKLab, for normal vision and for red-green color blindness at once.
    Candidates near black, white or gray are left out, since images are full of these colors.
    """
    levels = np.linspace(0, 255, 18).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lightness, *color_axes = _convert_to_oklab(rgb).T
    chroma = np.hypot(*color_axes)
    rgb = rgb[(lightness > 0.5) & (lightness < 0.88) & (chroma > 0.07) & (chroma < 0.24)]
    features = np.concatenate(
        [_convert_to_oklab(rgb), _convert_to_oklab(rgb, color_blind=True)], axis=1
    )
    chosen = [int(np.abs(rgb - FIRST_COLOR).sum(1).argmin())]
    distances = np.full(len(rgb), np.inf)
    for _ in range(NUM_COLORS - 1):
        last_distances = np.linalg.norm(features - features[chosen[-1]], axis=1)
        distances = np.minimum(distances, last_distances)
        chosen.append(int(distances.argmax()))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in rgb[chosen])


def _convert_to_oklab(rgb: np.ndarray, *, color_blind: bool = False) -> np.ndarray:
    """Converts sRGB of 0 to 255 [N, 3] to OKLab [N, 3], optionally as seen by the color-blind."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    if color_blind:
        linear = linear @ LINEAR_TO_COLOR_BLIND.T
    return np.cbrt(linear @ LINEAR_TO_CONES.T) @ CONES_TO_LAB.T
