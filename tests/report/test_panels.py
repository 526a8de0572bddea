"""Every task has its panels, for one run and for several side by side."""

from dataclasses import replace

import pytest

from beit3.report.gallery import NUM_RESULTS
from beit3.report.panels import make_panels
from beit3.report.runs import read_runs
from tests.report.conftest import decode_images


def test_every_task_has_panels(vqkd, pretrain, vqa, nlvr2, captioning, retrieval, imagenet):
    paths = [vqkd, pretrain, vqa[0], nlvr2[0], captioning[0], retrieval[0], imagenet[0]]
    bodies = {panel.title: panel.body for path in paths for panel in make_panels(read_runs([path]))}
    assert [body for body in bodies.values() if "Nothing to show" in body] == []
    assert {title: len(decode_images(body)) for title, body in bodies.items()} == {
        "The codebook": 1,
        "Images in codes": 8 * 2,
        "Masked patches": 6 * 4,
        "Masked tokens": 8,
        "Questions and answers": 8,
        "Statements and judgments": 8 * 2,
        "Captions": 8,
        "Images found by a caption": 6 * 3,
        "Captions found by an image": 6,
        "Images and classes": 8,
    }


@pytest.mark.parametrize("task_name", ["vqa", "nlvr2", "captioning", "retrieval", "imagenet"])
def test_runs_are_shown_side_by_side(task_name, request):
    panels = make_panels(read_runs(list(request.getfixturevalue(task_name))))
    for panel in panels:
        cards = panel.body.split('<div class="card')[2:]
        assert "runs side by side" in panel.lead and cards
        for card in cards:
            assert card.count(f'run0">pretrained/{task_name}') == 1
            assert card.count(f'run1">scratch/{task_name}') == 1
    expected = {"nlvr2": [16], "retrieval": [6 * NUM_RESULTS * 2, 6]}.get(task_name, [8])
    assert [len(decode_images(panel.body)) for panel in panels] == expected


def test_missing_records_or_weights_leave_one_line(pretrain, vqa, retrieval, tmp_path):
    for path in (pretrain, retrieval[0]):
        run = read_runs([path])[0]
        run.recipe["data"]["root"] = str(tmp_path)
        bodies = [panel.body for panel in make_panels([run])]
        assert bodies
        assert all(f"Nothing to show: no {run.task}/" in body for body in bodies)
    without_weights = replace(read_runs([vqa[0]])[0], path=tmp_path)
    assert "has no weights yet" in make_panels([without_weights])[0].body


def test_an_unknown_task_has_no_panels(vqa):
    run = replace(read_runs([vqa[0]])[0], task="unheard_of")
    assert make_panels([run]) == []
