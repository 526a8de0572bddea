"""Delimited text: no row is lost to a quote, whatever the file's delimiter, encoding or lines."""

import random
from pathlib import Path

import pytest

from beit3.data.prepare.formats.delimited import MAX_ROW_LINES, open_table
from beit3.data.prepare.formats.detect import read_pairs
from beit3.data.prepare.splits import write_splits
from tests.data.prepare.test_formats import assert_refused, write_files

NUM_ROWS = 300
ORDERS = [("image", "text", "split"), ("text", "image", "split"), ("split", "image", "text")]


def write_table(path: Path, texts: dict[int, str], columns: tuple[str, ...], sep: str) -> Path:
    """Writes a table of `NUM_ROWS` captions, of which some are given."""
    lines = [sep.join(columns)]
    for k in range(NUM_ROWS):
        cells = {"image": f"{k}.png", "text": texts.get(k, f"cat {k}"), "split": "train"}
        lines.append(sep.join(cells[column] for column in columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_all_texts(table: Path) -> list[str]:
    return [record["text"] for _, record in read_pairs(table)]


@pytest.mark.parametrize("columns", ORDERS)
@pytest.mark.parametrize(
    "texts",
    [{10: '"half'}, {10: '"half', 200: '"Stop" on a sign'}, {10: '12" of', 11: '"', 12: '""'}],
)
def test_quotes_in_a_tsv_are_text(tmp_path, columns, texts):
    table = write_table(tmp_path / "a.tsv", texts, columns, "\t")
    expected = [texts.get(k, f"cat {k}") for k in range(NUM_ROWS)]
    assert read_all_texts(table) == expected


@pytest.mark.parametrize("columns", ORDERS)
@pytest.mark.parametrize("sep", [",", ";", "\t"])
@pytest.mark.parametrize(
    "texts",
    [
        {10: '"half'},
        {10: '"half', 11: 'cat"'},
        {10: '"half', 12: '"'},
        {10: '"half', 12: '"Stop" on a sign'},
        {10: '"half', 200: 'cat"'},
    ],
)
def test_a_quote_that_takes_in_rows_of_a_csv_is_an_error_that_names_its_line(
    tmp_path, columns, sep, texts
):
    table = write_table(tmp_path / "a.csv", texts, columns, sep)
    assert_refused(read_pairs, table, "a.csv line 12 opens a quote", "check its quotes")


def test_the_last_quote_of_a_csv_is_found_too(tmp_path):
    table = write_table(tmp_path / "a.csv", {NUM_ROWS - 1: '"half'}, ORDERS[0], ",")
    assert_refused(read_pairs, table, f"line {NUM_ROWS + 1} opens a quote that is not closed")


@pytest.mark.parametrize("columns", ORDERS)
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_quoted_cells_of_a_few_lines_and_misquoted_ones_are_kept(tmp_path, columns, sep):
    texts = {
        3: f'"two{sep} x\nlines; y, z\nthree"',
        5: '"a ""red"" dog"',
        7: '"Stop" on a sign',
        9: '12" of snow',
    }
    table = write_table(tmp_path / "a.csv", texts, columns, sep)
    read = read_all_texts(table)
    assert len(read) == NUM_ROWS
    assert [read[k] for k in texts] == [
        f"two{sep} x\nlines; y, z\nthree",
        'a "red" dog',
        '"Stop" on a sign',
        '12" of snow',
    ]


def test_a_cell_has_at_most_so_many_lines(tmp_path):
    for num_lines in (MAX_ROW_LINES, MAX_ROW_LINES + 1):
        text = '"' + "\n".join("x" * num_lines) + '"'
        table = write_table(tmp_path / "a.csv", {2: text}, ORDERS[0], ",")
        if num_lines <= MAX_ROW_LINES:
            assert len(read_all_texts(table)) == NUM_ROWS
        else:
            assert_refused(read_pairs, table, "a.csv line 4", f"within {MAX_ROW_LINES} lines")


LINES = "\n".join(f"line {k}, and more" for k in range(22))


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image,text", '000123,"line one\nline two, comma"'),
        ("image,text", '000123,"kitten, one\nkitten, two"'),
        ("text,image", '"line one, a\nline two, comma",000123'),
        ("image,text,split", '000123,"one, a\ntwo, b",train'),
        ("image,text", 'a.png,"see also\nb.png"'),
        ("image,text", 'a.png,"seen from\nleft, b.png"'),
        ("text,image", '"two\nof b.png",a.png'),
        ("image,text", f'a.png,"{LINES}"'),
        ("image,text", f'007,"{LINES}"'),
        ("image,text", f'a.png,"{"word " * 40_000}"'),
    ],
)
def test_cells_that_are_quoted_well_are_read_however_long_they_are(tmp_path, header, row):
    write_files(tmp_path, {"a.csv": f"{header}\n{row}\n{row}\n"})
    rows = list(open_table(tmp_path / "a.csv").rows)
    assert len(rows) == 2 and rows[0].cells == rows[1].cells
    quoted = row.split('"')[1].strip()
    assert quoted in rows[0].cells and len(rows[0].cells) == len(header.split(","))


@pytest.mark.parametrize(
    "content",
    [
        'image,text\n000123,"half\n000124,cat"\n',
        'text,image\n"half,000123\ncat",000124\n',
        'image,text,split\n01,"half,train\n02,cat",val\n',
        'image,text\nimg 1,"half\nimg 2,cat"\n',
        'text,image\n"half,1.png\na",b,2.png\n',
        'image,text\n1.png,"half\n2.jpg,cat"\n',
    ],
)
def test_rows_in_a_quoted_cell_are_found_with_and_without_names_of_files(tmp_path, content):
    write_files(tmp_path, {"a.csv": content})
    with pytest.raises(ValueError, match="a.csv line 2 opens a quote that takes in"):
        list(open_table(tmp_path / "a.csv").rows)


@pytest.mark.parametrize(
    "rows",
    [
        'image\ttext\nb.jpg\tx\na.jpg\t"first line\nsecond line"\n',
        'image\ttext\nb.jpg\tx\na.jpg\t"first line\n\nsecond\nthird"\n',
        'text\timage\nx\tb.jpg\n"first line\nsecond line"\ta.jpg\n',
        'image\ttext\tsplit\nb.jpg\tx\ttrain\na.jpg\t"first\nsecond"\ttrain\n',
    ],
)
def test_cells_of_several_lines_in_a_tsv_are_refused(tmp_path, rows):
    """pandas writes them; as text the first line would be trained, with a stray quote."""
    write_files(tmp_path, {"a.tsv": rows})
    with pytest.raises(ValueError, match="a.tsv line 3 opens a quote that may be text or begin"):
        list(open_table(tmp_path / "a.tsv").rows)
    quoted_header = "\t".join(f'"{name}"' for name in rows.split("\n")[0].split("\t"))
    write_files(tmp_path, {"a.tsv": quoted_header + rows[rows.index("\n") :]})
    assert len(list(open_table(tmp_path / "a.tsv").rows)) == 2


def test_ragged_rows_of_a_tsv_without_quotes_before_them_stay_faults(tmp_path):
    write_files(tmp_path, {"a.tsv": 'image\ttext\na.png\t12" of\nb.png\nc.png\t"half\n\n'})
    rows = [row.cells for row in open_table(tmp_path / "a.tsv").rows]
    assert rows == [["a.png", '12" of'], ["b.png"], ["c.png", '"half']]


@pytest.mark.parametrize(
    "content",
    [
        b"sep=;\nimage;text\na.png;a cat, asleep\nb.png;x\n",
        b'\xef\xbb\xbf"sep=;"\r\nimage;text\r\na.png;a cat, asleep\r\nb.png;x\r\n',
        "sep=\t\nimage\ttext\na.png\ta cat, asleep\nb.png\tx\n".encode("utf-16"),
        "image;text\ra.png;a cat, asleep\rb.png;x\r".encode("utf-8-sig"),
        b"\n\nimage;text;\na.png;a cat, asleep;\n;;\nb.png;x;;\n",
        b"image|text\na.png|a cat, asleep\nb.png|x",
        b'"image","text"\n"a.png","a cat, asleep"\n"b.png","x"\n',
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path, content):
    write_files(tmp_path, {"a.csv": content})
    assert read_all_texts(tmp_path / "a.csv") == ["a cat, asleep", "x"]


def test_a_quoted_header_makes_a_tsv_quoted(tmp_path):
    write_files(tmp_path, {"a.tsv": '"image"\t"text"\n"a.png"\t"a\tcat"\n"b.png"\t"x"\n'})
    assert read_all_texts(tmp_path / "a.tsv") == ["a\tcat", "x"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,text\na.png,a\0b\n", ["a.csv line 2 holds a NUL"]),
        ("image,text\na.png,b\n".encode("utf-16-le"), ["a.csv line 1 holds a NUL", "UTF-16"]),
        ("image,text,Text\na.png,b,c\n", ["a.csv has 2 columns 'text'", "rename"]),
        ("a.png,a cat\nb.png,a dog\n", ["'a.png', 'a cat'", "first line looks like data"]),
    ],
)
def test_tables_that_are_damaged_or_ambiguous_are_refused(tmp_path, content, words):
    assert_refused(read_pairs, write_files(tmp_path, {"a.csv": content}), *words)


def test_records_and_faults_add_up_to_the_rows(tmp_path):
    """With ragged rows, quotes and cells of several lines among them."""
    rng = random.Random(0)
    kinds = ["{k}.png,cat {k}"] * 500 + ['{k}.png,"a\n""b"" {k}"', '{k}.png,"c" {k}', "{k}.png"]
    lines = [rng.choice(kinds).format(k=k) for k in range(2000)]
    write_files(tmp_path, {"raw/a.csv": "image,text\n" + "\n".join(lines) + "\n"})
    write_files(tmp_path, {f"raw/{k}.png": None for k in range(2000)})
    report = write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    num_ragged = sum("," not in line for line in lines)
    assert 0 < len(report["passed_over"]) == num_ragged
    assert sum(report["records"].values()) == 2000 - num_ragged


def test_a_table_reads_its_rows_one_by_one(tmp_path):
    table = open_table(write_files(tmp_path, {"a.csv": 'A, b\n1, 2\n"3\n4",5,,\n6\n'}) / "a.csv")
    assert table.columns == ["a", "b"] and table.delimiter == ","
    assert list(table.rows) == [(2, ["1", "2"]), (3, ["3\n4", "5"]), (5, ["6"])]
