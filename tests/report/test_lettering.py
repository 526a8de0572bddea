"""Names are short, percentages readable, and fonts have the glyphs that a text needs."""

from beit3.report.lettering import (
    choose_font,
    format_percent,
    get_label_name,
    lacks_glyphs,
    shorten_name,
)


def test_labels_without_a_name_are_called_by_number():
    assert get_label_name(1, ["cat", "dog"]) == "dog"
    assert get_label_name(1, ["cat", "dog"], "wolf") == "wolf"
    assert get_label_name(2, ["cat", "dog"]) == "class 2" and get_label_name(-1, []) == "class -1"


def test_long_names_are_cut_and_put_on_one_line():
    assert shorten_name("a" * 41) == "a" * 39 + "…" and shorten_name("a" * 40) == "a" * 40
    assert shorten_name("a\n b") == "a b"


def test_a_small_percentage_is_never_zero():
    texts = [format_percent(fraction) for fraction in (0.25, 0.001, 0.0004, 0.0)]
    assert texts == ["25.0%", "0.1%", "< 0.1%", "< 0.1%"]


def test_fonts_have_letters_beyond_latin():
    assert not lacks_glyphs(choose_font("собака ναι", 13), "собака ναι")
    assert lacks_glyphs(choose_font("a", 13), "\U0010ffff")
