"""Images are found by the names that annotation files give them, also those of other systems."""

import unicodedata

from beit3.data.prepare.formats.caption_tables import read_caption_tables
from beit3.data.prepare.formats.files import ImageFinder, MissingImagePath
from tests.data.prepare.test_formats import write_files

COMPOSED = unicodedata.normalize("NFC", "café/crème.png")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def test_backslashes_and_folders_in_names(tmp_path):
    raw = write_files(tmp_path, {"images/train/a.png": None, "b.png": None})
    finder = ImageFinder(raw, "images", "")
    expected = str(raw / "images/train/a.png")
    for name in ("train\\a.png", "train/a.png", "images\\train\\a.png", ".\\train\\a.png"):
        assert finder.find(name) == expected, name
    assert finder.find("a.png", folder="images\\train") == expected
    assert finder.find(expected) == expected
    missing = finder.find("C:\\photos\\a.png")
    assert isinstance(missing, MissingImagePath) and "images" in missing.searched


def test_both_unicode_forms_name_an_image(tmp_path):
    for stored, asked in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        raw = write_files(tmp_path / stored.encode().hex(), {f"images/{stored}": None})
        folder, name = asked.split("/")
        expected = str(raw / "images" / stored)
        assert ImageFinder(raw, "images").find(name, folder=folder) == expected
        assert ImageFinder(raw, "images").find(asked) == expected
        assert ImageFinder(raw, f"images/{folder}").find(name) == expected


def test_tables_find_images_by_other_spellings(tmp_path):
    raw = write_files(tmp_path, {f"images/{COMPOSED}": None, "images/a/b.png": None})
    for asked, stored in ((DECOMPOSED, COMPOSED), ("a\\b.png", "a/b.png")):
        table = raw / "all.csv"
        table.write_text(f"image,caption\n{asked},a cat\n", encoding="utf-8")
        ((_, record),) = read_caption_tables(table)
        assert record["image"] == str(raw / "images" / stored)


def test_an_equal_name_comes_before_another_form(tmp_path):
    names = [name.replace("/", "_") for name in (COMPOSED, DECOMPOSED)]
    raw = write_files(tmp_path, dict.fromkeys(names))
    assert [ImageFinder(raw, "").find(name) for name in names] == [str(raw / n) for n in names]
