"""Cards show what each run said, beside the truth; searches rank as a slow second reading does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.stores.records import write_records
from beit3.report.answers import (
    NEAREST,
    Gallery,
    caption_card,
    caption_search,
    class_card,
    gallery,
    picture_search,
    question_card,
    source_of,
    statement_card,
    words,
)
from beit3.report.panel_inputs import records, weights
from beit3.report.panels import panels
from beit3.report.runs import read_runs
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import NLVR2
from beit3.tasks.retrieval import Retrieval
from beit3.tasks.vqa import VQA
from tests.report.conftest import CAPTION, images_of

IMAGE = np.zeros((4, 4, 3), np.uint8)


def test_an_answer_counts_as_right_where_an_annotator_gave_it(vqa):
    task, record = (
        weights(read_runs(vqa)[0], VQA),
        {"text": "why <b>?", "answers": {"maybe": 0.0, "no": 0.3, "red & blue": 1.0}},
    )
    given = [{"answer": "no", "score": 0.25}, {"answer": "maybe", "score": 0.5}]
    html = question_card(task, record, IMAGE, ["a", "b"], given)
    assert (
        '<mark class="right">✓ no</mark> 25%' in html
        and '<mark class="wrong">✗ maybe</mark> 50%' in html
    )
    assert "<dd>red &amp; blue</dd>" in html and "why &lt;b&gt;?" in html
    assert (
        "run0" in html
        and "run1" in html
        and "run0" not in question_card(task, record, IMAGE, ["a"], given[:1])
    )
    unlisted = question_card(task, record | {"answers": {}}, IMAGE, ["a"], given[:1])
    assert '<mark class="wrong">✗ no</mark>' in unlisted and "(not in the answer list)" in unlisted


def test_a_statement_is_judged_on_both_pictures(nlvr2):
    run = read_runs([nlvr2[0]])[0]
    task, images = weights(run, NLVR2), np.stack([IMAGE, IMAGE + 9])
    given = [{"answer": "true", "score": 0.75}, {"answer": "false", "score": 0.5}]
    html = statement_card(task, {"text": "left < right", "label": 1}, images, ["a", "b"], given)
    assert (
        '<mark class="right">✓ true</mark> 75%' in html
        and '<mark class="wrong">✗ false</mark> 50%' in html
    )
    assert "<dt>truth</dt><dd>true</dd>" in html and "left &lt; right" in html
    np.testing.assert_array_equal(images_of(html), images)
    unknown = statement_card(task, {"text": "left < right"}, images, ["a", "b"], given)
    assert "mark" not in unknown and "<dd>true 75%</dd>" in unknown and "(no label)" in unknown


def test_a_canvas_is_shown_as_its_two_halves(nlvr2):
    run = read_runs([nlvr2[0]])[0]
    shown = images_of(panels([run])[0].body)
    for place, record in enumerate(records(run, "main", "val")):
        canvas = np.array(Image.open(record["image"]))
        np.testing.assert_array_equal(
            np.concatenate(shown[2 * place : 2 * place + 2], axis=1), canvas
        )


def test_captions_of_runs_stand_before_those_of_people(captioning):
    task = weights(read_runs([captioning[0]])[0], Captioning)
    record = {"captions": [f"a <{number}>" for number in range(7)]}
    html = caption_card(
        task, record, IMAGE, ["a", "b"], [{"caption": "red & blue"}, {"caption": ""}]
    )
    assert html.index("red &amp; blue") < html.index("(no word)") < html.index("by people")
    assert "<dd>a &lt;4&gt;</dd>" in html and "a &lt;5&gt;" not in html
    assert "by people" not in caption_card(task, {"captions": []}, IMAGE, ["a"], [{"caption": "x"}])
    ids = task.tokenizer.encode_pieces("a red cube")
    assert words(task, ids) == "a red cube"
    task._tokenizer = None
    assert words(task, [7, 9]) == "ids 7 9"


def test_a_class_is_marked_first_or_where_it_is_right(imagenet):
    task = weights(read_runs([imagenet[0]])[0], ImageNet)
    likely = [
        {"label": 1, "name": "blue ball", "score": 0.5},
        {"label": 0, "name": "red <i>cube</i>", "score": 0.25},
    ]
    less = [
        {"label": 3, "name": "hat", "score": 0.125},
        {"label": 2, "name": "yellow one", "score": 0.1},
    ]
    html = class_card(task, {"label": 0}, IMAGE, ["a"], [{"candidates": [*likely, *less]}])
    assert (
        '<mark class="wrong">✗ blue ball</mark> 50%' in html
        and "<dd>hat 12%</dd>" in html
        and "yellow" not in html
    )
    assert (
        '<mark class="right">✓ red &lt;i&gt;cube&lt;/i&gt;</mark> 25%' in html
        and "<dd>red &lt;i&gt;cube&lt;/i&gt;</dd>" in html
    )
    unknown = class_card(task, {}, IMAGE, ["a"], [{"candidates": likely}])
    assert "mark" not in unknown and "(no label)" in unknown
    task.config = replace(task.config, classes=())
    html = class_card(
        task, {"label": 1}, IMAGE, ["a"], [{"candidates": [{"label": 1, "score": 0.5}]}]
    )
    assert (
        '<mark class="right">✓ class 1</mark> 50%' in html
        and "<dt>truth</dt><dd>class 1</dd>" in html
    )


# Searches -----------------------------------------------------------------------------------------

FOUND = Gallery(
    images=[np.full((4, 4, 3), shade, np.uint8) for shade in range(5)],
    captions=["zero", "zero <b>", "one", "two", "three", "four"],
    owner=np.array([0, 0, 1, 2, 3, 4]),
    likeness=[
        np.array([[0.5, 0.4, 0.9, 0.1, 0.2]] * 6),
        np.array(
            [[0.1, 0.6, 0.5, 0.4, 0.3], [0.9] * 5, [0.0] * 5, [0.8] * 5, [0.7] * 5, [0.0] * 5]
        ),
    ],
)


def test_pictures_are_found_in_the_order_of_their_likeness():
    html = picture_search(FOUND, 0, ["a", "b"])
    assert [int(image[0, 0, 0]) for image in images_of(html)] == [2, 0, 1, 1, 2, 3]
    shown = [part.partition('"')[0] for part in html.split('<figure class="')[1:]]
    assert shown == ["", "hit", "", "", "", ""]
    assert (
        html.count("right one at place") == 1
        and "right one at place 5" in html
        and "<b>zero</b>" in html
    )


def test_captions_are_found_in_the_order_of_their_likeness():
    html = caption_search(FOUND, 0, ["a", "b"])
    first, second = html.split("<dt>")[1:3]
    assert first.count("✓") == 2 and first.index("✓ zero</mark>") < first.index(
        "✓ zero &lt;b&gt;"
    ) < first.index("<dd>one</dd>")
    assert (
        second.index("✓ zero &lt;b&gt;")
        < second.index("<dd>two</dd>")
        < second.index("<dd>three</dd>")
        and "✗" not in html
    )
    other = caption_search(replace(FOUND, likeness=FOUND.likeness[:1]), 4, ["a"])
    assert (
        '<mark class="wrong">✗ zero</mark>' in other
        and "place 6" in other
        and "<dt>its own</dt><dd>four</dd>" in other
    )


def test_a_gallery_is_what_the_network_makes_of_each_record(retrieval):
    runs = read_runs(list(retrieval))
    found = gallery(runs)
    held_out = list(records(runs[0], "main", "val"))
    assert found.captions[:2] == [f"{CAPTION} 0", "what is <i>"] and found.owner.tolist() == [
        n // 2 for n in range(16)
    ]
    for run, likeness in zip(runs, found.likeness, strict=True):
        task = weights(run, Retrieval)
        with torch.no_grad():
            features = [
                task.outputs(task.collate([task.example(record, False)])) for record in held_out
            ]
        for place, each in enumerate(features):
            for row, text in enumerate(each["text_features"]):
                expected = [float(text @ other["image_features"][0]) for other in features]
                np.testing.assert_allclose(likeness[2 * place + row], expected, atol=1e-5)
    for image, record in zip(found.images, held_out, strict=True):
        np.testing.assert_array_equal(image, np.array(Image.open(record["image"])))


def test_a_picture_is_in_the_gallery_once_and_only_with_captions(retrieval, root, tmp_path):
    run = read_runs([retrieval[0]])[0]
    pictures = [{"image": str(root / f"{number}.png")} for number in range(3)]
    rows = [
        pictures[0] | {"text": "a"},
        pictures[1] | {"text": "red"},
        pictures[0] | {"text": "cube"},
        pictures[2],
    ]
    write_records(
        tmp_path / "pretrain" / "pairs" / "val.jsonl",
        [{"id": str(n)} | row for n, row in enumerate(rows)],
    )
    run.recipe["data"] = {"root": str(tmp_path), "batch": {"main": 0, "pairs": 4}}
    assert source_of(run) == "pairs" and len(gallery([run]).images) == 2
    write_records(tmp_path / "pretrain" / "pairs" / "val.jsonl", [{"id": "0"} | pictures[0]])
    with pytest.raises(ValueError, match="no held-out picture has a caption"):
        gallery([run])


@pytest.mark.parametrize("kind", ["vqa", "nlvr2", "captioning", "retrieval", "imagenet"])
def test_runs_stand_side_by_side(kind, request):
    runs = read_runs(list(request.getfixturevalue(kind)))
    for shown in panels(runs):
        cards = shown.body.split('<div class="card')[2:]
        assert "run beside run" in shown.lead and cards
        for card in cards:
            assert (
                card.count(f'run0">pretrained/{kind}') == card.count(f'run1">scratch/{kind}') == 1
            )
    pictures = [len(images_of(shown.body)) for shown in panels(runs)]
    assert pictures == {"nlvr2": [16], "retrieval": [6 * NEAREST * 2, 6]}.get(kind, [8])
