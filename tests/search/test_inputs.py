"""What `beit3 embed` reads: folders, lists, tables, tar files, Parquet, key frames of videos."""

import io
import os
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from beit3.images import open_image
from beit3.search.input_tables import infer_type, read_bytes, read_image
from beit3.search.inputs import InputOptions, Items, list_items
from tests.search.embed_inputs import write_images


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", 6)


def get_column(items: Items, name: str) -> list:
    return items.table[name].to_pylist()


def check_readable(items: Items) -> None:
    """Checks that every item's path leads to an image."""
    for path in items.list_paths():
        assert open_image(read_image(path)).shape[0] == 3
        assert read_bytes(path)


# Folders and lists --------------------------------------------------------------------------------


def test_a_folder_is_searched_to_any_depth(images):
    (images / "deep" / "er").mkdir(parents=True)
    (images / "0" / "0000.png").rename(images / "deep" / "er" / "PHOTO.PNG")
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_bytes(b"")
    items = list_items([images])
    assert get_column(items, "id") == [
        "0/0002.png",
        "0/0004.png",
        "1/0001.png",
        "1/0003.png",
        "1/0005.png",
        "deep/er/PHOTO.PNG",
    ]
    assert items.root == str(images) and not items.has_captions
    check_readable(items)


def test_several_inputs_share_a_root(images, tmp_path):
    write_images(tmp_path / "more", 2)
    items = list_items([images, tmp_path / "more"])
    assert len(items) == 8 and items.root == str(tmp_path)
    assert get_column(items, "id")[-1] == "more/1/0001.png"
    check_readable(items)


def test_an_image_that_is_named_twice(images):
    with pytest.raises(ValueError, match=r"0000.png is named twice: name it once, or give"):
        list_items([images, images])


def test_a_single_image_is_no_list(images):
    with pytest.raises(ValueError, match=r"0000.png is one image: give its folder, or a list"):
        list_items([images / "0" / "0000.png"])


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
def test_names_that_no_table_can_hold_are_faults(images):
    with open(os.fsencode(images) + b"/bad\xff.png", "wb") as file:
        file.write((images / "0" / "0000.png").read_bytes())
    items = list_items([images])
    assert len(items) == 6
    assert items.faults == [(r"bad\xff.png", "the name is not UTF-8: rename the file")]


def test_a_list_of_paths(images, tmp_path):
    (images / "list.txt").write_text(f"1/0001.png\n\n{images}/0/0000.png\nabsent.png\n")
    items = list_items([images / "list.txt"])
    assert get_column(items, "id") == ["1/0001.png", "0/0000.png", "absent.png"]
    (tmp_path / "list.txt").write_text("1/0001.png\n")
    items = list_items([tmp_path / "list.txt"], InputOptions(image_root=str(images)))
    assert get_column(items, "id") == ["1/0001.png"]
    check_readable(items)


def test_images_outside_the_folder_of_a_list(images, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("../images/0/0000.png\n../images/1/0001.png\n")
    items = list_items([tmp_path / "lists" / "list.txt"])
    assert items.root == str(images)
    assert get_column(items, "image_path") == ["0/0000.png", "1/0001.png"]


# Tables -------------------------------------------------------------------------------------------


def test_a_table_keeps_ids_captions_and_columns(images):
    table = images / "t.tsv"
    table.write_text(
        "id\tfilepath\ttitle\tyear\n7\t0/0000.png\ta dog\t1999\n8\t1/0001.png\t\t2001\n"
    )
    items = list_items([table])
    assert items.table.to_pydict() == {
        "id": ["7", "8"],
        "image_path": ["0/0000.png", "1/0001.png"],
        "caption": ["a dog", None],
        "year": [1999, 2001],
    }
    assert items.table.schema.field("year").type == pa.int64()


def test_columns_can_be_named(images):
    table = images / "t.csv"
    table.write_text("key,photo,vi\na,0/0000.png,con mèo\n")
    options = InputOptions(image_column="photo", caption_column="VI", id_column="key")
    items = list_items([table], options)
    assert items.table.to_pydict() == {
        "id": ["a"],
        "image_path": ["0/0000.png"],
        "caption": ["con mèo"],
    }


def test_json_lines_keep_their_types(images):
    (images / "t.jsonl").write_text(
        '{"image": "0/0000.png", "n": 1, "tags": ["a"]}\n{"image": "1/0001.png", "x": 2.5}\n'
    )
    items = list_items([images / "t.jsonl"])
    assert get_column(items, "n") == [1, None] and get_column(items, "x") == [None, 2.5]
    (images / "t.jsonl").write_text('{"image": "a.png", "n": 1}\n{"image": "b.png", "n": "x"}\n')
    with pytest.raises(ValueError, match="column n mixes values of several types"):
        list_items([images / "t.jsonl"])


def test_flickr8k_captions_are_a_table(images):
    (images / "captions.txt").write_text("image,caption\n0/0000.png,a dog\n")
    assert get_column(list_items([images / "captions.txt"]), "caption") == ["a dog"]


def test_ragged_rows_and_rows_without_image_are_faults(images):
    (images / "t.csv").write_text("image,year\n0/0000.png,1\n1/0001.png\n,3\n")
    items = list_items([images / "t.csv"])
    assert len(items) == 1
    assert [reason for _, reason in items.faults] == ["1 cells for 2 columns", "it has no image"]


def test_own_columns_win_over_those_of_a_table(images):
    (images / "t.csv").write_text("image,hash,size\n0/0000.png,abc,3\n")
    items = list_items([images / "t.csv"])
    assert get_column(items, "table_hash") == ["abc"] and get_column(items, "table_size") == [3]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "", "-20"], [1, None, -20]),
        (["1.5", "2"], [1.5, 2.0]),
        (["007", "12"], ["007", "12"]),
        (["true", "False"], [True, False]),
        (["a", ""], ["a", None]),
        (["", ""], [None, None]),
        (["1e3", "nan"], ["1e3", "nan"]),
    ],
)
def test_types_of_cells(cells, values):
    assert infer_type(cells).to_pylist() == values


def test_double_ids_are_named(images):
    (images / "t.csv").write_text("id,image\na,0/0000.png\na,1/0001.png\n")
    with pytest.raises(ValueError, match="two items have the id 'a'"):
        list_items([images / "t.csv"])
    (images / "t.csv").write_text("image,caption\n0/0000.png,x\n0/0000.png,y\n")
    with pytest.raises(ValueError, match="0/0000.png is named twice.*in a column id"):
        list_items([images / "t.csv"])


def test_faults_of_tables(images):
    cases = {
        "year,city\n1,Hue\n": "has the columns year, city: name one image",
        "url,caption\nhttp://a/b.jpg,x\n": "names images by url",
        "image\n": "has no rows",
        "image,a,a\nx.png,1,2\n": "has two columns 'a'",
    }
    for text, message in cases.items():
        (images / "t.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            list_items([images / "t.csv"])
    (images / "t.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match="is no Parquet file, or damaged"):
        list_items([images / "t.parquet"])


# Tar files and Parquet ----------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tars_hold_images_with_and_without_captions(images, tmp_path):
    first, second = ((images / name).read_bytes() for name in ("0/0000.png", "1/0001.png"))
    write_tar(tmp_path / "a.tar", {"1.png": first, "1.txt": b"a dog", "2.png": second})
    (tmp_path / "sub").mkdir()
    write_tar(
        tmp_path / "sub" / "b.tar",
        {"1.png": second, "1.json": b'{"caption": "a cat"}', "3.txt": b"alone", "4.png": b"no"},
    )
    (images / "0" / "0000.png").unlink()
    items = list_items([tmp_path / "a.tar", tmp_path / "sub" / "b.tar"])
    assert get_column(items, "id") == ["a/1", "a/2", "b/1"]
    assert get_column(items, "caption") == ["a dog", None, "a cat"]
    assert [name for name, _ in items.faults] == ["b/3", "b/4"]
    check_readable(items)
    assert read_bytes(items.list_paths()[0]) == first


def test_a_cut_tar_is_a_fault(images, tmp_path):
    image = (images / "0" / "0000.png").read_bytes()
    write_tar(tmp_path / "a.tar", {f"{n}.png": image for n in range(4)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:2200])
    items = list_items([tmp_path / "a.tar"])
    assert 1 <= len(items) < 4 and "is cut or damaged" in items.faults[0][1]
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="decompress it first"):
        list_items([tmp_path / "b.tar.gz"])


@pytest.mark.parametrize("is_struct", [True, False])
def test_parquet_holds_images_or_paths(images, tmp_path, is_struct):
    names = [f"{n % 2}/{n:04}.png" for n in range(6)]
    contents = [(images / name).read_bytes() for name in names]
    column: list = contents
    if is_struct:
        column = [{"bytes": content, "path": None} for content in contents]
        column[5] = {"bytes": None, "path": "images/1/0005.png"}
    pq.write_table(
        pa.table({"image": column, "year": list(range(6))}),
        tmp_path / "t.parquet",
        row_group_size=4,
    )
    items = list_items([tmp_path / "t.parquet"])
    assert get_column(items, "year") == list(range(6))
    assert get_column(items, "image_path")[1] == "t.parquet@image+1"
    assert [read_bytes(path) for path in items.list_paths()] == contents
    check_readable(items)
    pixels = open_image(read_image(items.list_paths()[4]))
    assert torch.equal(pixels, open_image(images / names[4]))


def test_parquet_with_paths(images):
    pq.write_table(pa.table({"image_path": ["0/0000.png"], "n": [1]}), images / "t.parquet")
    items = list_items([images / "t.parquet"])
    assert get_column(items, "image_path") == ["0/0000.png"]
    check_readable(items)


# Key frames of videos -----------------------------------------------------------------------------


def test_key_frames_in_folders(images):
    (images / "0").rename(images / "L01_V001")
    (images / "1").rename(images / "L01_V002")
    (images / "L01_V001" / "0004.png").rename(images / "L01_V001" / "frame-250.png")
    items = list_items([images], InputOptions(fps=25.0))
    assert get_column(items, "video") == ["L01_V001"] * 3 + ["L01_V002"] * 3
    assert get_column(items, "frame") == [0, 2, 250, 1, 3, 5]
    assert get_column(items, "time")[1] == 2 / 25
    assert "time" not in list_items([images], InputOptions(frames=True)).table.column_names


def test_key_frames_in_a_table(images):
    (images / "t.csv").write_text("image,video,frame\n0/0000.png,V1,50\n1/0001.png,V1,75\n")
    items = list_items([images / "t.csv"], InputOptions(fps=25.0))
    assert get_column(items, "frame") == [50, 75] and get_column(items, "time") == [2.0, 3.0]
    (images / "t.csv").write_text("image,video,frame,time\n0/0000.png,V1,50,9.5\n")
    assert get_column(list_items([images / "t.csv"], InputOptions(fps=25.0)), "time") == [9.5]


def test_what_names_no_frame(images, tmp_path):
    (images / "0" / "0000.png").rename(images / "cover.png")
    with pytest.raises(ValueError, match="cover.png names no frame of a video"):
        list_items([images], InputOptions(frames=True))
