"""Images come out of a report as they went in, patch by patch."""

import numpy as np
from PIL import Image

from beit3.report.images import (
    assemble_patches,
    cut_into_patches,
    render_image,
    to_channels_last,
)
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.runs import read_runs
from beit3.tasks.vqa import VQA
from tests.report.conftest import decode_images

RNG = np.random.default_rng(0)


def test_patches_are_cut_row_by_row_and_put_together_again():
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    patches = cut_into_patches(image, 4)
    expected = [image[top : top + 4, left : left + 4] for top in (0, 4) for left in (0, 4, 8)]
    np.testing.assert_array_equal(patches, expected)
    np.testing.assert_array_equal(assemble_patches(patches, (2, 3)), image)


def test_gaps_and_cells_without_a_patch_are_transparent():
    patches = np.full((3, 2, 2, 3), 9, dtype=np.uint8)
    canvas = assemble_patches(patches, (2, 2), gap=1)
    opaque = np.array(
        [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(canvas[..., 3], 255 * opaque)


def test_an_image_tag_contains_the_pixels_and_the_escaped_description():
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    html = render_image(image, 'a "red" <cube>')
    np.testing.assert_array_equal(decode_images(html)[0], image)
    assert 'alt="a &quot;red&quot; &lt;cube&gt;"' in html and 'class="sharp"' in html


def test_large_images_are_shrunk():
    image = np.zeros((400, 800, 3), dtype=np.uint8)
    html = render_image(image, "large")
    assert decode_images(html)[0].shape == (160, 320, 3) and 'class="smooth"' in html
    assert decode_images(render_image(image, "small", max_side=40))[0].shape == (20, 40, 3)


def test_an_image_of_a_batch_has_the_pixels_of_its_file(vqa):
    run = read_runs(vqa)[0]
    task, record = load_run_weights(run, VQA), open_run_records(run, "main", "val")[0]
    batch = task.collate([task.example(record, False)])
    image = np.array(Image.open(record["image"]))
    np.testing.assert_array_equal(to_channels_last(batch["image"])[0], image)
