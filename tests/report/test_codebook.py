"""Mean patches are the means of the patches that the network gives each code."""

import numpy as np
from PIL import Image

from beit3.report.codebook import compute_code_statistics
from beit3.report.images import cut_into_patches, draw_hatching
from beit3.report.panel_inputs import load_run_weights, open_run_records
from beit3.report.runs import read_runs
from beit3.tasks.vqkd import VQKD


def test_mean_patches_are_the_means_of_their_codes(vqkd):
    run = read_runs([vqkd])[0]
    task, dataset = load_run_weights(run, VQKD), open_run_records(run, "main", "val")
    statistics = compute_code_statistics(task.backbone, task, dataset)
    patches_by_code: dict[int, list[np.ndarray]] = {}
    for record in dataset:
        image = task.example(record, False)["token_image"]
        codes = task.backbone.tokenize(image[None])[0].tolist()
        patches = cut_into_patches(np.array(Image.open(record["image"])), 4)
        for code, patch in zip(codes, patches, strict=True):
            patches_by_code.setdefault(code, []).append(patch)
    assert len(patches_by_code) > 1
    for code in range(12):
        patches = patches_by_code.get(code, [])
        assert statistics.counts[code] == len(patches)
        expected = np.mean(patches, 0) if patches else draw_hatching(4, 4)
        np.testing.assert_allclose(statistics.mean_patches[code], expected, atol=0.51)
