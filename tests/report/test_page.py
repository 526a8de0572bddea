"""The page: whole, self-contained, escaped, and written at once or not at all."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from beit3.report.curves import PALETTE
from beit3.report.page import (
    curve_panel,
    data_table,
    difference_panel,
    ends,
    part_panel,
    place_panel,
    run_line,
    score_panel,
    source_scores,
    stroke,
    write_report,
)
from beit3.report.runs import Run, read_runs

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
        self.links += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
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
def text(tmp_path_factory, vqkd, pretrain, nlvr2, captioning, retrieval, imagenet, vqa) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    table = [{"stage": "vqkd", "value": "<1>"}, {"stage": "vqa", "chance": "5 %"}]
    runs = [vqkd, pretrain, *nlvr2, *captioning, *retrieval, *imagenet, *vqa]
    assert write_report(runs, out, title="A <b> & c", table=table, notes=["on a <laptop>"]) == out
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text()


def test_the_page_is_well_formed_and_fetches_nothing(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.links and all(
        link.startswith(("data:image/png;base64,", "#")) for link in page.links
    )
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.without_alt == 0


def test_everything_has_its_place_in_order(text):
    headings = Page(text).headings
    assert headings[0] == "A <b> & c"
    tuned = [
        "Visual reasoning",
        "Image captioning",
        "Image-text retrieval",
        "Image classification",
        "Visual question answering",
    ]
    expected = ["At a glance", "Visual tokenizer", "Pretraining", *tuned]
    assert [heading for heading in headings if heading in expected] == expected
    assert headings.count("Curves") == 7 and "Hidden words" in headings


def test_text_is_escaped(text):
    for escaped in (
        "<title>A &lt;b&gt; &amp; c</title>",
        "on a &lt;laptop&gt;",
        "<td>&lt;1&gt;</td>",
    ):
        assert escaped in text
    assert "<i>one" not in text and "what is &lt;i&gt;" in text


def test_two_runs_of_a_task_share_a_section(text):
    section = text[text.index("<h2>Visual question answering") :]
    assert (
        section.count('<div class="curves">') == 1 and section.count("✓") + section.count("✗") == 16
    )
    assert "from scratch" in section and "from there/last" in section
    legend = (
        '<span class="run run0">pretrained/vqa</span> <span class="run run1">scratch/vqa</span>'
    )
    assert (
        f'<p class="legend">{legend}</p>' in section and section.count("★") == 1
    )  # in the lead: both have the same scores


def test_the_headline_leads_and_single_sources_are_folded(pretrain):
    run = read_runs([pretrain])[0]
    assert re.findall(r'class="tile"><span>([^<]*)', score_panel([run])) == [
        "negative loss (nats)",
        "text accuracy",
    ]
    assert "<td>pairs/text_loss (nats)</td><td>2.000</td>" in source_scores([run])
    run.scores.clear()
    assert "No held-out scores yet" in score_panel([run]) and source_scores([run]) == ""


def test_many_scores_beside_the_headline_are_folded(retrieval):
    run = read_runs([retrieval[0]])[0]
    others = [f"text_recall@{k}" for k in (1, 5, 10)]
    lines = [
        {"step": step} | {f"val/{name}": step / 10 for name in ("mean_recall", *others)}
        for step in (1, 2)
    ]
    before, _, after = curve_panel([replace(run, metrics=lines)]).partition(
        "<summary>3 other scores</summary>"
    )
    assert (
        "held-out mean recall" in before
        and "held-out text recall@1" not in before
        and after.count("<svg") == 3
    )
    few = [
        {name: value for name, value in line.items() if name != "val/text_recall@1"}
        for line in lines
    ]
    assert "other scores" not in curve_panel([replace(run, metrics=few)])


def test_several_runs_get_a_table_and_what_differs(vqa):
    first, second = read_runs(list(vqa))
    assert "★ marks the best of a column" in score_panel(
        [first, second]
    ) and "tile" not in score_panel([first, second])
    html = difference_panel([first, second])
    assert (
        "<td>init</td><td>from scratch</td><td>there/last</td>" in html
        and "Machine and code" not in html
    )
    assert "optim.lr" not in html
    second.environment.update(git={"commit": "a" * 40, "changed": True}, started="now")
    html = difference_panel([first, second])
    assert "<td>git.commit</td><td>—</td><td>aaaaaaaaaaaa</td>" in html and "started" not in html
    assert "No best is marked: the sources (data.batch) are not" in score_panel(
        [first, with_batch(second, {"other": 4})]
    )
    assert difference_panel([first]) == ""
    assert "Nothing: the recipes and what the runs read are the same" in difference_panel(
        [first, first]
    )


def with_batch(run: Run, batch: dict[str, int]) -> Run:
    return replace(run, recipe=run.recipe | {"data": run.recipe["data"] | {"batch": batch}})


def test_what_newer_runs_log_is_shown_and_older_ones_do_not_need_it(vqa):
    old = read_runs([vqa[0]])[0]
    assert run_line(old, 0, several=False).endswith(
        "10 steps · 4 records a step · from scratch</p>"
    )
    assert part_panel([old]) == "" and place_panel([old]) == ""
    more = {
        "seconds": 6.0,
        "seconds_waiting": 0.6,
        "samples": 4,
        "memory": 1.5,
        "gradient_norm": 1.0,
    }
    parts = {
        "gradient_norm/head": 1.0,
        "gradient_norm/blocks.0": 0.5,
        "lr/head": 1e-3,
        "lr/body": 1e-4,
    }
    new = replace(
        old,
        metrics=[{"step": step} | more | parts for step in (5, 10)],
        environment={
            "torch": "2.15",
            "command": ["beit3", "train", "<a b>"],
            "started": "today",
            "git": None,
        },
    )
    assert "· 1m00s · 10% of it waiting for records · 1 records/s · 1.5 GB at its peak" in run_line(
        new, 0, several=False
    )
    html = part_panel([new])
    assert (
        html.count("<svg") == 3
        and "gradient norm by part" in html
        and "learning rate by group" in html
    )
    assert "<details>" in part_panel([new] * 3) and part_panel([new, old]).count("<svg") == 3
    html = place_panel([new])
    assert (
        "beit3 train &#x27;&lt;a b&gt;&#x27;" in html
        and "started today" in html
        and "<td>2.15</td>" in html
    )


def test_a_title_names_few_runs_and_counts_many(vqa, tmp_path):
    runs = [bare(tmp_path / f"<{index}>", vqa[0]) for index in range(4)]
    for given, title in (
        (runs[:1], "&lt;0&gt;"),
        (runs[:3], "&lt;0&gt; and &lt;1&gt; and &lt;2&gt;"),
        (runs, "4 runs of vqa"),
    ):
        assert f"<title>{title}</title>" in write_report(given, tmp_path / "page.html").read_text()


def bare(path: Path, run: Path) -> Path:
    """A run that has only begun."""
    path.mkdir(parents=True)
    shutil.copy(run / "recipe.json", path)
    return path


def test_a_stroke_repeats_the_dash_of_the_curve():
    assert stroke(PALETTE[0], ()).count(PALETTE[0]) == 1
    assert (
        stroke("red", (4, 2))
        == "repeating-linear-gradient(90deg,red 0px 12px,transparent 12px 18px)"
    )


def test_a_table_takes_the_union_of_its_rows_columns():
    html = data_table([{"a": "1"}, {"a": "2", "b": "3"}])
    assert "<tr><td>1</td><td></td></tr><tr><td>2</td><td>3</td></tr>" in html
    assert html.index(">a</th>") < html.index(">b</th>")
    assert data_table([]) == ""


def test_a_directory_without_a_run_leaves_the_old_page(tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(ValueError, match="is not a run"):
        write_report([tmp_path], out, title="x")
    assert out.read_text() == "old"


def test_pictures_are_of_the_last_part_of_a_training(tmp_path):
    def run(name: str, init: str = "") -> Run:
        return Run(tmp_path / name, name, "pretrain", init, {}, [], {})

    first, second, other = (
        run("a"),
        run("b", str(tmp_path / "a" / "last")),
        run("c", "elsewhere/last"),
    )
    assert ends([first, second, other]) == [second, other]
