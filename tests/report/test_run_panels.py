"""Tests of the panels of scores, differences and environments."""

import re
from dataclasses import replace

from beit3.report.run_panels import (
    render_differences,
    render_environments,
    render_run_summary,
    render_scores,
    render_source_scores,
)
from beit3.report.runs import read_runs


def test_the_summary_shows_what_a_run_logged(vqa):
    old_run = read_runs([vqa[0]])[0]
    summary = "10 steps · 4 records a step · from scratch"
    assert render_run_summary(old_run, 0, several=False).endswith(f"{summary}</p>")
    costs = {"seconds": 6.0, "seconds_waiting": 0.6, "samples": 4, "memory": 1.5}
    new_run = replace(old_run, metrics=[{"step": step, **costs} for step in (5, 10)])
    summary += " · 1m00s · 10% waiting for records · 1 records/s · 1.5 GB at its peak"
    assert render_run_summary(new_run, 0, several=False).endswith(f"{summary}</p>")


def test_one_run_has_tiles_and_the_headline_metric_leads(pretrain):
    html = render_scores(read_runs([pretrain]))
    titles = re.findall(r'class="tile"><span>([^<]*)', html)
    assert titles == ["negative loss (nats)", "text accuracy"]


def test_scores_of_single_sources_have_a_table(pretrain):
    html = render_source_scores(read_runs([pretrain]))
    assert "<td>pairs/text_loss (nats)</td><td>2.000</td>" in html


def test_a_run_without_scores_says_so(pretrain):
    run = read_runs([pretrain])[0]
    run.scores.clear()
    assert "No held-out scores yet" in render_scores([run]) and render_source_scores([run]) == ""


def test_several_runs_have_a_table_instead_of_tiles(vqa):
    html = render_scores(read_runs(list(vqa)))
    assert "★ marks the best of a column" in html and "tile" not in html


def test_runs_on_different_sources_have_no_best(vqa):
    first, second = read_runs(list(vqa))
    second.recipe["data"]["batch"] = {"other": 4}
    html = render_scores([first, second])
    assert "No best is marked: the sources (data.batch) are not" in html


def test_differing_fields_are_listed(vqa):
    first, second = read_runs(list(vqa))
    html = render_differences([first, second])
    assert "<td>init</td><td>from scratch</td><td>there/last</td>" in html
    assert "optim.lr" not in html and "Machine and code" not in html
    same = render_differences([first, first])
    assert "Nothing: recipes and inputs are the same" in same
    assert render_differences([first]) == ""


def test_differing_environments_are_listed(vqa):
    first, second = read_runs(list(vqa))
    second.environment.update(git={"commit": "a" * 40, "changed": True}, started="now")
    html = render_differences([first, second])
    assert "<td>git.commit</td><td>—</td><td>aaaaaaaaaaaa</td>" in html and "started" not in html


def test_environment_and_command_are_shown_where_they_were_recorded(vqa):
    old_run = read_runs([vqa[0]])[0]
    assert render_environments([old_run]) == ""
    environment = {
        "torch": "2.15",
        "command": ["beit3", "train", "<a b>"],
        "started": "today",
        "git": None,
    }
    html = render_environments([replace(old_run, environment=environment)])
    assert "beit3 train &#x27;&lt;a b&gt;&#x27;" in html
    assert "started today" in html and "<td>2.15</td>" in html
