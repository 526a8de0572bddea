"""Tests of which curves are shown and which are folded away."""

from dataclasses import replace
from pathlib import Path

from beit3.report.curve_panels import render_curves, render_gradient_curves
from beit3.report.runs import Run


def make_run(lines: list[dict[str, float]], task: str = "vqa") -> Run:
    return Run(Path("x"), "a", task, "", {}, lines, {})


def test_many_scores_beside_the_headline_metric_are_folded():
    names = ("mean_recall", "text_recall@1", "text_recall@5", "text_recall@10")
    lines = [{"step": step} | {f"val/{name}": step / 10 for name in names} for step in (1, 2)]
    html = render_curves([make_run(lines, "retrieval")])
    shown, _, folded = html.partition("<summary>3 other scores</summary>")
    assert "held-out mean recall" in shown and "held-out text recall@1" not in shown
    assert folded.count("<svg") == 3


def test_few_scores_beside_the_headline_metric_are_shown():
    names = ("mean_recall", "text_recall@5", "text_recall@10")
    lines = [{"step": step} | {f"val/{name}": step / 10 for name in names} for step in (1, 2)]
    html = render_curves([make_run(lines, "retrieval")])
    assert "other scores" not in html and html.count("<svg") == 3


def test_gradient_norms_and_learning_rates_are_shown_where_they_were_logged():
    old_run = make_run([{"step": 1, "loss": 1.0}])
    assert render_gradient_curves([old_run]) == ""
    norms = {"gradient_norm": 1.0, "gradient_norm/head": 1.0, "gradient_norm/blocks.0": 0.5}
    rates = {"lr/head": 1e-3, "lr/body": 1e-4}
    new_run = replace(old_run, metrics=[{"step": step, **norms, **rates} for step in (5, 10)])
    html = render_gradient_curves([new_run])
    assert "gradient norm by part" in html and "learning rate by group" in html
    assert html.count("<svg") == 3
    assert render_gradient_curves([new_run, old_run]).count("<svg") == 3


def test_parts_of_many_networks_are_folded():
    norms = {"gradient_norm/head": 1.0, "gradient_norm/blocks.0": 0.5}
    run = make_run([{"step": step, **norms} for step in (5, 10)])
    assert "<details>" in render_gradient_curves([run] * 3)
    assert "<details>" not in render_gradient_curves([run] * 2)
