"""The page: whole, self-contained, escaped, and written at once or not at all."""

import re
from html.parser import HTMLParser

import pytest

from beit3.report.curves import Run, read_runs
from beit3.report.page import data_table, ends, figure, score_tiles, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects headings and addresses; fails on tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.without_alt = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.without_alt += tag == "img" and not dict(attrs).get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def text(tmp_path_factory, vqkd, pretrain, vqa) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    table = [{"stage": "vqkd", "value": "<1>"}, {"stage": "vqa", "chance": "5 %"}]
    assert write_report([vqkd, pretrain, *vqa], out, title="A <b> & c", table=table, notes=["on a <laptop>"]) == out
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text()


def test_the_page_is_well_formed_and_fetches_nothing(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.links and all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.without_alt == 0


def test_everything_has_its_place_in_order(text):
    headings = Page(text).headings
    assert headings[0] == "A <b> & c"
    expected = ["At a glance", "Visual tokenizer", "Pretraining", "Visual question answering"]
    assert [heading for heading in headings if heading in expected] == expected
    assert headings.count("Curves") == 3 and "Hidden words" in headings


def test_text_is_escaped(text):
    for escaped in ("<title>A &lt;b&gt; &amp; c</title>", "on a &lt;laptop&gt;", "<td>&lt;1&gt;</td>"):
        assert escaped in text
    assert "<i>one" not in text and "what is &lt;i&gt;" in text


def test_two_runs_of_a_task_share_a_section(text):
    section = text[text.index("<h2>Visual question answering") :]
    assert section.count('<div class="curves">') == 1 and section.count("✓") + section.count("✗") == 16
    assert "from scratch" in section and "from there/last" in section
    legend = '<span class="run run0">pretrained/vqa</span> <span class="run run1">scratch/vqa</span>'
    assert f'<p class="legend">{legend}</p>' in section


def test_the_headline_leads_and_single_sources_are_folded(pretrain):
    run = read_runs([pretrain])[0]
    html = score_tiles([run])
    tiles, more = html.split("<details>")
    assert re.findall(r'class="tile"><span>([^<]*)', tiles) == ["negative loss", "text accuracy"]
    assert "<td>pairs/text_loss</td><td>2</td>" in more
    run.scores.clear()
    assert "No held-out scores yet" in score_tiles([run])


def test_shares_are_percentages_and_the_rest_four_digits():
    assert figure("accuracy", 0.5) == "50.0%"
    assert figure("pairs/text_accuracy", 1) == "100.0%"
    assert figure("text_loss", 1.23456) == "1.235"


def test_a_table_takes_the_union_of_its_rows_columns():
    html = data_table([{"a": "1"}, {"a": "2", "b": "3"}])
    assert "<tr><td>1</td><td></td></tr><tr><td>2</td><td>3</td></tr>" in html
    assert html.index(">a</th>") < html.index(">b</th>")


def test_a_directory_without_a_run_leaves_the_old_page(tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(ValueError, match="holds no run"):
        write_report([tmp_path], out, title="x")
    assert out.read_text() == "old"


def test_pictures_are_of_the_last_part_of_a_training(tmp_path):
    def run(name: str, init: str = "") -> Run:
        return Run(tmp_path / name, name, "pretrain", init, {}, [], {})

    first, second, other = run("a"), run("b", str(tmp_path / "a" / "last")), run("c", "elsewhere/last")
    assert ends([first, second, other]) == [second, other]
