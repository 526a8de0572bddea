"""Tests of the whole page: well formed, self-contained, escaped, written atomically."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from beit3.report.page import select_final_runs, write_report
from beit3.report.runs import Run

VOID_TAGS = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, links and headings; fails on tags that do not close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.num_images_without_alt = 0
        self.feed(html)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        link_names = ("src", "href", "xlink:href", "srcset", "data")
        self.links += [value for name, value in attrs if name in link_names]
        if tag == "img" and not dict(attrs).get("alt"):
            self.num_images_without_alt += 1
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory, vqkd, pretrain, nlvr2, captioning, retrieval, imagenet, vqa) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    table = [{"stage": "vqkd", "value": "<1>"}, {"stage": "vqa", "chance": "5 %"}]
    runs = [vqkd, pretrain, *nlvr2, *captioning, *retrieval, *imagenet, *vqa]
    assert write_report(runs, out, title="A <b> & c", table=table, notes=["on a <laptop>"]) == out
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text()


def make_new_run(path: Path, finished_run: Path) -> Path:
    """Returns a run directory that holds a recipe alone."""
    path.mkdir(parents=True)
    shutil.copy(finished_run / "recipe.json", path)
    return path


def test_the_page_is_well_formed_and_fetches_nothing(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert page.num_images_without_alt == 0


def test_sections_stand_in_the_order_of_the_runs(html):
    headings = Page(html).headings
    assert headings[0] == "A <b> & c"
    expected = [
        "At a glance",
        "Visual tokenizer",
        "Pretraining",
        "Visual reasoning",
        "Image captioning",
        "Image-text retrieval",
        "Image classification",
        "Visual question answering",
    ]
    assert [heading for heading in headings if heading in expected] == expected
    assert headings.count("Curves") == 7 and "Masked tokens" in headings


def test_text_is_escaped(html):
    for escaped in (
        "<title>A &lt;b&gt; &amp; c</title>",
        "on a &lt;laptop&gt;",
        "<td>&lt;1&gt;</td>",
    ):
        assert escaped in html
    assert "<i>one" not in html and "what is &lt;i&gt;" in html


def test_two_runs_of_a_task_share_a_section(html):
    section = html[html.index("<h2>Visual question answering") :]
    assert section.count('<div class="curves">') == 1
    assert section.count("✓") + section.count("✗") == 16
    assert "from scratch" in section and "from there/last" in section
    labels = (
        '<span class="run run0">pretrained/vqa</span> <span class="run run1">scratch/vqa</span>'
    )
    assert f'<p class="legend">{labels}</p>' in section
    assert section.count("★") == 1, "only the legend has a star: both runs have the same scores"


@pytest.mark.parametrize(
    ("num_runs", "title"),
    [
        (1, "&lt;0&gt;"),
        (3, "&lt;0&gt; and &lt;1&gt; and &lt;2&gt;"),
        (4, "4 runs of vqa"),
    ],
)
def test_a_title_names_few_runs_and_counts_many(vqa, tmp_path, num_runs, title):
    runs = [make_new_run(tmp_path / f"<{index}>", vqa[0]) for index in range(num_runs)]
    html = write_report(runs, tmp_path / "page.html").read_text()
    assert f"<title>{title}</title>" in html


def test_a_directory_without_a_run_leaves_the_old_page(tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(ValueError, match="is not a run"):
        write_report([tmp_path], out, title="x")
    assert out.read_text() == "old"


def test_predictions_are_shown_for_the_last_stage_of_a_training(tmp_path):
    def make_run(name: str, init: str = "") -> Run:
        return Run(tmp_path / name, name, "pretrain", init, {}, [], {})

    first = make_run("a")
    second = make_run("b", str(tmp_path / "a" / "last"))
    other = make_run("c", "elsewhere/last")
    assert select_final_runs([first, second, other]) == [second, other]
