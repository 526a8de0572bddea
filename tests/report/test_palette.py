"""The palette is fixed, and its colors are easy to tell apart."""

import numpy as np

from beit3.report.palette import NUM_COLORS, build_palette, get_color


def convert_to_cielab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB of 0 to 255 to CIE 1976 L*a*b*, by its definition.

    The palette was chosen in another color space. The branch near black is not needed here.
    """
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear_to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    white_point = (0.9505, 1.0, 1.089)
    x, y, z = np.moveaxis(np.cbrt(linear @ linear_to_xyz.T / white_point), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def test_colors_are_fixed_and_repeat_after_the_palette():
    assert len(set(build_palette())) == NUM_COLORS
    assert get_color(3) == get_color(3 + NUM_COLORS) == build_palette()[3]


def test_colors_differ_from_each_other_and_from_black_and_white():
    colors = np.array(build_palette(), int)
    lab = convert_to_cielab(colors[:16])
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 999 * np.eye(16)
    # Measured: 45 and 22. A difference of 2.3 is just noticeable.
    assert distances[:8, :8].min() > 40 and distances.min() > 20
    assert colors.max(1).min() > 90 and colors.min(1).max() < 235
