"""Searches rank by similarity, and similarities are those of the network for single records."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.stores.records import write_records
from beit3.report.gallery import (
    Gallery,
    encode_gallery,
    render_caption_search_card,
    render_image_search_card,
)
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.runs import read_runs
from beit3.tasks.retrieval import Retrieval
from tests.report.conftest import CAPTION, decode_images

GALLERY = Gallery(
    images=[np.full((4, 4, 3), shade, np.uint8) for shade in range(5)],
    captions=["zero", "zero <b>", "one", "two", "three", "four"],
    image_indices=np.array([0, 0, 1, 2, 3, 4]),
    similarities=[
        np.array([[0.5, 0.4, 0.9, 0.1, 0.2]] * 6),
        np.array(
            [[0.1, 0.6, 0.5, 0.4, 0.3], [0.9] * 5, [0.0] * 5, [0.8] * 5, [0.7] * 5, [0.0] * 5]
        ),
    ],
)


def test_images_are_ranked_by_similarity_and_the_right_one_is_framed():
    html = render_image_search_card(GALLERY, 0, ["a", "b"])
    assert [int(image[0, 0, 0]) for image in decode_images(html)] == [2, 0, 1, 1, 2, 3]
    css_classes = [part.partition('"')[0] for part in html.split('<figure class="')[1:]]
    assert css_classes == ["", "hit", "", "", "", ""]
    assert html.count("right one at rank") == 1 and "right one at rank 5" in html
    assert "<b>zero</b>" in html


def test_captions_are_ranked_by_similarity_and_right_ones_are_marked():
    html = render_caption_search_card(GALLERY, 0, ["a", "b"])
    first, second = html.split("<dt>")[1:3]
    own, own_escaped = "✓ zero</mark>", "✓ zero &lt;b&gt;"
    assert first.count("✓") == 2
    assert first.index(own) < first.index(own_escaped) < first.index("<dd>one</dd>")
    assert second.index(own_escaped) < second.index("<dd>two</dd>")
    assert second.index("<dd>two</dd>") < second.index("<dd>three</dd>")
    assert "✗" not in html


def test_a_first_caption_is_marked_even_if_wrong():
    single_run = replace(GALLERY, similarities=GALLERY.similarities[:1])
    html = render_caption_search_card(single_run, 4, ["a"])
    assert '<mark class="wrong">✗ zero</mark>' in html and "right one at rank 6" in html
    assert "<dt>its own</dt><dd>four</dd>" in html


def test_similarities_are_those_of_single_records(retrieval):
    runs = read_runs(list(retrieval))
    gallery = encode_gallery(runs)
    records = list(open_run_records(runs[0], "main", "val"))
    assert gallery.captions[:2] == [f"{CAPTION} 0", "what is <i>"]
    assert gallery.image_indices.tolist() == [index // 2 for index in range(16)]
    for image, record in zip(gallery.images, records, strict=True):
        np.testing.assert_array_equal(image, np.array(Image.open(record["image"])))
    for run, similarities in zip(runs, gallery.similarities, strict=True):
        task = load_run_weights(run, Retrieval)
        with torch.no_grad():
            outputs = [
                task.outputs(task.collate([task.example(record, False)])) for record in records
            ]
        texts = torch.cat([output["text_features"] for output in outputs])
        images = torch.cat([output["image_features"] for output in outputs])
        np.testing.assert_allclose(similarities, (texts @ images.T).numpy(), atol=1e-5)


def test_an_image_is_in_the_gallery_once_and_only_with_captions(retrieval, root, tmp_path):
    run = read_runs([retrieval[0]])[0]
    images = [{"image": str(root / f"{number}.png")} for number in range(3)]
    records = [
        {"id": "0", "text": "a"} | images[0],
        {"id": "1", "text": "red"} | images[1],
        {"id": "2", "text": "cube"} | images[0],
        {"id": "3"} | images[2],
    ]
    path = tmp_path / "pretrain" / "pairs" / "val.jsonl"
    write_records(path, records)
    run.recipe["data"] = {"root": str(tmp_path), "batch": {"main": 0, "pairs": 4}}
    assert len(encode_gallery([run]).images) == 2
    write_records(path, [{"id": "0"} | images[0]])
    with pytest.raises(ValueError, match="no held-out image has a caption"):
        encode_gallery([run])
