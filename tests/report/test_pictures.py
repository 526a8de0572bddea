"""Pixels come out on the page as they went in, patch by patch."""

import numpy as np
from PIL import Image

from beit3.report.panel_inputs import records, weights
from beit3.report.pictures import assemble, cut, picture, pixels
from beit3.report.runs import read_runs
from beit3.tasks.vqa import VQA
from tests.report.conftest import images_of

RNG = np.random.default_rng(0)


def test_patches_are_cut_row_by_row_and_put_together_again():
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    patches = cut(image, 4)
    expected = [image[top : top + 4, left : left + 4] for top in (0, 4) for left in (0, 4, 8)]
    np.testing.assert_array_equal(patches, expected)
    np.testing.assert_array_equal(assemble(patches, (2, 3)), image)


def test_a_gap_is_clear_and_so_is_what_no_patch_fills():
    patches = np.full((3, 2, 2, 3), 9, dtype=np.uint8)
    canvas = assemble(patches, (2, 2), gap=1)
    opaque = np.array(
        [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(canvas[..., 3], 255 * opaque)


def test_a_picture_carries_its_pixels_and_its_words():
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    html = picture(image, 'a "red" <cube>')
    np.testing.assert_array_equal(images_of(html)[0], image)
    assert 'alt="a &quot;red&quot; &lt;cube&gt;"' in html and 'class="sharp"' in html
    large = picture(np.zeros((400, 800, 3), dtype=np.uint8), "large")
    assert images_of(large)[0].shape == (160, 320, 3) and 'class="smooth"' in large
    assert images_of(picture(np.zeros((400, 800, 3), dtype=np.uint8), "small", largest=40))[
        0
    ].shape == (20, 40, 3)


def test_a_networks_input_is_shown_as_the_picture_it_was(vqa):
    run = read_runs(vqa)[0]
    task, record = weights(run, VQA), records(run, "main", "val")[0]
    batch = task.collate([task.example(record, False)])
    np.testing.assert_array_equal(pixels(batch["image"])[0], np.array(Image.open(record["image"])))
