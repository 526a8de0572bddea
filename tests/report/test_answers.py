"""Cards show what each run predicts, and mark it as right or wrong."""

from dataclasses import replace

import numpy as np
from PIL import Image

from beit3.report.answers import (
    render_caption_card,
    render_class_card,
    render_question_card,
    render_statement_card,
)
from beit3.report.cards import decode_text
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.panels import make_panels
from beit3.report.runs import read_runs
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import NLVR2
from beit3.tasks.vqa import VQA
from tests.report.conftest import decode_images

IMAGE = np.zeros((4, 4, 3), np.uint8)


def test_an_answer_is_right_if_an_annotator_gave_it(vqa):
    task = load_run_weights(read_runs(vqa)[0], VQA)
    answers = {"maybe": 0.0, "no": 0.3, "red & blue": 1.0}
    record = {"text": "why <b>?", "answers": answers}
    predictions = [{"answer": "no", "score": 0.25}, {"answer": "maybe", "score": 0.5}]
    html = render_question_card(task, record, IMAGE, ["a", "b"], predictions)
    assert '<mark class="right">✓ no</mark> 25%' in html
    assert '<mark class="wrong">✗ maybe</mark> 50%' in html
    assert "<dd>red &amp; blue</dd>" in html and "why &lt;b&gt;?" in html
    assert "run0" in html and "run1" in html
    single = render_question_card(task, record, IMAGE, ["a"], predictions[:1])
    assert "run0" not in single
    record["answers"] = {}
    unlisted = render_question_card(task, record, IMAGE, ["a"], predictions[:1])
    assert '<mark class="wrong">✗ no</mark>' in unlisted and "(not in the answer list)" in unlisted


def test_a_statement_is_shown_with_both_images(nlvr2):
    task = load_run_weights(read_runs([nlvr2[0]])[0], NLVR2)
    images = np.stack([IMAGE, IMAGE + 9])
    predictions = [{"answer": "true", "score": 0.75}, {"answer": "false", "score": 0.5}]
    record = {"text": "left < right", "label": 1}
    html = render_statement_card(task, record, images, ["a", "b"], predictions)
    assert '<mark class="right">✓ true</mark> 75%' in html
    assert '<mark class="wrong">✗ false</mark> 50%' in html
    assert "<dt>truth</dt><dd>true</dd>" in html and "left &lt; right" in html
    np.testing.assert_array_equal(decode_images(html), images)
    del record["label"]
    unlabeled = render_statement_card(task, record, images, ["a", "b"], predictions)
    assert "mark" not in unlabeled and "<dd>true 75%</dd>" in unlabeled
    assert "(no label)" in unlabeled


def test_two_images_on_one_canvas_are_shown_separately(nlvr2):
    run = read_runs([nlvr2[0]])[0]
    images = decode_images(make_panels([run])[0].body)
    for index, record in enumerate(open_run_records(run, "main", "val")):
        canvas = np.array(Image.open(record["image"]))
        halves = images[2 * index : 2 * index + 2]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), canvas)


def test_generated_captions_come_before_human_ones(captioning):
    task = load_run_weights(read_runs([captioning[0]])[0], Captioning)
    record = {"captions": [f"a <{number}>" for number in range(7)]}
    predictions = [{"caption": "red & blue"}, {"caption": ""}]
    html = render_caption_card(task, record, IMAGE, ["a", "b"], predictions)
    assert html.index("red &amp; blue") < html.index("(empty)") < html.index("<dt>human</dt>")
    assert "<dd>a &lt;4&gt;</dd>" in html and "a &lt;5&gt;" not in html
    without = render_caption_card(task, {"captions": []}, IMAGE, ["a"], [{"caption": "x"}])
    assert "<dt>human</dt>" not in without


def test_token_ids_are_decoded_if_there_is_a_tokenizer(captioning):
    task = load_run_weights(read_runs([captioning[0]])[0], Captioning)
    assert decode_text(task, task.tokenizer.encode_pieces("a red cube")) == "a red cube"
    task._tokenizer = None
    assert decode_text(task, [7, 9]) == "ids 7 9"


def test_classes_are_marked_if_first_or_right(imagenet):
    task = load_run_weights(read_runs([imagenet[0]])[0], ImageNet)
    candidates = [
        {"label": 1, "name": "blue ball", "score": 0.5},
        {"label": 0, "name": "red <i>cube</i>", "score": 0.25},
        {"label": 3, "name": "hat", "score": 0.125},
        {"label": 2, "name": "yellow one", "score": 0.1},
    ]
    html = render_class_card(task, {"label": 0}, IMAGE, ["a"], [{"candidates": candidates}])
    assert '<mark class="wrong">✗ blue ball</mark> 50%' in html
    assert "<dd>hat 12%</dd>" in html and "yellow" not in html
    assert '<mark class="right">✓ red &lt;i&gt;cube&lt;/i&gt;</mark> 25%' in html
    assert "<dd>red &lt;i&gt;cube&lt;/i&gt;</dd>" in html
    unlabeled = render_class_card(task, {}, IMAGE, ["a"], [{"candidates": candidates[:2]}])
    assert "mark" not in unlabeled and "(no label)" in unlabeled


def test_classes_without_names_are_called_by_number(imagenet):
    task = load_run_weights(read_runs([imagenet[0]])[0], ImageNet)
    task.config = replace(task.config, classes=())
    predictions = [{"candidates": [{"label": 1, "score": 0.5}]}]
    html = render_class_card(task, {"label": 1}, IMAGE, ["a"], predictions)
    assert '<mark class="right">✓ class 1</mark> 50%' in html
    assert "<dt>truth</dt><dd>class 1</dd>" in html
