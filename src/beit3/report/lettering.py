"""Text in drawings: names of labels, percentages, and fonts that have the glyphs for them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

MAX_NAME_LENGTH = 40
"""Characters of a name; longer names are cut."""

FALLBACK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "wqy-zenhei.ttc",
)
"""System fonts for characters that DejaVu Sans, which comes with matplotlib, does not have."""

NONCHARACTER = "\U0010fffe"
"""A code point that no font has, so that its glyph is the box for unknown characters."""


def get_label_name(label: int, class_names: Sequence[str], name: str = "") -> str:
    """Returns `name` or else the label's class name, short enough to be drawn.

    A label without a class name is called by its number, "class 7".
    """
    if not name:
        has_name = 0 <= label < len(class_names)
        name = class_names[label] if has_name else f"class {label}"
    return shorten_name(name)


def shorten_name(name: str) -> str:
    """Returns a name on one line, cut to at most `MAX_NAME_LENGTH` characters."""
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def format_percent(fraction: float) -> str:
    """Returns a fraction as a percentage; a small one is "< 0.1%", never "0.0%"."""
    return f"{fraction:.1%}" if fraction >= 0.001 else "< 0.1%"


def choose_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a font of `size` pixels for a text.

    This is DejaVu Sans, or a font of this system that has glyphs which DejaVu Sans lacks.
    """
    default_file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    default_font = _load_font(str(default_file), size)
    if not lacks_glyphs(default_font, text):
        return default_font
    for file in FALLBACK_FONTS:
        try:
            font = _load_font(file, size)
        except OSError:
            continue
        if not lacks_glyphs(font, text):
            return font
    return default_font


def lacks_glyphs(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Returns whether the font would draw some character as the box for unknown characters."""
    unknown_glyph = bytes(font.getmask(NONCHARACTER))
    characters = [character for character in set(text) if not character.isspace()]
    return any(bytes(font.getmask(character)) == unknown_glyph for character in characters)


@cache
def _load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
